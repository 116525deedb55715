"""How kernels are launched, and what is sent to a device. Everything that is started on a device, starts here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ... import graphs


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
        array: The table; in a CUDA graph int64 or float64.
        device: Where.

    Returns:
        The tensor.
    """
    if graphs.is_captured(device):
        # A graph would copy from memory of the host that may have other content, or be gone, when it is replayed.
        # The numbers of a `foreach` are arguments of its kernels, and in the graph.
        dtype = torch.int64 if array.dtype == np.int64 else torch.float64
        found = torch.zeros(array.shape, dtype=dtype, device=device)
        torch._foreach_add_(list(found.view(-1)), array.ravel().tolist())
        return found
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


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
