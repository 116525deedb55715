"""Inner products of a dense vector with all low-rank rows, and of the newest row, of a whole model in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import dot
from .error import load_factor
from .shared import (
    HEIGHT,
    HELD,
    LEFT,
    NUMEL,
    RIGHT,
    VALUES,
    WIDTH,
    dense_vector,
    field,
    small,
)


@triton.jit
def dots_and_outside(
    table,
    numbers,
    tasks,
    count,
    partial,
    columns,
    capacity,
    eps,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    VALUES_IN: tl.constexpr,
    LENGTH: tl.constexpr,
    WHOLE: tl.constexpr,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Products of a dense vector in `count` tasks, and what `columns.dots` does in those that are left."""
    task = tl.program_id(0)
    if task < count:
        outside_low_rank(
            table,
            numbers,
            tasks,
            task,
            partial,
            capacity,
            eps,
            RANK,
            VALUES_IN,
            MOMENT,
            METRIC,
            COUPLED,
            ROWS,
            COLS,
            INNER,
            PANEL,
        )
    else:
        dot(table, columns, capacity, task - count, RANK, PADDED, VALUES_IN, LENGTH, WHOLE)


@triton.jit
def outside_low_rank(
    table,
    numbers,
    tasks,
    task,
    partial,
    capacity,
    eps,
    RANK: tl.constexpr,
    VALUES_IN: tl.constexpr,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    PANEL: tl.constexpr,
):
    """`<P Q^T, X> = sum((P^T X) * Q^T)` over tiles below each other, `(tasks, capacity, rank)` float64.

    Of a tensor that is kept whole, a tile is a range, and the products stand for the first vector.
    """
    row = tl.load(tasks + 3 * task)
    top, begin = tl.load(tasks + 3 * task + 1).to(tl.int32), tl.load(tasks + 3 * task + 2).to(tl.int32)
    held, left, numel = small(table, row, HELD), field(table, row, LEFT), small(table, row, NUMEL)
    height, width, right = small(table, row, HEIGHT), small(table, row, WIDTH), field(table, row, RIGHT)
    out = partial + task.to(tl.int64) * capacity * RANK
    c = begin + tl.arange(0, COLS)
    below = tl.where(left == 0, (numel - begin + COLS - 1) // COLS, height - top)
    for under in range(0, tl.minimum(below, PANEL), ROWS):
        r = top + under + tl.arange(0, ROWS)
        if left == 0:
            position = r[:, None] * COLS + c[None, :]
            inside = position < numel
        else:
            position = r[:, None] * width + c[None, :]
            inside = (r < height)[:, None] & (c < width)[None, :]
        x = dense_vector(table, numbers, row, position, inside, eps, MOMENT, METRIC, COUPLED)
        if left == 0:
            for i in range(0, held):
                begins = i * field(table, row, NUMEL)
                y = load_factor(field(table, row, VALUES), begins, position, inside, VALUES_IN)
                place = out + i * RANK
                tl.store(place, tl.load(place) + tl.sum(tl.sum((x * y).to(tl.float64), axis=1), axis=0))
        else:
            for first in range(0, held * RANK, INNER):
                k = tl.arange(0, INNER)
                real = k < held * RANK - first
                above, beside = first * field(table, row, HEIGHT), first * field(table, row, WIDTH)
                read = real[:, None] & (r < height)[None, :]
                p = load_factor(left, above, k[:, None] * height + r[None, :], read, VALUES_IN)
                read = real[:, None] & (c < width)[None, :]
                q = load_factor(right, beside, k[:, None] * width + c[None, :], read, VALUES_IN)
                image = tl.dot(p, x, input_precision="ieee")
                place = out + first + k
                before = tl.load(place, mask=real, other=0.0)
                tl.store(place, before + tl.sum((image * q).to(tl.float64), axis=1), mask=real)
        tl.debug_barrier()  # what was added is read again below
