"""What is compressed as one: a parameter or this rank's shard of it, its tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .shards import local

Group = dict[str, Any]


class ParamRef(NamedTuple):
    """A parameter, its group, and its position among all parameters of the optimizer."""

    position: int
    group: Group
    param: torch.Tensor


class Leaf(NamedTuple):
    """A parameter with its state; of a shard, this rank's views of both."""

    state: dict[str, Any]
    shape: torch.Size
    ref: ParamRef


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """This process's part of a gradient, in float32 and contiguous."""
    return local(gradient).to(torch.float32).contiguous()


def gradient_of(leaf: Leaf) -> torch.Tensor:
    """The gradient in float32, contiguous, with L2 regularisation where it is not decoupled."""
    return spans_of_gradient(leaf)(slice(0, leaf.shape.numel())).view(leaf.shape)


def is_float32(leaf: Leaf) -> bool:
    """Whether `gradient_of` is the gradient as it is, if that is contiguous."""
    _, group, param = leaf.ref
    assert param.grad is not None
    return param.grad.dtype == torch.float32 and (not group["weight_decay"] or group["decoupled_weight_decay"])


def spans_of_gradient(leaf: Leaf) -> Callable[[slice], torch.Tensor]:
    """What makes a span of the flattened `gradient_of`, so that no copy of it exists unless it is not contiguous."""
    _, group, param = leaf.ref
    assert param.grad is not None
    gradient = local(param.grad).detach().contiguous().view(-1)
    if not group["weight_decay"] or group["decoupled_weight_decay"]:
        return lambda span: gradient[span].to(torch.float32)
    theta, decay = local(param).detach().contiguous().view(-1), group["weight_decay"]
    return lambda span: gradient[span].to(torch.float32).add(theta[span].to(torch.float32), alpha=decay)
