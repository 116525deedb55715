"""What is made of sparse windows, a whole model in a launch: inner products, and the way to the parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from .move import apply
from .shared import BEGIN, HELD, INDICES, KEPT, NEWEST, STRIDE, UNIT, VALUES, WIDTH, dense_vector, field
from .topk import load_index, load_value, scale_of


@triton.jit
def sparse_products(
    table,
    numbers,
    tasks,
    partial,
    outside,
    capacity,
    eps,
    VALUES_IN: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    OUTSIDE: tl.constexpr,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    STEPS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """`<row_newest, row_i>` in some blocks, and `<z, row_i>` of a dense vector, `(tasks, capacity)` float64 each.

    The indices of a row ascend. Every entry of row `i` is looked up among those of the newest by bisection, in `STEPS`
    steps. The vector is made where the row has entries.
    """
    task, i = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, first, last = tl.load(tasks + 3 * task), tl.load(tasks + 3 * task + 1), tl.load(tasks + 3 * task + 2)
    kept, stride, newest = field(table, row, KEPT), field(table, row, STRIDE), field(table, row, NEWEST)
    indices, values = field(table, row, INDICES), field(table, row, VALUES)
    total, other = tl.zeros((LENGTH,), tl.float64), tl.zeros((LENGTH,), tl.float64)
    if i < field(table, row, HELD):
        for block in range(first, last):
            mine, new = block * stride + i * kept, block * stride + newest * kept
            start = (field(table, row, BEGIN) + block * field(table, row, WIDTH)).to(tl.int32)
            unit, new_unit = scale_of(table, row, block, i, VALUES_IN), scale_of(table, row, block, newest, VALUES_IN)
            for begin in range(0, kept, LENGTH):
                place = begin + tl.arange(0, LENGTH)
                inside = place < kept
                index = load_index(indices, mine + place, inside, WIDE_INDEX)
                x = load_value(values, mine + place, inside, unit, VALUES_IN)
                low = tl.zeros((LENGTH,), tl.int64)
                high = low + kept
                for _ in range(STEPS):  # the first entry of the newest that is not below
                    middle = (low + high) // 2
                    below = load_index(indices, new + tl.minimum(middle, kept - 1), inside, WIDE_INDEX) < index
                    searches = low < high
                    low = tl.where(searches & below, middle + 1, low)
                    high = tl.where(searches & (below == 0), middle, high)
                found = tl.minimum(low, kept - 1)
                same = inside & (low < kept) & (load_index(indices, new + found, inside, WIDE_INDEX) == index)
                y = load_value(values, new + found, same, new_unit, VALUES_IN)
                total += tl.where(same, x * y, 0.0)
                if OUTSIDE:
                    z = dense_vector(table, numbers, row, start + index, inside, eps, MOMENT, METRIC, COUPLED)
                    other += z.to(tl.float64) * x
    tl.store(partial + task * capacity + i, tl.sum(total, axis=0))
    if OUTSIDE:
        tl.store(outside + task * capacity + i, tl.sum(other, axis=0))


@triton.jit
def added_up(bounds, partial, found, capacity, i, unit, PARTS: tl.constexpr, LENGTH: tl.constexpr):
    """Add the tasks of a unit in their order, for one row of the window; `PARTS` lie side by side."""
    first, last = tl.load(bounds + unit), tl.load(bounds + unit + 1)
    total = tl.zeros((LENGTH,), tl.float64)
    for begin in range(first, last, LENGTH):
        place = begin + tl.arange(0, LENGTH)
        for part in range(PARTS):
            total += tl.load(partial + (place * capacity + i) * PARTS + part, mask=place < last, other=0.0)
    tl.store(found + unit * capacity + i, tl.sum(total, axis=0))


@triton.jit
def add_up(
    bounds,
    partial,
    columns,
    outside_bounds,
    outside,
    products,
    capacity,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """`(units, capacity)` columns, and in as many programs again, if there are, products of dense vectors."""
    i, unit = tl.program_id(0), tl.program_id(1)  # the second is limited to 65,535
    if i < capacity:
        added_up(bounds, partial, columns, capacity, i, unit, 1, LENGTH)
    else:
        added_up(outside_bounds, outside, products, capacity, i - capacity, unit, PARTS, LENGTH)


@triton.jit
def sparse_move(
    table,
    numbers,
    tasks,
    count,
    programs,
    sums,
    coefficients,
    capacity,
    eps,
    VALUES_IN: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    OUTSIDE: tl.constexpr,
    MOMENT: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    LENGTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`theta <- keep theta - lr D^-1/2 G^T c` in every block, row after row, so that no two threads add to one entry.

    Sums are float64, in memory of each program's own.
    """
    program = tl.program_id(0).to(tl.int64)
    own = sums + program * LENGTH
    for task in range(program, count, programs):
        row, block = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1)
        length, kept, stride = field(table, row, WIDTH), field(table, row, KEPT), field(table, row, STRIDE)
        indices, values = field(table, row, INDICES), field(table, row, VALUES)
        c_of = coefficients + field(table, row, UNIT) * capacity
        for begin in range(0, length, CHUNK):
            tl.store(own + begin + tl.arange(0, CHUNK), tl.zeros((CHUNK,), tl.float64))
        tl.debug_barrier()
        for i in range(0, field(table, row, HELD)):
            weight = tl.load(c_of + i) * scale_of(table, row, block, i, VALUES_IN)
            for begin in range(0, kept, CHUNK):
                place = begin + tl.arange(0, CHUNK)
                inside = place < kept
                at = block * stride + i * kept + place
                index = load_index(indices, at, inside, WIDE_INDEX)
                x = load_value(values, at, inside, 1.0, VALUES_IN)
                # Only entries that are not zero: a row of zeros has the same index everywhere.
                inside &= x != 0.0
                before = tl.load(own + index, mask=inside, other=0.0)
                tl.store(own + index, before + weight * x, mask=inside)
            tl.debug_barrier()
        start = field(table, row, BEGIN) + block * length
        for begin in range(0, length, CHUNK):
            c = begin + tl.arange(0, CHUNK)
            inside = c < length
            update = tl.load(own + c, mask=inside, other=0.0).to(tl.float32)
            if OUTSIDE:
                update += dense_vector(table, numbers, row, start + c, inside, eps, MOMENT, METRIC, COUPLED)
            apply(table, numbers, row, start + c, inside, update, eps, METRIC)
        tl.debug_barrier()
