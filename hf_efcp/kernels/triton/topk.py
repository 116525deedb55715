"""Top-k of every block of a model in one launch: accumulate, select, write the row, keep the error."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    _LARGEST,
    _SMALLEST,
    BEGIN,
    BFLOAT16,
    BLOCKS,
    ENTRIES,
    ERROR,
    ERROR_KEY,
    ERROR_SCALE,
    FLOAT32,
    HEIGHT,
    INDICES,
    INT8,
    KEPT,
    NEWEST,
    NUMEL,
    SCALE_STRIDE,
    SCALES,
    STRIDE,
    VALUES,
    WIDTH,
    accumulator,
    at_least,
    at_most,
    bytes_inside,
    field,
    floats_inside,
    halves_inside,
    nearest,
    small,
    store_buckets,
    widened,
)


@triton.jit
def select(
    table,
    numbers,
    tasks,
    eps,
    VALUES_IN: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    STORED: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    SHARE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """A group of blocks that share a scale. `LENGTH` is a power of two, at least the blocks' own length.

    A threshold is found bit by bit, until as many entries as are kept are not below it; among entries that equal it
    the lowest indices are kept.
    """
    task = tl.program_id(0)
    row, group = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1).to(tl.int32)
    length, blocks, kept = small(table, row, WIDTH), small(table, row, BLOCKS), small(table, row, KEPT)
    share = small(table, row, HEIGHT)  # blocks of a group
    b, c = group * share + tl.arange(0, SHARE), tl.arange(0, LENGTH)
    real = (tl.arange(0, SHARE) < share) & (b < blocks)
    inside = real[:, None] & (c < length)[None, :]
    position = small(table, row, BEGIN) + b[:, None] * length + c[None, :]
    a = accumulator(table, numbers, row, position, inside, eps, STORED, METRIC, COUPLED)
    a = at_most(at_least(a, -_LARGEST), _LARGEST)
    keys = tl.where(inside, tl.abs(a).to(tl.int32, bitcast=True), -1)
    threshold = tl.zeros((SHARE,), tl.int32)
    count = tl.sum(inside.to(tl.int32), axis=1)  # of entries that are not below the threshold
    bit = 30
    while (bit >= 0) & (tl.max((real & (count > kept)).to(tl.int32), axis=0) > 0):
        candidate = threshold | (1 << bit)
        found = tl.sum((keys >= candidate[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(found >= kept, candidate, threshold)
        count = tl.where(found >= kept, found, count)
        bit -= 1
    above = keys > threshold[:, None]
    equal = keys == threshold[:, None]
    missing = kept - tl.sum(above.to(tl.int32), axis=1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= missing[:, None]))
    order = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    place = b.to(tl.int64)[:, None] * field(table, row, STRIDE) + (field(table, row, NEWEST) * kept + order)
    values = field(table, row, VALUES)
    if VALUES_IN == FLOAT32:
        taken = a
        tl.store(floats_inside(values) + place, a, mask=chosen)
    elif VALUES_IN == BFLOAT16:
        bits = nearest(a)
        taken = widened(bits)
        tl.store(halves_inside(values) + place, bits, mask=chosen)
    else:
        largest = tl.max(tl.max(keys, axis=1), axis=0).to(tl.float32, bitcast=True)
        unit = at_least(tl.div_rn(largest, 127.0), _SMALLEST)
        bits = ((unit.to(tl.int32, bitcast=True) + 0xFFFF) >> 16).to(tl.int16)  # rounded up
        unit = widened(bits)
        quotient = tl.div_rn(a, tl.broadcast_to(unit, a.shape))
        # To nearest, ties to even: adding and taking away 1.5 2^23 leaves no bits behind the point.
        level = (quotient + 12582912.0) - 12582912.0
        taken = level * unit
        tl.store(bytes_inside(values) + place, level.to(tl.int8), mask=chosen)
        scale = halves_inside(field(table, row, SCALES)) + group * field(table, row, SCALE_STRIDE)
        tl.store(scale + field(table, row, NEWEST), bits)
    indices = field(table, row, INDICES)
    if WIDE_INDEX:
        tl.store(halves_inside(indices) + place, tl.broadcast_to(c[None, :], place.shape).to(tl.int16), mask=chosen)
    else:
        tl.store(bytes_inside(indices) + place, tl.broadcast_to(c[None, :], place.shape).to(tl.int8), mask=chosen)
    a = tl.where(chosen, a - taken, a)
    tl.debug_barrier()  # scales are overwritten that other threads of the program read
    address, scale, key = field(table, row, ERROR), field(table, row, ERROR_SCALE), field(table, row, ERROR_KEY)
    if (STORED == FLOAT32) | (STORED == BFLOAT16):
        store_buckets(address, scale, b, position, inside, 0, key, a, STORED, SHARE)
    else:
        # Blocks are whole buckets, but for the end of the tail.
        ROWS: tl.constexpr = SHARE * LENGTH // ENTRIES
        a = tl.reshape(tl.where(inside, a, 0.0), (ROWS, ENTRIES))
        position = tl.reshape(position, (ROWS, ENTRIES))
        inside = tl.reshape(inside, (ROWS, ENTRIES)).to(tl.int1)
        numel = small(table, row, NUMEL)
        # A row of the tile without entries is put behind the end, where nothing is stored: not further, for the number
        # of its first entry has to be an int32.
        bucket = tl.max(tl.where(inside, position // ENTRIES, -1), axis=1)
        bucket = tl.where(bucket < 0, tl.cdiv(numel, ENTRIES), bucket)
        store_buckets(address, scale, bucket, position, inside, numel, key, a, STORED, ROWS)


@triton.jit
def load_index(address, place, inside, WIDE_INDEX: tl.constexpr):
    """Indices of entries inside their blocks."""
    if WIDE_INDEX:
        index = tl.load(halves_inside(address) + place, mask=inside, other=0).to(tl.int32) & 0xFFFF
    else:
        index = tl.load(bytes_inside(address) + place, mask=inside, other=0).to(tl.int32) & 0xFF
    return index


@triton.jit
def load_value(address, place, inside, unit, VALUES_IN: tl.constexpr):
    """Values of entries, float64; `unit` is the scale of levels."""
    if VALUES_IN == FLOAT32:
        x = tl.load(floats_inside(address) + place, mask=inside, other=0.0).to(tl.float64)
    elif VALUES_IN == BFLOAT16:
        x = widened(tl.load(halves_inside(address) + place, mask=inside, other=0)).to(tl.float64)
    else:
        x = tl.load(bytes_inside(address) + place, mask=inside, other=0).to(tl.float64) * unit
    return x


@triton.jit
def scale_of(table, row, block, i, VALUES_IN: tl.constexpr):
    """The scale of rows in a block, float64; 1 where values are no levels."""
    unit = tl.full((), 1.0, tl.float64)
    if VALUES_IN == INT8:
        place = block // field(table, row, HEIGHT) * field(table, row, SCALE_STRIDE) + i
        unit = widened(tl.load(halves_inside(field(table, row, SCALES)) + place)).to(tl.float64)
    return unit
