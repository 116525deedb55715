"""AdamW's moments of a whole model in one launch: `v <- beta2 v + (1 - beta2) g^2`, `m <- m + (1 - beta1) (g - m)`."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    _FLOAT32_MAX,
    ENTRIES,
    FACTORED,
    FIRST,
    FIRST_KEY,
    INT8,
    NONE,
    NUMEL,
    SECOND,
    SECOND_KEY,
    SECOND_SCALE,
    SECOND_WIDTH,
    at_most,
    buckets_of,
    field,
    gradient_of,
    load_stored,
    small,
    store_buckets,
)


@triton.jit
def observe(
    table,
    numbers,
    tasks,
    before,
    beta2,
    rest2,
    rest1,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some buckets of a tensor; `rest2` is `1 - beta2`, `rest1` `1 - beta1`. Levels are those of the root of `v`.

    The programs `before` those of the tasks do something else.
    """
    row, first, bucket, position = buckets_of(tasks, tl.program_id(0) - before, ROWS)
    numel = small(table, row, NUMEL)
    if (first + ROWS) * ENTRIES <= numel:  # without a mask, several entries are read at a time
        inside = tl.full((ROWS, ENTRIES), True, tl.int1)
        observe_buckets(
            table, numbers, row, bucket, position, inside, beta2, rest2, rest1, MOMENT, METRIC, COUPLED, ROWS
        )
    else:
        inside = position < numel
        observe_buckets(
            table, numbers, row, bucket, position, inside, beta2, rest2, rest1, MOMENT, METRIC, COUPLED, ROWS
        )


@triton.jit
def observe_buckets(
    table,
    numbers,
    row,
    bucket,
    position,
    inside,
    beta2,
    rest2,
    rest1,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The moments of some buckets."""
    g = gradient_of(table, numbers, row, position, inside, COUPLED)
    if METRIC < FACTORED:
        observe_second(table, row, bucket, position, inside, g, beta2, rest2, METRIC, ROWS)
    elif field(table, row, SECOND_WIDTH) == 0:
        observe_second(table, row, bucket, position, inside, g, beta2, rest2, METRIC - FACTORED, ROWS)
    if MOMENT != NONE:
        first = field(table, row, FIRST)
        m = load_stored(first, 0, position, inside, MOMENT)
        key, numel = field(table, row, FIRST_KEY), small(table, row, NUMEL)
        store_buckets(first, 0, bucket, position, inside, numel, key, m + rest1 * (g - m), MOMENT, ROWS)


@triton.jit
def observe_second(table, row, bucket, position, inside, g, beta2, rest2, METRIC: tl.constexpr, ROWS: tl.constexpr):
    """The second moment of every entry."""
    address, scale, key = field(table, row, SECOND), field(table, row, SECOND_SCALE), field(table, row, SECOND_KEY)
    v = load_stored(address, scale, position, inside, METRIC)
    if METRIC == INT8:
        v = v * v
    v = at_most(v * beta2 + g * g * rest2, _FLOAT32_MAX)
    if METRIC == INT8:
        v = tl.sqrt_rn(v)
    tl.debug_barrier()  # scales are overwritten that other threads of the program read
    store_buckets(address, scale, bucket, position, inside, small(table, row, NUMEL), key, v, METRIC, ROWS)
