"""numba kernels for the CPU: the twins of `reference.py`, block by block.

One block of the dense vector stays in the first-level cache while all rows of the window stream past it. Everything
that is compiled is in this file, because numba's cache on disk notices changes of this file only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from ..noise import MULTIPLIERS
from . import BUCKET, pool

NAME = "numba"

_LARGEST = np.float32(torch.finfo(torch.bfloat16).max)  # see reference.py
_SMALLEST = np.float32(torch.finfo(torch.float32).tiny)
_FIRST, _SECOND = (np.uint32(multiplier) for multiplier in MULTIPLIERS)
_RANGE = 1 << 16  # entries of the dense vector in one task; partial sums are kept per task
# Sums may be reordered, but NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract"}


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, cache=True, fastmath=_FASTMATH)(function)
    except RuntimeError:  # no directory that the cache could be written to
        return njit(nogil=True, fastmath=_FASTMATH)(function)


@intrinsic
def _float_of_bits(typing_context, bits):
    """Reinterpret an int32 as a float32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float(typing_context, value):
    """Reinterpret a float32 as an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


def _decode(stored):
    """A stored value as float32: bfloat16 travels as the int16 of its bits."""
    raise NotImplementedError("compiled code only")


@overload(_decode)
def _decode_overload(stored):
    if stored == types.int16:
        return lambda stored: _float_of_bits(np.int32(stored) << np.int32(16))
    return lambda stored: stored


def _encode(value, like):
    """A float32 as it is stored in an array such as `like`; bfloat16 rounds to nearest, ties to even, as torch does."""
    raise NotImplementedError("compiled code only")


@overload(_encode)
def _encode_overload(value, like):
    if like.dtype == types.int16:

        def bfloat16_bits(value, like):
            bits = np.int64(_bits_of_float(value)) & 0xFFFFFFFF
            return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

        return bfloat16_bits
    return lambda value, like: value


@_jit
def _threshold(keys, kept):
    """The `kept`-th largest key, and how many keys that are equal to it still fit."""
    # Bit by bit from the top: thirty passes that only count vectorise, which a sort or a heap does not.
    threshold = np.int32(0)
    for bit in range(30, -1, -1):
        candidate = np.int32(threshold | np.int32(1 << bit))
        count = np.int32(0)
        for i in range(keys.shape[0]):
            count += np.int32(keys[i] >= candidate)
        if count >= kept:
            threshold = candidate
            if count == kept:
                return threshold, kept
    above = 0
    for i in range(keys.shape[0]):
        above += keys[i] > threshold
    return threshold, kept - above


@_jit
def _accumulate_topk(gradient, error, indices, values, begin, end):
    length = gradient.shape[1]
    kept = indices.shape[1]
    keys = np.empty(length, np.int32)
    for block in range(begin, end):
        g = gradient[block]
        e = error[block]
        for i in range(length):
            a = min(max(e[i] + g[i], -_LARGEST), _LARGEST)
            e[i] = a
            keys[i] = _bits_of_float(a) & np.int32(0x7FFFFFFF)
        threshold, ties = _threshold(keys, kept)
        position = 0
        for i in range(length):
            if keys[i] >= threshold:
                if keys[i] == threshold:
                    if ties == 0:
                        continue
                    ties -= 1
                stored = _encode(e[i], values)
                indices[block, position] = i
                values[block, position] = stored
                e[i] -= _decode(stored)
                position += 1


@_jit
def _add_products(index, value, dense, rows, partial):
    """Add the inner products of one dense block with its rows to `partial`."""
    for row in range(rows):
        total = 0.0
        for j in range(index.shape[1]):
            total += np.float64(_decode(value[row, j])) * np.float64(dense[index[row, j]])
        partial[row] += total


@_jit
def _dots(indices, values, newest, rows, length, begin, end, partial):
    dense = np.zeros(length, np.float32)
    for block in range(begin, end):
        for j in range(indices.shape[2]):
            dense[indices[block, newest, j]] = _decode(values[block, newest, j])
        _add_products(indices[block], values[block], dense, rows, partial)
        for j in range(indices.shape[2]):
            dense[indices[block, newest, j]] = 0.0


@_jit
def _project(indices, values, dense, rows, begin, end, partial):
    for block in range(begin, end):
        _add_products(indices[block], values[block], dense[block], rows, partial)


@_jit
def _combine(indices, values, coefficients, base, scale, squared, begin, end, out):
    kept = indices.shape[2]
    length = out.shape[1]
    dense = np.empty(length, np.float64)
    for block in range(begin, end):
        if base.shape[0]:
            for i in range(length):
                dense[i] = scale * np.float64(base[block, i])
        else:
            dense[:] = 0.0
        for row in range(coefficients.shape[0]):
            index = indices[block, row]
            value = values[block, row]
            c = coefficients[row]
            if squared:
                for j in range(kept):
                    v = np.float64(_decode(value[j]))
                    dense[index[j]] += c * (v * v)
            else:
                for j in range(kept):
                    dense[index[j]] += c * np.float64(_decode(value[j]))
        for i in range(length):
            out[block, i] = np.float32(dense[i])


@_jit
def _noise(entry, key):
    """See `noise.mix`; numba widens every product, and what is above 32 bits is cut off again."""
    bits = np.uint32(np.uint32(entry) ^ key)
    bits = np.uint32(bits ^ (bits >> np.uint32(16)))
    bits = np.uint32(bits * _FIRST)
    bits = np.uint32(bits ^ (bits >> np.uint32(15)))
    bits = np.uint32(bits * _SECOND)
    return np.uint32(bits ^ (bits >> np.uint32(15)))


@_jit
def _quantize(error, stored, scale, levels, key, begin, end):
    signed = np.zeros(BUCKET, np.int32)
    for bucket in range(begin, end):
        start = bucket * BUCKET
        x = error[start : min(start + BUCKET, error.shape[0])]
        count = x.shape[0]
        largest = np.int32(0)
        for i in range(count):
            largest = max(largest, _bits_of_float(x[i]) & np.int32(0x7FFFFFFF))
        unit = max(min(_float_of_bits(largest), _LARGEST) / np.float32(levels), _SMALLEST)
        scale[bucket] = unit
        for i in range(count):
            multiple = min(abs(x[i]), _LARGEST) / unit
            whole = np.int32(multiple)
            threshold = np.int32((multiple - np.float32(whole)) * np.float32(2.0**31))
            noise = np.int32(_noise(start + i, key) >> np.uint32(1))
            level = min(np.int32(whole + np.int32(noise < threshold)), np.int32(levels))
            signed[i] = -level if x[i] < 0.0 else level
        if levels > 7:
            for i in range(count):
                stored[start + i] = signed[i]
        else:
            if count % 2:
                signed[count] = 0
            for i in range((count + 1) // 2):
                stored[start // 2 + i] = (signed[2 * i] & 15) | ((signed[2 * i + 1] & 15) << 4)


@_jit
def _dequantize(stored, scale, levels, begin, end, out):
    for bucket in range(begin, end):
        start = bucket * BUCKET
        x = out[start : min(start + BUCKET, out.shape[0])]
        unit = scale[bucket]
        if levels > 7:
            for i in range(x.shape[0]):
                x[i] = np.float32(np.int32(stored[start + i])) * unit
        else:
            for i in range(x.shape[0] // 2):
                both = np.int32(stored[start // 2 + i])
                # The lower half and the upper half, 0 to 15, as -8 to 7.
                x[2 * i] = np.float32(((both & 15) ^ 8) - 8) * unit
                x[2 * i + 1] = np.float32(((both >> 4) ^ 8) - 8) * unit
            if x.shape[0] % 2:
                both = np.int32(stored[(start + x.shape[0]) // 2])
                x[x.shape[0] - 1] = np.float32(((both & 15) ^ 8) - 8) * unit


@_jit
def _round_to_bfloat16(error, stored, key, begin, end):
    for i in range(begin, end):
        noise = np.int32(_noise(i, key) & np.uint32(0xFFFF))
        x = min(max(error[i], -_LARGEST), _LARGEST)
        stored[i] = np.int32(_bits_of_float(x) + noise) >> np.int32(16)


def accumulate_topk(gradient: torch.Tensor, error: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """See `reference.accumulate_topk`; accumulation, selection, storing and the new error in one pass a block."""
    g, e, index, value = _array(gradient), _array(error), _array(indices), _array(values)
    pool.run(lambda _, begin, end: _accumulate_topk(g, e, index, value, begin, end), g.shape[0], _step(g.shape[1]))


def dots(indices: torch.Tensor, values: torch.Tensor, newest: int, rows: int, length: int) -> torch.Tensor:
    """See `reference.dots`; partial sums per range of blocks, added in the order of the ranges."""
    index, value = _array(indices), _array(values)
    return _summed(
        lambda begin, end, partial: _dots(index, value, newest, rows, length, begin, end, partial),
        index.shape[0],
        length,
        rows,
    )


def project(indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, rows: int) -> torch.Tensor:
    """See `reference.project`; summed as in `dots`."""
    index, value, x = _array(indices), _array(values), _array(dense)
    return _summed(lambda begin, end, partial: _project(index, value, x, rows, begin, end, partial), *x.shape, rows)


def combine(
    indices: torch.Tensor,
    values: torch.Tensor,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    scale: float = 0.0,
    squared: bool = False,
) -> None:
    """See `reference.combine`; one block of the sum is a float64 buffer in the first-level cache."""
    index, value, c, total = _array(indices), _array(values), _array(coefficients), _array(out)
    x = np.empty((0, 0), np.float32) if base is None else _array(base)
    pool.run(
        lambda _, begin, end: _combine(index, value, c, x, scale, squared, begin, end, total),
        index.shape[0],
        _step(total.shape[1]),
    )


def quantize(error: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, key: int) -> None:
    """See `reference.quantize`."""
    x, level, unit = _array(error), _array(stored), _array(scale)
    levels, where = _levels(stored), np.uint32(key)
    pool.run(lambda _, begin, end: _quantize(x, level, unit, levels, where, begin, end), unit.shape[0], _step(BUCKET))


def dequantize(stored: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """See `reference.dequantize`."""
    level, unit, x = _array(stored), _array(scale), _array(out)
    levels = _levels(stored)
    pool.run(lambda _, begin, end: _dequantize(level, unit, levels, begin, end, x), unit.shape[0], _step(BUCKET))


def round_to_bfloat16(error: torch.Tensor, stored: torch.Tensor, key: int) -> None:
    """See `reference.round_to_bfloat16`."""
    x, rounded, where = _array(error), _array(stored), np.uint32(key)
    pool.run(lambda _, begin, end: _round_to_bfloat16(x, rounded, where, begin, end), x.shape[0], _RANGE)


def _levels(stored: torch.Tensor) -> int:
    """Levels on each side of zero."""
    return 127 if stored.dtype == torch.int8 else 7


def _summed(add: Callable[[int, int, Any], None], blocks: int, length: int, rows: int) -> torch.Tensor:
    """Sums over all blocks: one partial sum for each range, whichever thread computes it."""
    step = _step(length)
    partial = np.zeros((-(-blocks // step), rows))
    pool.run(lambda i, begin, end: add(begin, end, partial[i]), blocks, step)
    return torch.from_numpy(partial.sum(axis=0))


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array; numpy has no bfloat16, which goes as the int16 of its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _step(length: int) -> int:
    """Blocks of a task."""
    return max(1, _RANGE // length)
