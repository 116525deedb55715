"""Second moments of matrices as means over rows and columns: sums of squares, and what is made of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import observe
from .shared import (
    _FLOAT32_MAX,
    _SMALLEST,
    MEAN,
    NUMEL,
    SECOND,
    SECOND_SCALE,
    SECOND_WIDTH,
    SQUARES,
    WIDE,
    at_least,
    at_most,
    field,
    floats,
    gradient_of,
    small,
)


@triton.jit
def observe_factored(
    table,
    numbers,
    squares,
    count,
    scratch,
    tasks,
    beta2,
    rest2,
    rest1,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    ROWS: tl.constexpr,
    SQUARED: tl.constexpr,
    COLS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Sums of squares of `count` tiles, and what `moments.observe` does in the `tasks` that are left."""
    task = tl.program_id(0)
    if task < count:
        square(table, numbers, squares, task, scratch, COUPLED, SQUARED, COLS, PANEL)
    else:
        observe(table, numbers, tasks, count, beta2, rest2, rest1, MOMENT, METRIC, COUPLED, ROWS)


@triton.jit
def square(
    table,
    numbers,
    tasks,
    task,
    scratch,
    COUPLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Sums of `g^2` over the rows and the columns of a tile, float64, in the tensor's place in the scratch memory.

    There are those of its rows, `(tiles beside each other, height)`, and behind them those of its columns, `(tiles
    above each other, width)`.
    """
    row = tl.load(tasks + 3 * task)
    top, begin = tl.load(tasks + 3 * task + 1).to(tl.int32), tl.load(tasks + 3 * task + 2).to(tl.int32)
    width = small(table, row, SECOND_WIDTH)
    height = small(table, row, NUMEL) // width
    own = scratch + field(table, row, SQUARES)
    c = begin + tl.arange(0, COLS)
    columns = tl.zeros((COLS,), tl.float64)
    for first in range(top, min(top + PANEL, height), ROWS):
        r = first + tl.arange(0, ROWS)
        inside = (r < height)[:, None] & (c < width)[None, :]
        g = gradient_of(table, numbers, row, r[:, None] * width + c[None, :], inside, COUPLED)
        squares = tl.where(inside, g * g, 0.0)
        columns += tl.sum(squares, axis=0).to(tl.float64)
        place = (begin // COLS).to(tl.int64) * height + r
        tl.store(own + place, tl.sum(squares, axis=1).to(tl.float64), mask=r < height)
    own += tl.cdiv(width, COLS).to(tl.int64) * height + (top // PANEL).to(tl.int64) * width
    tl.store(own + c, columns, mask=c < width)


@triton.jit
def updated(address, sums, length, lines, count, first, beta2, rest2, LENGTH: tl.constexpr):
    """Some means over `count` entries, moved towards those of this step: `r <- beta2 r + (1 - beta2) mean`."""
    place = first + tl.arange(0, LENGTH)
    inside = place < length
    total = tl.zeros((LENGTH,), tl.float64)
    for line in range(lines):
        total += tl.load(sums + line * length + place, mask=inside, other=0.0)
    old = tl.load(floats(address) + place, mask=inside, other=0.0)
    new = at_most(old * beta2 + (total / count).to(tl.float32) * rest2, _FLOAT32_MAX)
    tl.store(floats(address) + place, new, mask=inside)
    return tl.where(inside, new, 0.0)


@triton.jit
def keep_means(
    table, numbers, tasks, scratch, beta2, rest2, COLS: tl.constexpr, PANEL: tl.constexpr, LENGTH: tl.constexpr
):
    """Both means of a tensor; the mean of those of the columns goes into the numbers of all its rows of the table."""
    task = tl.program_id(0)
    row, runs = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1)
    width = small(table, row, SECOND_WIDTH)
    height = small(table, row, NUMEL) // width
    beside, above = tl.cdiv(width, COLS), tl.cdiv(height, PANEL)
    sums = scratch + field(table, row, SQUARES)
    for first in range(0, height, LENGTH):
        updated(field(table, row, SECOND), sums, height, beside, width, first, beta2, rest2, LENGTH)
    sums += beside.to(tl.int64) * height
    total = tl.zeros((LENGTH,), tl.float64)
    for first in range(0, width, LENGTH):
        new = updated(field(table, row, SECOND_SCALE), sums, width, above, height, first, beta2, rest2, LENGTH)
        total += new.to(tl.float64)
    mean = at_least((tl.sum(total, axis=0) / width).to(tl.float32), _SMALLEST)
    for run in range(runs):
        tl.store(numbers + (row + run) * WIDE + MEAN, mean)
