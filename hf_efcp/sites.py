"""What is compressed as one: a parameter or this rank's shard of it, its tensors, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .shards import local

Group = dict[str, Any]


class Member(NamedTuple):
    """A parameter, its group, and its position among all parameters of the optimizer."""

    position: int
    group: Group
    param: torch.Tensor


class Site(NamedTuple):
    """A parameter with its state; of a shard, this rank's views of both."""

    state: dict[str, Any]
    shape: torch.Size
    member: Member


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """This process's part of a gradient, in float32 and contiguous."""
    return local(gradient).to(torch.float32).contiguous()


def gradient_of(site: Site) -> torch.Tensor:
    """The gradient in float32, contiguous, with L2 regularisation where it is not decoupled."""
    _, group, param = site.member
    assert param.grad is not None
    gradient = dense(param.grad)
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        gradient = gradient.add(local(param).to(torch.float32), alpha=group["weight_decay"]).contiguous()
    return gradient
