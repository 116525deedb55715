"""What tensors are cut into, for programs that each take a piece: tables that depend on shapes only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import BUCKET
from .rows import Row

ROWS = 2048 // BUCKET  # buckets of a program
TILE = 32, 64  # rows and columns of a tile of a matrix
SPLIT = 2048  # rows of a matrix over which one program sums
BLOCKS = 64  # blocks whose products one program takes
SQUARES = 256, 128  # rows and columns over which one program sums squares


def cut(sizes: Sequence[int], step: int) -> NDArray[np.int64]:
    """Ranges of a length.

    Args:
        sizes: Of each tensor.
        step: Of a range.

    Returns:
        Tensor and begin of each, `(tasks, 2)`.
    """
    pairs = [(row, begin) for row, size in enumerate(sizes) for begin in range(0, size, step)]
    return np.array(pairs, np.int64).reshape(-1, 2)


def tiles(sizes: Sequence[tuple[int, int]], rows: int, cols: int) -> NDArray[np.int64]:
    """Tiles of matrices.

    Args:
        sizes: Height and width of each tensor; 0 and 0 for none.
        rows: Of a tile.
        cols: Of a tile.

    Returns:
        Tensor, first row and first column of each, `(tasks, 3)`.
    """
    found = [
        (number, top, left)
        for number, (height, width) in enumerate(sizes)
        for top in range(0, height, rows)
        for left in range(0, width, cols)
    ]
    return np.array(found, np.int64).reshape(-1, 3)


def place_scratch(rows: Sequence[Row], rank: int) -> None:
    """Give every matrix its place in the memory that the kernels of `push_low_rank` share.

    Args:
        rows: Of low-rank windows; "image", "partial" and "splits" are written.
        rank: Of a row.
    """
    begin = 0
    for row in rows:
        height, width = row.places["height"], row.places["width"]
        row.places |= {"image": begin, "partial": begin + height * rank, "splits": -(-height // SPLIT)}
        begin += scratch_size(height, width, rank)


def scratch_size(height: int, width: int, rank: int) -> int:
    """Entries of the memory that a matrix has for itself."""
    return rank * (height + -(-height // SPLIT) * width)


def place_squares(rows: Sequence[Row]) -> int:
    """Give every matrix whose second moment is factored its place in the memory of sums of squares.

    Args:
        rows: "squares" is written.

    Returns:
        Entries of that memory.
    """
    begin = 0
    for row, (height, width) in zip(rows, factored(rows), strict=True):
        row.places["squares"] = begin
        begin += -(-width // SQUARES[1]) * height + -(-height // SQUARES[0]) * width
    return begin


def factored(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Heights and widths of the matrices whose second moments are factored, of every tensor once; 0 and 0 for none."""
    widths = [0 if row.places.get("begin", 0) else row.places.get("second_width", 0) for row in rows]
    return [(row.places["numel"] // width, width) if width else (0, 0) for row, width in zip(rows, widths, strict=True)]


def runs(rows: Sequence[Row]) -> NDArray[np.int64]:
    """The first row of each of these, and how many rows the tensor has, `(tensors, 2)`."""
    firsts = [number for number, row in enumerate(rows) if not row.places.get("begin", 0)]
    pairs = zip(firsts, [*firsts[1:], len(rows)], strict=True)
    found = [(first, last - first) for first, last in pairs if rows[first].places.get("second_width", 0)]
    return np.array(found, np.int64).reshape(-1, 2)


def buckets(rows: Sequence[Row], *, factored: bool = True) -> NDArray[np.int64]:
    """Ranges of buckets, of every tensor once, however many rows it has; or without those that are factored."""
    left_out = [row.places.get("begin", 0) or (not factored and row.places.get("second_width", 0)) for row in rows]
    return cut([0 if out else -(-row.places["numel"] // BUCKET) for row, out in zip(rows, left_out, strict=True)], ROWS)


def splits(sizes: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Tiles over which `A^T Y` is summed: matrix, number of the rows' range, first column."""
    found = tiles(sizes, SPLIT, TILE[1])
    found[:, 1] //= SPLIT
    return found


def tiles_of(rows: Sequence[Row], height: int) -> NDArray[np.int64]:
    """Tiles of matrices, and of what is kept whole ranges that are as long as a tile is large; in the rows' order."""
    sizes = [(row.places["height"], row.places["width"]) for row in rows]
    whole = cut([0 if row.places["height"] else row.places["numel"] for row in rows], height * TILE[1])
    ranges = np.stack([whole[:, 0], np.zeros_like(whole[:, 0]), whole[:, 1]], axis=1)
    found = np.concatenate([tiles(sizes, height, TILE[1]), ranges])
    return found[np.argsort(found[:, 0], kind="stable")]


def ranges(rows: Sequence[Row]) -> list[tuple[int, int, int, int]]:
    """Runs of blocks: row, begin, end and unit of each."""
    return [
        (number, begin, min(begin + BLOCKS, row.places["blocks"]), row.places["unit"])
        for number, row in enumerate(rows)
        for begin in range(0, row.places["blocks"], BLOCKS)
    ]
