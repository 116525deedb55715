"""AdamW's second moment, and vectors divided by its root."""

from __future__ import annotations

import numpy as np
import torch

from .. import BUCKET, WHITENED, pool
from .arrays import LIGHT, array_of
from .compiling import inner, inner_as_written, jit, jit_as_written
from .rounding import round_at_random
from .scalars import FLOAT32_MAX, LARGEST, SMALLEST, bits_of_float, float_of_bits

_WHITENED = np.float32(WHITENED)


@jit
def _observe(moments, gradient, kept, new, begin, end):
    v, g = moments[begin:end], gradient[begin:end]
    for i in range(v.shape[0]):
        v[i] = min(kept * v[i] + new * (g[i] * g[i]), FLOAT32_MAX)


@inner
def _whitened(x, v, factor, correction, eps):
    root = np.float32(1.0) / np.sqrt(np.sqrt(v) * correction + eps)
    y = min(max(factor * x * root, -_WHITENED), _WHITENED)
    return y if v > np.float32(0.0) else np.float32(0.0)


@jit
def _whiten(vector, moments, factor, correction, eps, begin, end, total):
    x, v, out = vector[begin:end], moments[begin:end], total[begin:end]
    for i in range(x.shape[0]):
        out[i] = _whitened(x[i], v[i], factor, correction, eps)


@jit
def _whiten_in_place(vector, moments, factor, correction, eps, begin, end):
    # Apart from `_whiten`: where two names mean the same memory, the compiler takes one entry after the other.
    x, v = vector[begin:end], moments[begin:end]
    for i in range(x.shape[0]):
        x[i] = _whitened(x[i], v[i], factor, correction, eps)


@inner_as_written
def _divided(x, root, factor, correction, eps):
    y = min(max(factor * x * (np.float32(1.0) / np.sqrt(root * correction + eps)), -_WHITENED), _WHITENED)
    return y if root > np.float32(0.0) else np.float32(0.0)


@jit_as_written
def _observe_levels(roots, scale, gradient, kept, new, key, where, correction, eps, begin, end, out):
    root = np.empty(BUCKET, np.float32)
    for bucket in range(begin, end):
        start = bucket * BUCKET
        level = roots[start : min(start + BUCKET, roots.shape[0])]
        count = level.shape[0]
        g, total = gradient[start : start + count], out[start : start + count]
        unit = scale[bucket]
        for i in range(count):
            old = np.float32(np.int32(level[i])) * unit
            root[i] = np.sqrt(min(kept * (old * old) + new * (g[i] * g[i]), FLOAT32_MAX))
        largest = np.int32(0)
        for i in range(count):
            largest = max(largest, bits_of_float(root[i]))
        unit = max(min(float_of_bits(largest), LARGEST) / np.float32(127), SMALLEST)
        scale[bucket] = unit
        first = np.uint32(where + start)
        for i in range(count):
            rounded = round_at_random(root[i], unit, 127, first + np.uint32(i), key)
            level[i] = rounded
            total[i] += _divided(g[i], np.float32(rounded) * unit, np.float32(1.0), correction, eps)


@jit_as_written
def _whiten_levels(x, roots, scale, start, factor, correction, eps):
    end = start + x.shape[0]
    for bucket in range(start // BUCKET, (end + BUCKET - 1) // BUCKET):
        begin, unit = max(bucket * BUCKET, start), scale[bucket]
        level = roots[begin : min((bucket + 1) * BUCKET, end)]
        y = x[begin - start : begin - start + level.shape[0]]
        for i in range(level.shape[0]):
            y[i] = _divided(y[i], np.float32(np.int32(level[i])) * unit, factor, correction, eps)


def observe(moments: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
    """See `reference.observe`."""
    v, g, kept, new = array_of(moments), array_of(gradient), np.float32(beta2), np.float32(1.0 - beta2)
    pool.run(lambda _, begin, end: _observe(v, g, kept, new, begin, end), len(v), LIGHT)


def whiten(
    x: torch.Tensor, moments: torch.Tensor, factor: float, correction: float, eps: float, out: torch.Tensor
) -> None:
    """See `reference.whiten`; in one pass."""
    vector, v, total = array_of(x), array_of(moments), array_of(out)
    numbers = np.float32(factor), np.float32(correction), np.float32(eps)
    if out.data_ptr() == x.data_ptr():
        pool.run(lambda _, begin, end: _whiten_in_place(vector, v, *numbers, begin, end), len(v), LIGHT)
    else:
        pool.run(lambda _, begin, end: _whiten(vector, v, *numbers, begin, end, total), len(v), LIGHT)


def observe_levels(
    roots: torch.Tensor,
    scale: torch.Tensor,
    gradient: torch.Tensor,
    beta2: float,
    key: int,
    start: int,
    correction: float,
    eps: float,
    out: torch.Tensor,
) -> None:
    """See `reference.observe_levels`; bucket by bucket, and with the same bits."""
    level, unit, g, total, bits = array_of(roots), array_of(scale), array_of(gradient), array_of(out), np.uint32(key)
    numbers = np.float32(beta2), np.float32(1.0 - beta2), bits, start, np.float32(correction), np.float32(eps)
    step = LIGHT // BUCKET
    pool.run(lambda _, begin, end: _observe_levels(level, unit, g, *numbers, begin, end, total), len(unit), step)


def whiten_levels(
    x: torch.Tensor, roots: torch.Tensor, scale: torch.Tensor, start: int, factor: float, correction: float, eps: float
) -> None:
    """See `reference.whiten_levels`; in one pass, and with the same bits."""
    vector, level, unit = array_of(x), array_of(roots), array_of(scale)
    numbers = np.float32(factor), np.float32(correction), np.float32(eps)

    def work(_: int, begin: int, end: int) -> None:
        _whiten_levels(vector[begin:end], level, unit, start + begin, *numbers)

    pool.run(work, len(vector), LIGHT)
