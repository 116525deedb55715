"""States of optimizers: trained ones, copies, comparison to the bit, and what a refusal must leave alone."""

import copy
import inspect
import io

import pytest
import torch
import torch.distributed.checkpoint
from problems import Regression, set_gradients
from variants import build

# Torch's distributed checkpoints without a process group, which torch 2.6 sees for itself.
ALONE = {"no_dist": True} if "no_dist" in inspect.signature(torch.distributed.checkpoint.save).parameters else {}


def snapshot(params, optimizer):
    """Everything that a refused step must leave alone."""
    return copy.deepcopy(([p.detach() for p in params], [p.grad for p in params], optimizer.state_dict()))


def assert_same(left, right):
    """Equal to the bit, dtypes and structure included."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def train(params, optimizer, problem, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params, problem.gradients(params, step))
        optimizer.step()


def trained(name, steps=8, **changes):
    """A problem, its parameters and an optimizer whose window has wrapped."""
    problem = Regression(seed=11, width=30)
    params = problem.parameters()
    optimizer = build(name, params, **changes)
    train(params, optimizer, problem, steps)
    return problem, params, optimizer


def through_a_file(state_dict):
    """As Trainer and Accelerate reload an optimizer."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def refuse(optimizer, state_dict, message):
    """Loading raises, and leaves the optimizer as it was."""
    params = optimizer.param_groups[0]["params"]
    problem = Regression(seed=11, width=30)
    if [param.shape for param in params] == [start.shape for start in problem.start]:
        train(params, optimizer, problem, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same(before, optimizer.state_dict())
