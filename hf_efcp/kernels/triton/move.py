"""From coefficients to parameters, of a whole model in one launch: `theta <- keep theta - lr D^-1/2 G^T c`."""

from __future__ import annotations

import triton
import triton.language as tl

from .error import load_factor
from .shared import (
    HEIGHT,
    HELD,
    KEEP,
    LEFT,
    LR,
    MOMENTUM,
    NUMEL,
    RIGHT,
    THETA,
    THETA_CODE,
    UNIT,
    VALUES,
    VELOCITY,
    dense_vector,
    field,
    floats,
    into_metric,
    load_vector,
    number,
    small,
    store_vector,
    width_of,
)


@triton.jit
def apply(table, numbers, row, position, inside, update, eps, METRIC: tl.constexpr):
    """`v <- momentum v + D^-1/2 u`, `theta <- keep theta - lr v`."""
    u = into_metric(table, numbers, row, position, inside, update, eps, METRIC)
    velocity = field(table, row, VELOCITY)
    if velocity != 0:
        v = tl.load(floats(velocity) + position, mask=inside, other=0.0)
        u = number(numbers, row, MOMENTUM) * v + u
        tl.store(floats(velocity) + position, u, mask=inside)
    address, code = field(table, row, THETA), field(table, row, THETA_CODE)
    theta = load_vector(address, code, position, inside) * number(numbers, row, KEEP)
    store_vector(address, code, position, inside, theta - number(numbers, row, LR) * u)


@triton.jit
def finish(
    table,
    numbers,
    row,
    position,
    inside,
    update,
    eps,
    OUTSIDE: tl.constexpr,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
):
    """Add the dense vector, if it is wanted, and apply. Called where positions are made: Triton sees runs there."""
    if OUTSIDE:
        update += dense_vector(table, numbers, row, position, inside, eps, MOMENT, METRIC, COUPLED)
    apply(table, numbers, row, position, inside, update, eps, METRIC)


@triton.jit
def move(
    table,
    numbers,
    tasks,
    coefficients,
    capacity,
    eps,
    RANK: tl.constexpr,
    VALUES_IN: tl.constexpr,
    OUTSIDE: tl.constexpr,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of a matrix, or a range of a tensor that is kept whole. Sums over rows are float32.

    `OUTSIDE` adds the dense vector that is preconditioned: `u = x + G^T c`.

    A coefficient may be beyond float32 where its row is tiny; it goes with the row, in float64, before anything else.
    """
    task = tl.program_id(0)
    row = tl.load(tasks + 3 * task)
    top = tl.load(tasks + 3 * task + 1).to(tl.int32)
    begin = tl.multiple_of(tl.load(tasks + 3 * task + 2).to(tl.int32), COLS)
    held, left = small(table, row, HELD), field(table, row, LEFT)
    c_of = coefficients + field(table, row, UNIT) * capacity
    r, c = tl.arange(0, ROWS), begin + tl.arange(0, COLS)
    update = tl.zeros((ROWS, COLS), tl.float32)
    if left == 0:
        numel, values = small(table, row, NUMEL), field(table, row, VALUES)
        position = r[:, None] * COLS + c[None, :]
        inside = position < numel
        for i in range(0, held):
            weight = tl.load(c_of + i)
            x = load_factor(values, i * field(table, row, NUMEL), position, inside, VALUES_IN).to(tl.float64)
            update += (weight * x).to(tl.float32)
        finish(table, numbers, row, position, inside, update, eps, OUTSIDE, MOMENT, METRIC, COUPLED)
    else:
        height, width, right = small(table, row, HEIGHT), width_of(table, row, EVEN), field(table, row, RIGHT)
        r = top + r
        position = r[:, None] * width + c[None, :]
        inside = (r < height)[:, None] & (c < width)[None, :]
        for first in range(0, held * RANK, INNER):
            k = tl.arange(0, INNER)
            real = k < held * RANK - first
            above, beside = first * field(table, row, HEIGHT), first * width.to(tl.int64)
            p = load_factor(
                left, above, k[None, :] * height + r[:, None], real[None, :] & (r < height)[:, None], VALUES_IN
            )
            q = load_factor(
                right, beside, k[:, None] * width + c[None, :], real[:, None] & (c < width)[None, :], VALUES_IN
            )
            weight = tl.load(c_of + (first + k) // RANK, mask=real, other=0.0)
            q = (weight[:, None] * q.to(tl.float64)).to(tl.float32)
            update = tl.dot(p, q, update, input_precision=PRECISION)
        finish(table, numbers, row, position, inside, update, eps, OUTSIDE, MOMENT, METRIC, COUPLED)
