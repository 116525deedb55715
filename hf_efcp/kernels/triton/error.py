"""The error that low-rank compression leaves, a whole model in a launch: `e <- A - P Q^T`, rounded as it is kept."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    BFLOAT16,
    ENTRIES,
    ERROR,
    ERROR_KEY,
    ERROR_SCALE,
    HEIGHT,
    LEFT,
    NEWEST,
    NUMEL,
    RIGHT,
    VALUES,
    accumulator,
    buckets_of,
    field,
    floats,
    halves,
    nearest,
    small,
    store_buckets,
    widened,
    width_of,
)


@triton.jit
def load_factor(address, begin, place, inside, VALUES_IN: tl.constexpr):
    """A part of a factor, or of a row that is kept whole, as float32; only `begin` may be beyond 32 bits."""
    if VALUES_IN == BFLOAT16:
        x = widened(tl.load(halves(address) + begin + place, mask=inside, other=0))
    else:
        x = tl.load(floats(address) + begin + place, mask=inside, other=0.0)
    return x


@triton.jit
def keep_error(
    table,
    numbers,
    tasks,
    eps,
    RANK: tl.constexpr,
    VALUES_IN: tl.constexpr,
    STORED: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some buckets of a tensor. The row of one that is kept whole is written here as well."""
    row, first, bucket, position = buckets_of(tasks, tl.program_id(0), ROWS)
    numel = small(table, row, NUMEL)
    if (first + ROWS) * ENTRIES <= numel:  # without a mask, several entries are read at a time
        inside = tl.full((ROWS, ENTRIES), True, tl.int1)
        keep_buckets(
            table, numbers, row, bucket, position, inside, eps, RANK, VALUES_IN, STORED, METRIC, COUPLED, EVEN, ROWS
        )
    else:
        inside = position < numel
        keep_buckets(
            table, numbers, row, bucket, position, inside, eps, RANK, VALUES_IN, STORED, METRIC, COUPLED, EVEN, ROWS
        )


@triton.jit
def keep_buckets(
    table,
    numbers,
    row,
    bucket,
    position,
    inside,
    eps,
    RANK: tl.constexpr,
    VALUES_IN: tl.constexpr,
    STORED: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The error, or the row, in some buckets."""
    numel, newest = small(table, row, NUMEL), field(table, row, NEWEST)
    a = accumulator(table, numbers, row, position, inside, eps, STORED, METRIC, COUPLED)
    left, right, values = field(table, row, LEFT), field(table, row, RIGHT), field(table, row, VALUES)
    if left == 0:
        if VALUES_IN == BFLOAT16:
            bits = nearest(a)
            tl.store(halves(values) + newest * numel + position, bits, mask=inside)
            a -= widened(bits)
        else:
            tl.store(floats(values) + newest * numel + position, a, mask=inside)
            a -= a
    else:
        height, width = small(table, row, HEIGHT), width_of(table, row, EVEN)
        if EVEN:  # a bucket is in one row of the matrix
            r = (bucket * ENTRIES // width)[:, None]
            in_row = r < height
            c = tl.multiple_of((bucket * ENTRIES % width)[:, None], [ENTRIES, 1]) + tl.arange(0, ENTRIES)[None, :]
        else:
            r, c = position // width, position % width
            in_row = inside
        for k in range(RANK):
            p = load_factor(left, (newest * RANK + k) * height, r, in_row, VALUES_IN)
            q = load_factor(right, (newest * RANK + k) * width, c, inside, VALUES_IN)
            a -= p * q
    tl.debug_barrier()  # scales are overwritten that other threads of the program read
    store_buckets(
        field(table, row, ERROR),
        field(table, row, ERROR_SCALE),
        bucket,
        position,
        inside,
        numel,
        field(table, row, ERROR_KEY),
        a,
        STORED,
        ROWS,
    )
