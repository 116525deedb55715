"""From updates to the parameters: momentum, weight decay, learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .checks import HEAVY_BALL
from .kernels import Kernels, pool
from .leaves import Leaf
from .shards import local


class Move(NamedTuple):
    """A parameter, where it is cut, and what makes the update `u` of a span, `(n,)`, float32."""

    leaf: Leaf
    spans: list[slice]
    update: Callable[[slice], torch.Tensor]


def move_all(moves: list[Move], kernels: Kernels) -> None:
    """`v <- momentum v + u`, `theta <- (1 - lr weight_decay) theta - lr v`, spans shared among threads.

    Args:
        moves: The parameters, all on one device.
        kernels: The backend.
    """
    # A view of a parameter that is not contiguous is a copy, which is written back.
    thetas = [local(move.leaf.ref.param).detach().contiguous().view(-1) for move in moves]
    tasks = [(number, span) for number, move in enumerate(moves) for span in move.spans]

    def work(index: int, begin: int, end: int) -> None:
        number, span = tasks[index]
        leaf, update = moves[number].leaf, moves[number].update
        group, stored = leaf.ref.group, thetas[number][span]
        lr = float(group["lr"])
        theta = stored.to(torch.float32)
        kernels.apply(
            theta,
            update(span),
            lr=lr,
            keep=1.0 - lr * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0,
            velocity=leaf.state["momentum"].view(-1)[span] if group[HEAVY_BALL] else None,
            momentum=group[HEAVY_BALL],
        )
        if theta.data_ptr() != stored.data_ptr():
            stored.copy_(theta)

    if tasks:
        pool.run_torch(work, len(tasks), 1, thetas[0].device)
    for move, theta in zip(moves, thetas, strict=True):
        param = local(move.leaf.ref.param)
        if theta.data_ptr() != param.data_ptr():
            param.copy_(theta.view(param.shape))
