"""AdamW's second moment of a whole model in one launch: `v <- beta2 v + (1 - beta2) g^2`."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    _FLOAT32_MAX,
    ENTRIES,
    INT8,
    NUMEL,
    SECOND,
    SECOND_KEY,
    SECOND_SCALE,
    field,
    gradient_of,
    load_stored,
    small,
    store_buckets,
)


@triton.jit
def observe(table, numbers, tasks, beta2, rest, METRIC: tl.constexpr, COUPLED: tl.constexpr, ROWS: tl.constexpr):
    """Some buckets of a tensor; `rest` is `1 - beta2`. Levels are those of the root."""
    task = tl.program_id(0)
    row, first = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1).to(tl.int32)
    numel = small(table, row, NUMEL)
    bucket = first + tl.arange(0, ROWS)
    position = bucket[:, None] * ENTRIES + tl.arange(0, ENTRIES)[None, :]
    inside = position < numel
    address, scale, key = field(table, row, SECOND), field(table, row, SECOND_SCALE), field(table, row, SECOND_KEY)
    g = gradient_of(table, numbers, row, position, inside, COUPLED)
    v = load_stored(address, scale, position, inside, METRIC)
    if METRIC == INT8:
        v = v * v
    v = tl.minimum(v * beta2 + g * g * rest, _FLOAT32_MAX)
    if METRIC == INT8:
        v = tl.sqrt_rn(v)
    tl.debug_barrier()  # scales are overwritten that other threads of the program read
    store_buckets(address, scale, bucket, position, inside, numel, key, v, METRIC, ROWS)
