"""From an update to the parameter: momentum, weight decay, learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .kernels import Kernels
from .shards import local
from .sites import Site
from .windows import Slab


def move(site: Site, updates: Iterable[Slab], kernels: Kernels) -> None:
    """`v <- momentum v + u`, `theta <- (1 - lr weight_decay) theta - lr v`, slab by slab.

    Args:
        site: The parameter.
        updates: `u`: where each slab goes in the flattened parameter, and its entries in float32; they are spoilt.
        kernels: The backend.
    """
    group, param = site.member.group, local(site.member.param)
    lr = float(group["lr"])
    keep = 1.0 - lr * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
    # A view of a non-contiguous parameter may be a copy, and low precision would round every slab twice.
    theta = param.detach().to(torch.float32).contiguous().view(-1)
    velocity = site.state["momentum"].view(-1) if group["momentum"] else None
    for span, slab in updates:
        v = None if velocity is None else velocity[span]
        kernels.apply(theta[span], slab, lr=lr, keep=keep, velocity=v, momentum=group["momentum"])
        del slab  # before the next one is made
    if theta.data_ptr() != param.data_ptr():
        param.copy_(theta.view(param.shape))
