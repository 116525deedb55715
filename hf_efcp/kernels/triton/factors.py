"""The second half of a power iteration of every matrix of a model: `A^T P`, and both factors into the window."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    BFLOAT16,
    HEIGHT,
    IMAGE,
    LEFT,
    NEWEST,
    PARTIAL,
    RIGHT,
    SPLITS,
    START,
    WIDTH,
    accumulator,
    field,
    floats,
    halves,
    nearest,
    small,
    width_of,
)


@triton.jit
def project(
    table,
    numbers,
    tasks,
    scratch,
    eps,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    STORED: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Some columns of `P^T A` over `SPLIT` rows of `A`: `(splits, rank, width)` in the scratch memory."""
    task = tl.program_id(0)
    row = tl.load(tasks + 3 * task)
    split = tl.load(tasks + 3 * task + 1).to(tl.int32)
    left = tl.multiple_of(tl.load(tasks + 3 * task + 2).to(tl.int32), COLS)
    height, width = small(table, row, HEIGHT), width_of(table, row, EVEN)
    basis = scratch + field(table, row, IMAGE)
    c, k = left + tl.arange(0, COLS), tl.arange(0, PADDED)
    total = tl.zeros((PADDED, COLS), tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, height), ROWS):
        r = first + tl.arange(0, ROWS)
        inside = (r < height)[:, None] & (c < width)[None, :]
        a = accumulator(table, numbers, row, r[:, None] * width + c[None, :], inside, eps, STORED, METRIC, COUPLED)
        p = tl.load(
            basis + k[:, None] * height + r[None, :], mask=(k < RANK)[:, None] & (r < height)[None, :], other=0.0
        )
        total = tl.dot(p, a, total, input_precision=PRECISION)
    place = scratch + field(table, row, PARTIAL) + (split * RANK + k[:, None]) * width + c[None, :]
    tl.store(place, total, mask=(k < RANK)[:, None] & (c < width)[None, :])


@triton.jit
def store_factor(address, begin, place, inside, x, VALUES_IN: tl.constexpr):
    """A part of a factor in float32 or bfloat16; only `begin`, a number, may be beyond 32 bits."""
    if VALUES_IN == BFLOAT16:
        tl.store(halves(address) + begin + place, nearest(x), mask=inside)
    else:
        tl.store(floats(address) + begin + place, x, mask=inside)


@triton.jit
def keep_factors(table, tasks, scratch, RANK: tl.constexpr, VALUES_IN: tl.constexpr, LENGTH: tl.constexpr):
    """One vector of each factor into the newest row; it is where the next iteration starts, unless it is zero."""
    task = tl.program_id(0)
    row, k = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1)
    height, width = small(table, row, HEIGHT), small(table, row, WIDTH)
    number, splits = field(table, row, NEWEST) * RANK + k, field(table, row, SPLITS)
    partial = scratch + field(table, row, PARTIAL)
    largest = tl.zeros((LENGTH,), tl.float32)
    for first in range(0, width, LENGTH):
        c = first + tl.arange(0, LENGTH)
        inside = c < width
        total = tl.zeros((LENGTH,), tl.float32)
        for split in range(0, splits):
            total += tl.load(partial + (split * RANK + k) * width + c, mask=inside, other=0.0)
        tl.store(partial + k * width + c, total, mask=inside)
        store_factor(field(table, row, RIGHT), number * width, c, inside, total, VALUES_IN)
        largest = tl.maximum(largest, tl.abs(total))
    changes = tl.where(tl.max(largest, axis=0) > 0.0, width, 0)
    tl.debug_barrier()  # every thread sees the sums
    start = floats(field(table, row, START)) + k * width
    for first in range(0, width, LENGTH):
        c = first + tl.arange(0, LENGTH)
        total = tl.load(partial + k * width + c, mask=c < width, other=0.0)
        tl.store(start + c, total, mask=c < changes)
    basis = scratch + field(table, row, IMAGE) + k * height
    for first in range(0, height, LENGTH):
        r = first + tl.arange(0, LENGTH)
        p = tl.load(basis + r, mask=r < height, other=0.0)
        store_factor(field(table, row, LEFT), number * height, r, r < height, p, VALUES_IN)
