"""Runs a kernel over ranges of blocks on a few threads.

Threads of our own, and not numba's parallel mode: its OpenMP layer does not survive the fork of a DataLoader worker.
The kernels release the GIL. How the blocks are cut into ranges never depends on the number of threads, so that the
bits of a result do not either.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

import torch

from ..threads import available

# What to do, and where to say that it is done, or what went wrong.
_Job = tuple[Callable[[], None], "SimpleQueue[BaseException | None]"]

_jobs: SimpleQueue[_Job] = SimpleQueue()
# Threads that take jobs; an executor of the standard library makes a future with locks for each job.
_helpers: list[threading.Thread] = []
_kept_off = -1  # the processor that they do not run on
_inside = threading.local()  # whether a thread is inside of work


def run(work: Callable[[int, int, int], None], blocks: int, step: int) -> None:
    """Call `work(index, begin, end)` for every range of at most `step` blocks, on `threads.available()` threads.

    Args:
        work: Called once for each range, in any order, from any thread.
        blocks: Number of blocks in all.
        step: Blocks of a range.
    """
    ranges = -(-blocks // step)
    if ranges == 1:
        work(0, 0, blocks)
        return
    counter = itertools.count()

    def drain() -> None:
        while (index := next(counter)) < ranges:
            work(index, index * step, min((index + 1) * step, blocks))

    together(drain, ranges)


def together(work: Callable[[], None], most: int) -> None:
    """Call `work()` on `threads.available()` threads at once, this one among them, but not on more than `most`.

    Args:
        work: Takes tasks from what the calls share until none is left.
        most: Number of tasks.
    """
    helpers = 0 if getattr(_inside, "work", False) else max(0, min(available(), most) - 1)
    _start(helpers)
    if helpers:
        _keep_apart()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    sent = 0
    try:
        for _ in range(helpers):
            _jobs.put((work, done))
            sent += 1
        with _alone():
            work()
    finally:
        # Also when our own call failed: nobody may write into a tensor after the caller has gone on.
        errors = _wait(done, sent)
    for error in errors:
        if error is not None:
            raise error


@contextmanager
def _alone() -> Iterator[None]:
    """Have calls from inside of work run on their own thread: a helper that waits for helpers might wait for ever."""
    before, _inside.work = getattr(_inside, "work", False), True
    try:
        yield
    finally:
        _inside.work = before


def _wait(done: SimpleQueue[BaseException | None], count: int) -> list[BaseException | None]:
    """What so many threads report, even if Ctrl-C is pressed meanwhile."""
    errors: list[BaseException | None] = []
    interrupted = None
    while len(errors) < count:
        try:
            errors.append(done.get())
        except KeyboardInterrupt as error:
            interrupted = error
    return [interrupted, *errors]


def run_torch(work: Callable[[int, int, int], None], blocks: int, step: int, device: torch.device) -> None:
    """As `run`, for work that is done by torch: on the CPU each call runs on one of torch's threads.

    Matrix products that share their work among threads have other bits for every number of them. Other devices have
    parallelism of their own: there the calls follow each other.

    Args:
        work: Called once for each range, in any order, from any thread.
        blocks: Number of blocks in all.
        step: Blocks of a range.
        device: Where the tensors are.
    """
    if device.type != "cpu":
        for index, begin in enumerate(range(0, blocks, step)):
            work(index, begin, min(begin + step, blocks))
        return
    threads = torch.get_num_threads()

    def alone(index: int, begin: int, end: int) -> None:
        torch.set_num_threads(1)  # of the calling thread
        work(index, begin, end)

    try:
        run(alone, blocks, step)
    finally:
        # It is also what threads that are started later begin with: the last word is ours.
        torch.set_num_threads(threads)


def _start(helpers: int) -> None:
    """Have at least so many threads that take jobs."""
    global _kept_off
    while len(_helpers) < helpers:
        helper = threading.Thread(target=_help, args=(_jobs,), name=f"hf_efcp {len(_helpers)}", daemon=True)
        helper.start()
        _helpers.append(helper)
        _kept_off = -1


def _keep_apart() -> None:
    """Have helpers run on other processors than the calling thread.

    In a virtual machine a processor that sleeps looks taken, and Linux then wakes a thread where the thread runs that
    wakes it. They share that processor until its scheduler notices, which takes longer than most kernels.
    """
    global _kept_off
    here = _processor()
    if here == _kept_off:
        return
    _kept_off = here
    others = os.sched_getaffinity(0) - {here}
    with suppress(OSError):  # where it is forbidden, they run where they are put
        for helper in _helpers if others else ():
            if helper.native_id is not None:
                os.sched_setaffinity(helper.native_id, others)


def _same() -> int:
    return _kept_off


_processor: Callable[[], int] = _same  # that the calling thread runs on, where that can be told
if hasattr(os, "sched_setaffinity"):
    _processor = getattr(ctypes.CDLL(None), "sched_getcpu", _same)


def _help(jobs: SimpleQueue[_Job]) -> None:
    while True:
        work, done = jobs.get()
        try:
            with _alone():
                work()
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)
        del work, done  # and what they hold, while the next job is waited for


def _forget() -> None:
    """A forked child has none of the threads: it starts its own when it needs them."""
    global _jobs, _helpers
    _jobs, _helpers = SimpleQueue(), []


if hasattr(os, "register_at_fork"):  # absent on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
