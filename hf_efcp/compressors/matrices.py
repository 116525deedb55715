"""Parameters as matrices, for low-rank rows, and inner products of their factors."""

from __future__ import annotations

import torch

_SLAB = 1 << 20  # entries of a float64 temporary that exist at a time


def matrix(shape: torch.Size, rank: int) -> tuple[int, int] | None:
    """What is factored as a matrix, and as which.

    Args:
        shape: Shape of the parameter.
        rank: Rank of a row.

    Returns:
        Rows and columns; None for a parameter that is kept whole. The rank is below both.
    """
    if len(shape) < 2:
        return None
    rows, cols = shape[0], shape[1:].numel()
    return None if rank * (rows + cols) >= rows * cols else (rows, cols)


def inner(side: torch.Tensor, newest: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """All vectors of a side times the transposed newest ones."""
    total = torch.zeros(len(side), len(newest), dtype=wide, device=side.device)
    for span in cuts(side.shape[1], max(1, _SLAB // len(side))):
        total.addmm_(side[:, span].to(wide), newest[:, span].to(wide).T)
    return total


def cuts(length: int, step: int) -> list[slice]:
    """Slices of at most `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
