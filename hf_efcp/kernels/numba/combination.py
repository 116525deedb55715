"""Combinations of a window's rows."""

from __future__ import annotations

import numpy as np
import torch

from ...blocks import sharing
from .. import pool
from .arrays import LONG, WIDTH, array_of, flat_rows, of_short, task_size
from .compiling import inner, inner_in_order, jit
from .scalars import ONE, ZERO, decode
from .vectors import add_eights

_NO_BASE = np.empty((0, 0), np.float32)


@inner_in_order
def _add_rows(index, value, kept, weights, rows, dense):
    """Add the long rows of one block, times their weights, to a dense block."""
    groups = kept // WIDTH
    row = ZERO
    while row < rows:
        j = row * kept
        weight = weights[row]
        add_eights(index, value, j, groups, weight, dense)
        stop = j + kept
        j += groups * WIDTH
        while j < stop:
            dense[index[j]] += weight * np.float64(decode(value[j]))
            j += ONE
        row += ONE


@inner_in_order
def _add_entries(index, value, weights, dense):
    """Add the entries of short rows, times a weight for each, to a dense block."""
    count = np.uint64(weights.shape[0])
    groups = count // WIDTH
    add_eights(index, value, ZERO, groups, weights, dense)
    j = groups * WIDTH
    while j < count:
        dense[index[j]] += weights[j] * np.float64(decode(value[j]))
        j += ONE


@inner_in_order
def _add_squares(index, value, kept, weights, rows, dense):
    """As `_add_rows`, for the squares of the entries; windows of diagonal rules are short."""
    row = ZERO
    while row < rows:
        j = row * kept
        stop = j + kept
        weight = weights[row]
        while j < stop:
            v = np.float64(decode(value[j]))
            dense[index[j]] += weight * (v * v)
            j += ONE
        row += ONE


@inner
def _combine(indices, values, scales, share, kept, coefficients, base, scale, squared, begin, end, out, room):
    dense, weights, short = room
    rows = coefficients.shape[0]
    length = out.shape[0] // indices.shape[0]
    dense = dense[:length]
    each = of_short(short, kept, rows)
    for block in range(begin, end):
        first = block == begin
        if scales is None:
            if first:
                for row in range(rows):
                    weights[row] = coefficients[row]
        elif block % share == 0:
            first = True
            for row in range(rows):
                unit = np.float64(decode(scales[block // share, row]))
                weights[row] = coefficients[row] * (unit * unit if squared else unit)
        if first and len(each):
            j = ZERO
            for row in range(rows):
                for _ in range(kept):
                    each[j] = weights[row]
                    j += ONE
        if base.shape[0]:
            for i in range(length):
                dense[i] = scale * np.float64(base[block, i])
        else:
            for i in range(length):
                dense[i] = 0.0
        if squared:
            _add_squares(indices[block], values[block], np.uint64(kept), weights, np.uint64(rows), dense)
        elif len(each):
            _add_entries(indices[block], values[block], each, dense)
        else:
            _add_rows(indices[block], values[block], np.uint64(kept), weights, np.uint64(rows), dense)
        total = out[block * length : (block + 1) * length]
        for i in range(length):
            total[i] = np.float32(dense[i])


@jit
def _combine_slab(indices, values, scales, share, kept, coefficients, base, scale, squared, begin, end, out, room):
    _combine(indices, values, scales, share, kept, coefficients, base, scale, squared, begin, end, out, room)


def combine(
    indices: torch.Tensor,
    values: torch.Tensor,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    scale: float = 0.0,
    squared: bool = False,
) -> None:
    """See `reference.combine`; one block of the sum is a float64 buffer in the first-level cache."""
    index, value, kept = *flat_rows(indices, values), indices.shape[2]
    c, total, length = array_of(coefficients), array_of(out).reshape(-1), out.shape[1]
    x = _NO_BASE if base is None else array_of(base)
    units, share = None if scales is None else array_of(scales), sharing(length)

    def work(_: int, begin: int, end: int) -> None:
        room = np.empty(length), np.empty(len(c)), np.empty(len(c) * kept if kept < LONG else 0)
        _combine_slab(index, value, units, share, kept, c, x, scale, squared, begin, end, total, room)

    pool.run(work, len(index), task_size(length))
