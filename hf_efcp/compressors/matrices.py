"""Parameters as matrices, for low-rank rows, and inner products of their factors."""

from __future__ import annotations

import torch

_SLAB = 1 << 20  # entries of a float64 temporary that exist at a time
_SHARE = 8  # large partial sums are at most the matrix divided by this, and one result more
_COLUMNS = 256  # least width of a tile that is no whole rows


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


def tiles(rows: int, cols: int, rank: int, entries: int) -> tuple[int, int]:
    """Height and width of the tiles of a matrix `A` whose products `P^T A` are partial sums, `(rank, width)`.

    Tiles are whole rows unless their partial sums would be too large: `rank / height` times the matrix.

    Args:
        rows: Of the matrix.
        cols: Of the matrix.
        rank: Columns of `P`.
        entries: Of a tile, about; partial sums of fewer than `_SLAB` are never too large.

    Returns:
        Both, which never depend on the machine: the bits of the sums depend on them.
    """
    height = max(1, entries // cols)
    if -(-rows // height) * rank * cols <= max(_SLAB, rows * cols // _SHARE):
        return height, cols
    height = min(rows, _SHARE * rank)
    return height, min(cols, max(_COLUMNS, entries // height))


def inner(side: torch.Tensor, newest: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """All vectors of a side times the transposed newest ones."""
    total = torch.zeros(len(side), len(newest), dtype=wide, device=side.device)
    for span in cuts(side.shape[1], max(1, _SLAB // len(side))):
        total.addmm_(side[:, span].to(wide), newest[:, span].to(wide).T)
    return total


def cuts(length: int, step: int) -> list[slice]:
    """Slices of at most `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
