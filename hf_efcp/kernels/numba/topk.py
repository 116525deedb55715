"""Accumulation, selection, storing and the new error, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.np.numpy_support import carray

from ...blocks import Part
from .. import pool
from . import tables
from .arrays import empty_like, longest, tasks_of, window_of
from .compiling import inner, jit
from .scalars import LARGEST, ONE, SMALLEST, ZERO, bits_of_float, decode, encode, float_of_bits, next_task, pointer_to
from .vectors import COMPARED, at_least, lowest

_COUNTED = 1 << 14  # keys that are counted in 16 bits


@inner
def _threshold(keys, bits, kept):
    """The `kept`-th largest of some keys of so many bits, uint16, and how many keys that are equal to it still fit."""
    # Bit by bit from the top: passes that only count vectorise, which a sort or a heap does not.
    threshold, above = np.uint16(0), np.int64(0)
    for bit in range(bits - 1, -1, -1):
        candidate = np.uint16(threshold | np.uint16(1 << bit))
        count = np.int64(0)
        for first in range(0, keys.shape[0], _COUNTED):
            part = keys[first : first + _COUNTED]
            some = np.int16(0)
            for i in range(part.shape[0]):
                some = np.int16(some + np.int16(part[i] >= candidate))
            count += some
        if count >= kept:
            threshold = candidate
            if count == kept:
                return threshold, kept
        else:
            above = count
    return threshold, kept - above


@inner
def _candidates(keys, threshold, found):
    """Write the ascending places of keys that are not below a threshold; how many there are."""
    count = np.int64(0)
    first = ZERO
    length = np.uint64(keys.shape[0])
    while first + COMPARED <= length:
        mask: Any = at_least(keys, first, threshold)
        while mask:
            found[count] = first + lowest(mask)
            count += 1
            mask &= mask - np.uint32(1)
        first += COMPARED
    while first < length:
        if keys[first] >= threshold:
            found[count] = first
            count += 1
        first += ONE
    return count


@inner
def _select(gradient, error, keys, found, lower, index):
    """Accumulate a block, and write the ascending indices of its largest entries. Their number is that of `index`.

    The first 15 bits of a magnitude settle most; the other 16 count where those are equal to the last one kept.
    """
    kept = index.shape[0]
    for i in range(gradient.shape[0]):
        a = min(max(error[i] + gradient[i], -LARGEST), LARGEST)
        error[i] = a
        keys[i] = np.uint16((bits_of_float(a) & np.int32(0x7FFFFFFF)) >> np.int32(16))
    upper, room = _threshold(keys, 15, kept)
    count = _candidates(keys, upper, found)
    equal = 0
    for j in range(count):
        if keys[found[j]] == upper:
            lower[equal] = np.uint16(bits_of_float(error[found[j]]) & np.int32(0xFFFF))
            equal += 1
    threshold, ties = np.uint16(0), np.int64(equal)
    if room < equal:
        threshold, ties = _threshold(lower[:equal], 16, room)
    position = 0
    for j in range(count):
        i = found[j]
        if keys[i] == upper:
            rest = np.uint16(bits_of_float(error[i]) & np.int32(0xFFFF))
            if rest < threshold or (rest == threshold and ties == 0):
                continue
            ties -= rest == threshold
        index[position] = i
        position += 1


@inner
def _accumulate_topk(gradient, error, indices, values, begin, end, room):
    keys, found, lower = room
    keys = keys[: gradient.shape[1]]
    for block in range(begin, end):
        e = error[block]
        _select(gradient[block], e, keys, found, lower, indices[block])
        for j in range(indices.shape[1]):
            at = indices[block, j]
            stored = encode(e[at], values)
            values[block, j] = stored
            e[at] -= decode(stored)


@inner
def _accumulate_topk_levels(gradient, error, indices, values, scales, share, begin, end, room):
    keys, found, lower = room
    keys = keys[: gradient.shape[1]]
    for first in range(begin, end, share):
        last = min(first + share, end)
        largest = np.int32(0)
        for block in range(first, last):
            _select(gradient[block], error[block], keys, found, lower, indices[block])
            for j in range(indices.shape[1]):
                largest = max(largest, bits_of_float(error[block, indices[block, j]]) & np.int32(0x7FFFFFFF))
        unit = max(float_of_bits(largest) / np.float32(127), SMALLEST)
        scale = np.int16((np.int64(bits_of_float(unit)) + 0xFFFF) >> 16)
        scales[first // share] = scale
        unit = decode(scale)
        for block in range(first, last):
            e = error[block]
            for j in range(indices.shape[1]):
                at = indices[block, j]
                level = np.rint(e[at] / unit)
                values[block, j] = np.int8(level)
                e[at] -= level * unit


@jit
def _accumulate_all(parts, tasks, counter, index_like, value_like, scale_like, gradients, errors, room):
    number: Any = next_task(counter)
    while number < tasks.shape[0]:
        task = tasks[number]
        part = parts[task.row]
        index, value, scale = window_of(part, index_like, value_like, scale_like)
        index, value = index[:, : part.kept], value[:, : part.kept]
        g = carray(pointer_to(gradients[task.row].at), (part.blocks, part.length), np.float32)
        e = carray(pointer_to(errors[task.row].at), (part.blocks, part.length), np.float32)
        if scale_like is None:
            _accumulate_topk(g, e, index, value, task.begin, task.end, room)
        else:
            _accumulate_topk_levels(g, e, index, value, scale[:, 0], part.share, task.begin, task.end, room)
        number = next_task(counter)


def accumulate_topk(gradients: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], rows: Sequence[Part]) -> None:
    """See `reference.accumulate_topk`; accumulation, selection, storing and the new error block by block."""
    if not rows:
        return
    tasks, counter = tasks_of(rows)
    stored = tables.of_parts(rows), tasks, counter, *empty_like(rows[0])
    dense = tables.of_vectors(gradients), tables.of_vectors(errors)
    length = longest(rows)

    def work() -> None:
        room = np.empty(length, np.uint16), np.empty(length, np.int32), np.empty(length, np.uint16)
        _accumulate_all(*stored, *dense, room)

    pool.together(work, len(tasks))
