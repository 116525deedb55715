"""Steps in the interpreter after something about parameters, groups or the backend is another: no table is stale."""

import pytest
import torch
from check_steps import CASES, Run, assert_close


@pytest.mark.parametrize("case", ["exact", "one matrix", "sparse, exact", "sparse, one matrix"])
def test_a_parameter_without_a_gradient(case):
    mine, expected = Run(case, "triton"), Run(case, "reference")
    for absent in ((), (0,), (1, 3), ()):
        found = mine.step(absent)
        assert_close(found, expected.step(absent), CASES[case][2])
        for number in absent:
            assert not found[number].any()


def test_parameters_that_are_not_contiguous():
    runs = [Run("exact", backend, shapes=[(12, 9), (8, 4, 3, 2)]) for backend in ("triton", "reference")]
    for run in runs:
        run.params[0].data = torch.zeros(9, 12).T
        run.params[1].data = torch.zeros(8, 4, 3, 2).to(memory_format=torch.channels_last)
    for _ in range(3):
        assert_close(*(run.step() for run in runs), 2e-5)
    assert not runs[0].params[0].is_contiguous()


@pytest.mark.parametrize("case", ["exact", "sparse, exact"])
def test_a_run_goes_on_with_another_backend(case):
    expected, mine = Run(case, "reference"), Run(case, "triton")
    for _ in range(3):
        expected.step()
        mine.step()
    for backend in ("reference", "triton", "numba"):
        mine.optimizer._backend = backend  # as after loading on another machine
        assert_close(mine.step(), expected.step(), 1e-4)


def test_the_largest_learning_rate_of_what_moves_counts():
    runs = [Run("one matrix", backend) for backend in ("triton", "reference")]
    for run in runs:
        last = run.optimizer.param_groups[0]["params"].pop()
        run.optimizer.add_param_group({"params": [last], "lr": 1.0})
    for absent in ((), (3,), (3,)):
        assert_close(*(run.step(absent) for run in runs), 2e-5)
    for run in runs:
        run.params[3].requires_grad = False
    assert_close(*(run.step((3,)) for run in runs), 2e-5)


def test_a_parameter_in_the_place_of_another():
    run = Run("default", "triton")
    run.step()
    old, state = run.params[0], run.optimizer.state.pop(run.params[0])
    run.params[0] = run.optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros_like(old))
    run.optimizer.state[run.params[0]] = state
    before = old.detach().clone()
    assert run.step()[0].any()
    assert torch.equal(old, before)


def test_a_state_that_is_set_back():
    run = Run("default", "triton")
    run.step()
    tensors = {
        param: {k: v.clone() if torch.is_tensor(v) else v for k, v in run.optimizer.state[param].items()}
        for param in run.params
    }
    expected = run.step()
    for param, saved in tensors.items():
        for name, value in saved.items():
            if torch.is_tensor(value):
                run.optimizer.state[param][name].copy_(value)
            else:
                run.optimizer.state[param][name] = value
    run.steps -= 1
    for param, update in zip(run.params, expected, strict=True):
        param.data.sub_(update.to(param.dtype))
    assert_close(run.step(), expected, 1e-6)
