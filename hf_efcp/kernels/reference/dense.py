"""Sums of squares, and the last line of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import widest
from .chunks import chunks


def squares(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of each vector.

    Args:
        vectors: `(n,)` each, float32, contiguous.

    Returns:
        The sums, accumulated in float64 (float32 where the device has no float64); not finite where an entry is not.
    """
    if not vectors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    return torch.stack([_square(vector) for vector in vectors])


def _square(vector: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=widest(vector.device), device=vector.device)
    for part in chunks(len(vector), 1):
        total += vector[part].to(total.dtype).square().sum()
    return total


def apply(
    theta: torch.Tensor,
    update: torch.Tensor,
    *,
    lr: float,
    keep: float,
    velocity: torch.Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """Move a slab of a parameter: `v <- momentum v + u`, `theta <- keep theta - lr v`.

    Args:
        theta: The slab, `(n,)`, float32; updated.
        update: `u`, `(n,)`, float32.
        lr: Learning rate.
        keep: What weight decay leaves of the parameter.
        velocity: `v`, `(n,)`, float32; updated. None for no momentum.
        momentum: Heavy-ball factor.
    """
    if velocity is not None:
        update = velocity.mul_(momentum).add_(update)
    if keep != 1.0:
        theta.mul_(keep)
    theta.add_(update, alpha=-lr)
