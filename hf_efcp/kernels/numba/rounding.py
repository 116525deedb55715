"""Stochastic rounding: 4 bits, int8 and bfloat16."""

from __future__ import annotations

import numpy as np
import torch

from ...noise import MULTIPLIERS
from .. import BUCKET, pool
from .arrays import RANGE, array_of, task_size
from .compiling import inner, jit
from .scalars import LARGEST, SMALLEST, bits_of_float, float_of_bits, times

_FIRST, _SECOND = (np.uint32(multiplier) for multiplier in MULTIPLIERS)


@inner
def _noise(entry, key):
    """See `noise.mix`."""
    bits = np.uint32(np.uint32(entry) ^ key)
    bits = times(np.uint32(bits ^ (bits >> np.uint32(16))), _FIRST)
    bits = times(np.uint32(bits ^ (bits >> np.uint32(15))), _SECOND)
    return np.uint32(bits ^ (bits >> np.uint32(15)))


@inner
def round_at_random(magnitude, unit, levels, entry, key):
    """Stochastically, to a level."""
    multiple = min(magnitude, LARGEST) / unit
    whole = np.int32(multiple)
    threshold = np.int32((multiple - np.float32(whole)) * np.float32(2.0**31))
    noise = np.int32(_noise(entry, key) >> np.uint32(1))
    return min(np.int32(whole + np.int32(noise < threshold)), np.int32(levels))


@jit
def _quantize(error, stored, scale, levels, key, where, begin, end):
    signed = np.zeros(BUCKET, np.int32)
    for bucket in range(begin, end):
        start = bucket * BUCKET
        x = error[start : min(start + BUCKET, error.shape[0])]
        count = x.shape[0]
        largest = np.int32(0)
        for i in range(count):
            largest = max(largest, bits_of_float(x[i]) & np.int32(0x7FFFFFFF))
        unit = max(min(float_of_bits(largest), LARGEST) / np.float32(levels), SMALLEST)
        scale[bucket] = unit
        first = np.uint32(where + start)
        for i in range(count):
            level = round_at_random(abs(x[i]), unit, levels, first + np.uint32(i), key)
            signed[i] = -level if x[i] < 0.0 else level
        if levels > 7:
            out = stored[start : start + count]
            for i in range(count):
                out[i] = signed[i]
        else:
            if count % 2:
                signed[count] = 0
            out = stored[start // 2 : start // 2 + (count + 1) // 2]
            for i in range((count + 1) // 2):
                out[i] = (signed[2 * i] & 15) | ((signed[2 * i + 1] & 15) << 4)


@jit
def _dequantize(stored, scale, levels, begin, end, out):
    for bucket in range(begin, end):
        start = bucket * BUCKET
        x = out[start : min(start + BUCKET, out.shape[0])]
        count = x.shape[0]
        unit = scale[bucket]
        if levels > 7:
            level = stored[start : start + count]
            for i in range(count):
                x[i] = np.float32(np.int32(level[i])) * unit
        else:
            both = stored[start // 2 : start // 2 + (count + 1) // 2]
            for i in range(count // 2):
                # The lower half and the upper half, 0 to 15, as -8 to 7.
                pair = np.int32(both[i])
                x[2 * i] = np.float32(((pair & 15) ^ 8) - 8) * unit
                x[2 * i + 1] = np.float32(((pair >> 4) ^ 8) - 8) * unit
            if count % 2:
                x[count - 1] = np.float32(((np.int32(both[count // 2]) & 15) ^ 8) - 8) * unit


@jit
def _round_to_bfloat16(error, stored, key, where, begin, end):
    x, rounded, first = error[begin:end], stored[begin:end], np.uint32(where + begin)
    for i in range(x.shape[0]):
        noise = np.int32(_noise(first + np.uint32(i), key) & np.uint32(0xFFFF))
        rounded[i] = np.int32(bits_of_float(min(max(x[i], -LARGEST), LARGEST)) + noise) >> np.int32(16)


def quantize(error: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, key: int, start: int = 0) -> None:
    """See `reference.quantize`."""
    x, level, unit = array_of(error), array_of(stored), array_of(scale)
    levels, bits = _levels(stored), np.uint32(key)
    pool.run(
        lambda _, begin, end: _quantize(x, level, unit, levels, bits, start, begin, end), len(unit), task_size(BUCKET)
    )


def dequantize(stored: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """See `reference.dequantize`."""
    level, unit, x = array_of(stored), array_of(scale), array_of(out)
    levels = _levels(stored)
    pool.run(lambda _, begin, end: _dequantize(level, unit, levels, begin, end, x), unit.shape[0], task_size(BUCKET))


def round_to_bfloat16(error: torch.Tensor, stored: torch.Tensor, key: int, start: int = 0) -> None:
    """See `reference.round_to_bfloat16`."""
    x, rounded, bits = array_of(error), array_of(stored), np.uint32(key)
    pool.run(lambda _, begin, end: _round_to_bfloat16(x, rounded, bits, start, begin, end), len(x), RANGE)


def _levels(stored: torch.Tensor) -> int:
    """Levels on each side of zero."""
    return 127 if stored.dtype == torch.int8 else 7
