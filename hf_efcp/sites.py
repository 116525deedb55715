"""What is compressed as one, its gradient, and how updates reach the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .kernels import Kernels
from .shards import local
from .step_size import Sized, Updates

Group = dict[str, Any]


class Member(NamedTuple):
    """A parameter, its group, and its position among all parameters of the optimizer."""

    position: int
    group: Group
    param: torch.Tensor


class Site(NamedTuple):
    """What is compressed as one: a parameter, or with global Top-k all of them as one long vector."""

    state: dict[str, Any]
    shape: torch.Size
    members: list[Member]


def joint_shape(members: list[Member]) -> torch.Size:
    """The shape of all parameters as one vector."""
    return torch.Size([sum(member.param.numel() for member in members)])


def spans(site: Site) -> Iterator[tuple[Member, slice]]:
    """Where the parameters of a joint vector are in it."""
    start = 0
    for member in site.members:
        yield member, slice(start, start + member.param.numel())
        start += member.param.numel()


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """This process's part of a gradient, in float32 and contiguous."""
    return local(gradient).to(torch.float32).contiguous()


def gradient_of(site: Site) -> torch.Tensor:
    """The gradient in float32, contiguous, with L2 regularisation where it is not decoupled; zero without one."""
    parts = []
    for _, group, param in site.members:
        theta = local(param)
        if param.grad is None:
            parts.append(torch.zeros(theta.shape, dtype=torch.float32, device=theta.device))
            continue
        gradient = dense(param.grad)
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            gradient = gradient.add(theta.to(torch.float32), alpha=group["weight_decay"]).contiguous()
        parts.append(gradient)
    return parts[0].view(site.shape) if len(parts) == 1 else torch.cat([part.view(-1) for part in parts])


def split_updates(site: Site, updates: Updates) -> Iterator[tuple[Member, Updates]]:
    """The updates of each parameter that has a gradient."""
    if len(site.members) == 1:
        yield site.members[0], updates
        return
    whole = torch.cat([update for _, update in updates(0)])
    for member, span in spans(site):
        if member.param.grad is not None:
            part = [(slice(0, member.param.numel()), whole[span])] if member.param.numel() else []
            yield member, lambda start, part=part: part  # type: ignore[misc]


def flat(param: torch.Tensor) -> torch.Tensor:
    """A parameter as one float32 vector: itself or, if it is stored otherwise, a copy."""
    # A view of a non-contiguous parameter may be a copy, and low precision would round every slab twice.
    return param.detach().to(torch.float32).contiguous().view(-1)


def kept(group: Group) -> float:
    """What decoupled weight decay leaves of a parameter in a step: `1 - lr weight_decay`."""
    return 1.0 - float(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0


def apply_updates(member: Member, state: dict[str, Any], update: Sized, kernels: Kernels) -> None:
    """`v <- momentum v + u`, `theta <- (1 - lr weight_decay) theta - lr v`, slab by slab of the parameter."""
    group, param = member.group, local(member.param)
    theta = flat(param)
    velocity = state["momentum"].view(-1) if group["momentum"] else None
    for span, slab in update.slabs:
        kernels.apply(
            theta[span],
            slab,
            span.start,
            update.columns,
            update.factors,
            lr=float(group["lr"]),
            keep=kept(group),
            velocity=None if velocity is None else velocity[span],
            momentum=group["momentum"],
        )
        del slab  # before the next one is made
    if theta.data_ptr() != param.data_ptr():
        param.copy_(theta.view(param.shape))
