"""Inner products of a window's rows with a row of its own, and with a dense vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload

from ...blocks import Part, sharing
from .. import pool
from . import tables
from .arrays import (
    LONG,
    WIDTH,
    array_of,
    empty_like,
    flat_rows,
    longest,
    longest_short,
    of_short,
    task_size,
    tasks_of,
    weigh,
    window_of,
)
from .compiling import inner, inner_in_order, jit
from .scalars import ONE, ZERO, decode, next_task
from .vectors import COMPARED, ask, can_look_up, find, multiply_eights, product_of_eights

_PARTIAL = 1 << 20  # partial sums that exist at a time, if one part does not need more
_LOOKED_UP = 4096  # entries of a block, at most, whose bits fit the registers
_SPARSE = 16  # entries of a block for each that is kept, at least, where looking up pays
_CHUNKS = np.uint64(32)  # vectors of indices that are looked up before what was found is added
_SHIFT, _SPAN = np.uint64(40), np.uint64(1 << 40)  # see `_add_found`


@inner_in_order
def _add_products(index, value, kept, dense, weights, rows, partial):
    """Add the inner products of one dense block with its long rows, times the rows' weights, to `partial`."""
    groups = kept // WIDTH
    row = ZERO
    while row < rows:
        j = row * kept
        total: Any = product_of_eights(index, value, j, groups, dense)
        stop = j + kept
        j += groups * WIDTH
        while j < stop:
            total += np.float64(decode(value[j])) * np.float64(dense[index[j]])
            j += ONE
        partial[row] += weights[row] * total
        row += ONE


@inner_in_order
def _multiply(index, value, dense, sums):
    """Add the products of one dense block with the entries of its short rows, one by one, to `sums`."""
    count = np.uint64(sums.shape[0])
    groups = count // WIDTH
    multiply_eights(index, value, groups, dense, sums)
    j = groups * WIDTH
    while j < count:
        sums[j] += np.float64(decode(value[j])) * np.float64(dense[index[j]])
        j += ONE


@inner
def _collect(sums, kept, weights, rows, partial):
    """Add what `_multiply` has summed, row by row and times the rows' weights, to `partial`, and forget it."""
    if not len(sums):  # long rows
        return
    j = ZERO
    for row in range(rows):
        total = 0.0
        for _ in range(kept):
            total += sums[j]
            j += ONE
        partial[row] += weights[row] * total
    sums[:] = 0.0


@inner_in_order
def _add_hits(index, value, reciprocal, dense, found, start, count, weights, partial):
    for hit in range(count):
        j = start + np.uint64(found[hit])
        row = (j * reciprocal) >> _SHIFT
        partial[row] += weights[row] * (np.float64(decode(value[j])) * np.float64(dense[index[j]]))


@inner_in_order
def _add_found(index, value, kept, dense, bits, found, weights, rows, partial):
    """As `_add_products`, for a dense block whose few entries have their bits set: most of a window meets none.

    Half of the window is read, and values only where there is something to multiply: they come while the next indices
    are looked up.
    """
    # The row of entry j is j // kept. A product with this, shifted, is that while there are less than 2^24 rows: their
    # entries are at most 256.
    reciprocal = _SPAN // kept + ONE
    j, last, total = ZERO, ZERO, rows * kept
    waiting, side = ZERO, 0
    while j + COMPARED <= total:
        groups = min(_CHUNKS, (total - j) // COMPARED)
        count: Any = find(index, j, groups, bits, found[side])
        for hit in range(count):
            ask(value, j + np.uint64(found[side, hit]))
        side = 1 - side
        _add_hits(index, value, reciprocal, dense, found[side], last, waiting, weights, partial)
        last, waiting = j, count
        j += groups * COMPARED
    _add_hits(index, value, reciprocal, dense, found[1 - side], last, waiting, weights, partial)
    rest = total - j  # less than a vector
    for hit in range(rest):
        found[0, hit] = hit
    _add_hits(index, value, reciprocal, dense, found[0], j, rest, weights, partial)


_WITH_BITS = (types.uint8, types.uint16) if can_look_up() else ()  # indices that `find` takes here


def _looks_up(indices, length, kept):
    """Whether the entries of a dense block are found by their bits."""
    raise NotImplementedError("compiled code only")


@overload(_looks_up)
def _looks_up_overload(indices, length, kept):
    if indices.dtype in _WITH_BITS:
        return lambda indices, length, kept: length <= _LOOKED_UP and kept * _SPARSE <= length
    return lambda indices, length, kept: False


def _add_met(index, value, kept, dense, bits, found, weights, rows, partial):
    """`_add_found`, where `_looks_up`."""
    raise NotImplementedError("compiled code only")


@overload(_add_met)
def _add_met_overload(index, value, kept, dense, bits, found, weights, rows, partial):
    if index.dtype in _WITH_BITS:
        return lambda index, value, kept, dense, bits, found, weights, rows, partial: _add_found(
            index, value, kept, dense, bits, found, weights, rows, partial
        )
    return lambda index, value, kept, dense, bits, found, weights, rows, partial: None


@inner
def _dots(indices, values, scales, share, kept, newest, rows, length, begin, end, partial, room):
    dense, bits, found, weights, short = room
    looks_up = _looks_up(indices, length, kept)
    sums = of_short(short, LONG if looks_up else kept, rows)
    own = range(newest * kept, (newest + 1) * kept)
    for block in range(begin, end):
        if scales is not None and block % share == 0:
            _collect(sums, kept, weights, rows, partial)
            scale = scales[block // share]
            weigh(scale, np.float64(decode(scale[newest])), weights)
        index, value = indices[block], values[block]
        present = False
        for j in own:
            x = np.float32(decode(value[j]))
            if x != np.float32(0.0):
                at = np.int64(index[j])
                dense[at] = x
                bits[at >> 4 if looks_up else 0] |= np.uint16(1 << (at & 15))
                present = True
        if not present:  # a block without gradient, as of words that did not occur
            continue
        if looks_up:
            _add_met(index, value, np.uint64(kept), dense, bits, found, weights, np.uint64(rows), partial)
        elif len(sums):
            _multiply(index, value, dense, sums)
        else:
            _add_products(index, value, np.uint64(kept), dense, weights, np.uint64(rows), partial)
        for j in own:
            at = np.int64(index[j])
            dense[at] = np.float32(0.0)
            bits[at >> 4 if looks_up else 0] = np.uint16(0)
    _collect(sums, kept, weights, rows, partial)


@jit
def _project(indices, values, scales, share, kept, x, rows, begin, end, partial, room):
    weights, short = room
    sums = of_short(short, kept, rows)
    for block in range(begin, end):
        if scales is not None and block % share == 0:
            _collect(sums, kept, weights, rows, partial)
            weigh(scales[block // share], 1.0, weights)
        if len(sums):
            _multiply(indices[block], values[block], x[block], sums)
        else:
            _add_products(indices[block], values[block], np.uint64(kept), x[block], weights, np.uint64(rows), partial)
    _collect(sums, kept, weights, rows, partial)


@jit
def _dots_of_all(parts, tasks, counter, index_like, value_like, scale_like, newest, rows, partial, room):
    number: Any = next_task(counter)
    while number < tasks.shape[0]:
        task = tasks[number]
        part, begin, end = parts[task.row], task.begin, task.end
        index, value, scale = window_of(part, index_like, value_like, scale_like)
        share, kept, length, sums = part.share, part.kept, part.length, partial[number]
        _dots(index, value, scale, share, kept, newest, rows, length, begin, end, sums, room)
        number = next_task(counter)


def dots(parts: Sequence[Part], newest: int, rows: int) -> torch.Tensor:
    """See `reference.dots`; partial sums per range of blocks, added in the order of the ranges."""
    groups: list[list[Part]] = [[]]
    tasks_so_far = 0
    for part in parts:
        count = -(-part.piece.blocks // task_size(part.piece.length))
        if groups[-1] and (tasks_so_far + count) * rows > _PARTIAL:
            groups.append([])
            tasks_so_far = 0
        groups[-1].append(part)
        tasks_so_far += count
    return torch.cat([_dots_of_group(group, newest, rows) for group in groups])


def _dots_of_group(parts: Sequence[Part], newest: int, rows: int) -> torch.Tensor:
    if not parts:
        return torch.zeros(0, rows, dtype=torch.float64, device="cpu")
    tasks, counter = tasks_of(parts)
    stored = tables.of_parts(parts), tasks, counter, *empty_like(parts[0])
    partial = np.zeros((len(tasks), rows))
    length, short = longest(parts), longest_short(parts)

    def work() -> None:
        # In float32, which is half as much of the first-level cache as float64, and as exact.
        dense, bits = np.zeros(length, np.float32), np.zeros(_LOOKED_UP // 16, np.uint16)
        found = np.empty((2, int(_CHUNKS + ONE) * int(COMPARED)), np.uint16)
        room = dense, bits, found, np.ones(rows), np.zeros(rows * short)
        _dots_of_all(*stored, newest, rows, partial, room)

    pool.together(work, len(tasks))
    first = np.flatnonzero(tasks["begin"] == 0)  # task of each part
    return torch.from_numpy(np.add.reduceat(partial, first))


def project(
    indices: torch.Tensor,
    values: torch.Tensor,
    dense: torch.Tensor,
    rows: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.project`; summed as in `dots`."""
    index, value, kept, x = *flat_rows(indices, values), indices.shape[2], array_of(dense)
    scale, share = None if scales is None else array_of(scales), sharing(x.shape[1])
    step = task_size(x.shape[1])
    partial = np.zeros((-(-len(x) // step), rows))

    def work(i: int, begin: int, end: int) -> None:
        room = np.ones(rows), np.zeros(rows * kept if kept < LONG else 0)
        _project(index, value, scale, share, kept, x, rows, begin, end, partial[i], room)

    pool.run(work, len(x), step)
    return torch.from_numpy(partial.sum(axis=0))
