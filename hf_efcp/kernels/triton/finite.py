"""Which gradients of a model have NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from . import cuts
from .launch import launch, upload
from .rows import Row
from .shared import _FLOAT32_MAX, COLUMNS, GRADIENT, GRADIENT_CODE, NUMEL, field, load_vector, small

_RANGE = 4096  # entries of a program


@triton.jit
def find_nonfinite(table, tasks, flags, LENGTH: tl.constexpr):
    """Set the flag of a tensor, int32, if an entry of a range is not finite. All write the same, in any order."""
    task = tl.program_id(0)
    row, first = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1).to(tl.int32)
    position = first + tl.arange(0, LENGTH)
    inside = position < small(table, row, NUMEL)
    g = load_vector(field(table, row, GRADIENT), field(table, row, GRADIENT_CODE), position, inside)
    good = tl.min((tl.abs(g) <= _FLOAT32_MAX).to(tl.int32), axis=0)  # NaN compares as false
    tl.store(flags + row, 1, mask=good == 0)


class FiniteCheck:
    """Finds gradients with NaN or infinity. What it returns is the only copy from the device that a step waits for.

    Args:
        device: Where gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shapes: Any = None

    def find(self, gradients: Sequence[torch.Tensor]) -> list[bool]:
        """Which gradients have any.

        Args:
            gradients: Contiguous.

        Returns:
            True for those that have.
        """
        shapes = [(g.numel(), g.dtype) for g in gradients]
        if shapes != self._shapes:
            rows = [Row(g, g, {}, {"numel": g.numel()}, {}).integers() for g in gradients]
            self._table = np.array(rows, np.int64).reshape(len(rows), len(COLUMNS))
            self._tasks = upload(cuts.cut([g.numel() for g in gradients], _RANGE), self._device)
            self._shapes = shapes
        self._table[:, GRADIENT.value] = [g.data_ptr() for g in gradients]
        flags = torch.zeros(len(gradients), dtype=torch.int32, device=self._device)
        table = upload(self._table, self._device)
        launch(find_nonfinite, (len(self._tasks),), table, self._tasks, flags, LENGTH=_RANGE)
        return [bool(flag) for flag in flags.tolist()]
