"""What is compressed as one: a parameter or this rank's shard of it, its tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .shards import local

Group = dict[str, Any]
Spans = Callable[[slice], torch.Tensor]  # what makes a span of a flat vector, `(n,)`, float32, contiguous


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
    gradient, *theta = _summands(leaf)
    return gradient.dtype == torch.float32 and not theta


def copied(leaf: Leaf) -> int:
    """Entries of the copies that what `spans_of_gradient` returns holds."""
    return sum(tensor.numel() for tensor in _summands(leaf) if not tensor.is_contiguous())


def spans_of_gradient(leaf: Leaf) -> Spans:
    """What makes spans of the flat `gradient_of`. What is not contiguous is copied whole: call it once for all."""
    gradient, *theta = (tensor.detach().contiguous().view(-1) for tensor in _summands(leaf))
    if not theta:
        return lambda span: gradient[span].to(torch.float32)
    decay = leaf.ref.group["weight_decay"]
    return lambda span: gradient[span].to(torch.float32).add(theta[0][span].to(torch.float32), alpha=decay)


def _summands(leaf: Leaf) -> list[torch.Tensor]:
    """The gradient, and the parameter where L2 regularisation adds it, as they are kept."""
    _, group, param = leaf.ref
    assert param.grad is not None
    decays = group["weight_decay"] and not group["decoupled_weight_decay"]
    return [local(tensor) for tensor in ((param.grad, param) if decays else (param.grad,))]
