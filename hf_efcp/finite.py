"""Gradients with NaN or infinity: found before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from . import shards
from .kernels import Kernels
from .leaves import ParamRef, dense
from .shards import local

_SQUARED = 4 << 20  # entries of gradients that are converted to float32 at a time


def skips(
    active: list[ParamRef],
    sums: Mapping[int, float],
    processes: torch.distributed.ProcessGroup | None,
    device: torch.device,
    name: Callable[[torch.Tensor], str],
    *,
    skip: bool,
) -> bool:
    """Whether a step is to be left out, on all ranks if on one.

    Args:
        active: The parameters, with or without a gradient.
        sums: `|g|^2` of each gradient, by position.
        processes: Among which they are sharded; None for one process.
        device: Where they are.
        name: What to call a parameter.
        skip: A step with such a gradient is left out, and no error.

    Returns:
        True if so.

    Raises:
        ValueError: A gradient has NaN or infinity, and steps are not skipped.
    """
    bad = [
        ref.param for ref in active if ref.param.grad is not None and not is_finite(ref.param.grad, sums[ref.position])
    ]
    count = float(shards.all_reduce(torch.tensor([len(bad)], dtype=torch.float64, device="cpu"), processes, device))
    if count and not skip:
        raise ValueError(message(bad, name))
    return count > 0.0


def squares(active: list[ParamRef], kernels: Kernels) -> dict[int, float]:
    """`|g|^2` of each gradient, which also tells whether it is finite.

    Args:
        active: Parameters, with or without one.
        kernels: The backend.

    Returns:
        The sums by the parameters' positions.
    """
    positions, sums, count = [], [], 0
    waiting: list[torch.Tensor] = []  # converted, and so not all at a time
    for ref in active:
        if ref.param.grad is not None:
            positions.append(ref.position)
            waiting.append(dense(ref.param.grad).view(-1))
            count += ref.param.grad.numel()
        if count > _SQUARED:
            sums.append(kernels.squares(waiting))
            waiting, count = [], 0
    if waiting:
        sums.append(kernels.squares(waiting))
    return dict(zip(positions, torch.cat(sums).tolist(), strict=True)) if sums else {}


def is_finite(grad: torch.Tensor, square: float) -> bool:
    """Whether a gradient has neither NaN nor infinity; one that is sharded is looked at on this rank only.

    Args:
        grad: The gradient.
        square: Its `|g|^2`. Only a finite one proves something: on devices without float64 it may overflow.

    Returns:
        True if so.
    """
    return math.isfinite(square) or bool(torch.isfinite(local(grad)).all())


def message(params: list[torch.Tensor], name: Callable[[torch.Tensor], str]) -> str:
    """What to say about gradients with NaN or infinity.

    Args:
        params: Parameters that have one on this rank; none if it is on another rank only.
        name: What to call a parameter.

    Returns:
        The message.
    """
    where = "a gradient on another rank has entries that are NaN or infinite"
    for param in params[:1]:
        assert param.grad is not None
        grad = local(param.grad)
        wrong = grad.numel() - int(torch.isfinite(grad).sum())
        where = f"the gradient of {name(param)} has {wrong} entries of {grad.numel()} that are NaN or infinite"
    return (
        f"{where}; nothing was changed. Skip such steps (nonfinite='skip'), lower the learning rate or clip the "
        "gradients"
    )
