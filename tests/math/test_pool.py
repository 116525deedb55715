"""The threads of the kernels: who runs where, what happens to errors, and what a fork leaves."""

import os
import threading
import time

import pytest
import torch

from hf_efcp.kernels import pool

LINUX = hasattr(os, "sched_setaffinity")


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def meet():
    """Run on two threads that wait for each other, and return their names."""
    both, names = threading.Barrier(2, timeout=30), []

    def work():
        both.wait()
        names.append(threading.current_thread().name)

    pool.together(work, 2)
    return names


@pytest.mark.usefixtures("two_threads")
def test_two_threads_work_at_once_and_no_more_than_there_is_work_for():
    names = meet()
    assert len(set(names)) == 2
    assert threading.current_thread().name in names
    called = []
    for most in (0, 1):
        pool.together(lambda: called.append(threading.current_thread()), most)
    assert called == [threading.current_thread()] * 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("where", ["here", "there"])
def test_an_error_of_any_thread_is_raised_when_all_have_stopped(where):
    caller, both, done = threading.current_thread(), threading.Barrier(2, timeout=30), []

    def work():
        both.wait()
        if (threading.current_thread() is caller) == (where == "here"):
            raise ValueError("a bad range")
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(ValueError, match="a bad range"):
        pool.together(work, 2)
    assert done == [True]
    assert len(meet()) == 2  # and both go on


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_cannot_start_is_not_waited_for(monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "_helpers", [])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start"):
                pool.together(lambda: None, 2)
    assert len(set(meet())) == 2


def test_threads_are_waited_for_through_an_interruption():
    class Interrupted:
        reports = iter([None, KeyboardInterrupt(), None])

        def get(self):
            report = next(self.reports)
            if report is not None:
                raise report

    interrupted, *errors = pool._wait(Interrupted(), 2)
    assert isinstance(interrupted, KeyboardInterrupt)
    assert errors == [None, None]


@pytest.mark.skipif(not LINUX or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors")
@pytest.mark.usefixtures("two_threads")
def test_helpers_keep_off_the_processor_of_the_caller():
    allowed = os.sched_getaffinity(0)
    try:
        for here in sorted(allowed)[:2]:
            os.sched_setaffinity(0, {here})  # so that the caller stays there
            os.sched_setaffinity(0, allowed)
            meet()
            kept_off = pool._kept_off
            assert kept_off in allowed
            for helper in pool._helpers:
                assert os.sched_getaffinity(helper.native_id) == allowed - {kept_off}
        os.sched_setaffinity(0, {min(allowed)})  # one processor: nowhere else to go
        assert len(meet()) == 2
    finally:
        os.sched_setaffinity(0, allowed)
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(not LINUX, reason="Linux moves threads")
@pytest.mark.usefixtures("two_threads")
def test_where_threads_may_not_be_moved_they_stay(monkeypatch):
    asked = []

    def forbidden(*where):
        asked.append(where)
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 1, 2})
    monkeypatch.setattr(pool, "_kept_off", -1)
    assert len(meet()) == 2
    assert len(asked) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    meet()
    child = os.fork()
    if child == 0:
        os._exit(0 if not pool._helpers and len(set(meet())) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
