"""Which gradients of a model have NaN or infinity."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import _FLOAT32_MAX, GRADIENT, GRADIENT_CODE, NUMEL, field, load_vector, small


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
