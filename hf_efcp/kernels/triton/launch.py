"""How kernels are launched, and the tables that they read. Everything that is started on a device, starts here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# A tensor, and ranges of two of its dimensions.
Shape = tuple[int, int, int, int]  # numel, height, width, splits; height 0 for what is kept whole


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Start a kernel on the current stream, unless there is nothing to do.

    Products and sums are not fused: every backend has the same bits where the order of operations is the same.

    Args:
        kernel: What `triton.jit` made.
        grid: Programs.
        *arguments: Tensors and numbers.
        warps: Of a program.
        **constants: What it is compiled for.
    """
    if all(grid):
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small table on the device, without waiting for it.

    Args:
        array: The table.
        device: Where.

    Returns:
        The tensor.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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


@lru_cache(maxsize=64)
def padded(number: int, least: int = 1) -> int:
    """The next power of two.

    Args:
        number: At least 1.
        least: What it is at least.

    Returns:
        The power.
    """
    return max(least, 1 << (number - 1).bit_length())
