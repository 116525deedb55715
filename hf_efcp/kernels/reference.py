"""Plain torch kernels: the ground truth for every other backend, and what runs on devices without one of their own.

Blocks are processed in chunks, so that the temporaries (int64 indices, float64 products) stay at a few megabytes
however large the window is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks import Part, sharing
from ..noise import MASK, mix
from . import BUCKET, WHITENED, widest

NAME = "reference"

_CHUNK = 1 << 19  # entries of a temporary
# The accumulator saturates at the largest bfloat16: what is stored never rounds to infinity, and e + g cannot overflow.
_LARGEST = torch.finfo(torch.bfloat16).max
_LEVELS = 127  # of an int8 value, on each side of zero
# A smaller scale would have few bits left, or none.
_SMALLEST = torch.finfo(torch.float32).tiny


def squares(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of each vector.

    Args:
        vectors: `(n,)` each, float32, contiguous.

    Returns:
        The sums, accumulated in float64 (float32 where the device has no float64); not finite where an entry is not.
    """
    if not vectors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    return torch.stack([_square(vector) for vector in vectors])


def _square(vector: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=widest(vector.device), device=vector.device)
    for part in _chunks(len(vector), 1):
        total += vector[part].to(total.dtype).square().sum()
    return total


def accumulate_topk(gradients: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], rows: Sequence[Part]) -> None:
    """`a = error + gradient`, `indices, values = Top-k(a)` per block, `error = a - values`, all in place.

    The order is by magnitude, and the lowest index first among equals; the entries kept are stored by ascending index.
    What leaves the error is the value as stored, so that rounding to the dtype of the values is fed back as well.

    Args:
        gradients: Of each part `(blocks, length)`, float32, finite, contiguous.
        errors: Of each part `(blocks, length)`, float32, contiguous; updated.
        rows: Where the rows go; written. A scale is the largest magnitude of the blocks that share it over 127,
            rounded up.
    """
    for gradient, error, part in zip(gradients, errors, rows, strict=True):
        _accumulate_topk(gradient, error, part.indices, part.values, part.scales)


def _accumulate_topk(
    gradient: torch.Tensor,
    error: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    blocks, length = gradient.shape
    kept = indices.shape[1]
    reversed_index = torch.arange(length - 1, -1, -1, device=gradient.device)
    for part in _chunks(blocks, length, sharing(length)):
        accumulator = (error[part] + gradient[part]).clamp_(-_LARGEST, _LARGEST)
        # One unique integer key per entry: torch.topk promises no order among equal values.
        keys = (accumulator.abs().view(torch.int32).long() << 32) | reversed_index
        chosen = torch.topk(keys, kept, dim=1, sorted=False).indices.sort(dim=1).values
        exact = accumulator.gather(1, chosen)
        if scales is None:
            stored = exact.to(values.dtype)
            taken = stored.to(torch.float32)
        else:
            share = sharing(length)
            scale = _shared_scales(exact, share)
            scales[_groups(part, share)] = scale
            unit = scale.to(torch.float32).repeat_interleave(share)[: len(exact), None]
            stored = (exact / unit).round_().to(torch.int8)
            taken = stored * unit  # 7 bits times 8 bits: exact
        error[part] = accumulator.scatter_add_(1, chosen, -taken)
        indices[part].copy_(chosen.to(indices.dtype))
        values[part].copy_(stored)


def dots(parts: Sequence[Part], newest: int, rows: int) -> torch.Tensor:
    """The new column of the Gram matrix, part by part: `<row_newest, row_i>` for the first `rows` rows.

    Args:
        parts: Of the window.
        newest: Position of the newest row.
        rows: Number of rows that were ever written.

    Returns:
        `(parts, rows)`, where the window is, float64 (float32 where the device has none).
    """
    if not parts:
        return torch.zeros(0, rows, dtype=torch.float64, device="cpu")
    return torch.stack([_dots(p.indices, p.values, newest, rows, p.piece.length, p.scales) for p in parts])


def _dots(
    indices: torch.Tensor, values: torch.Tensor, newest: int, rows: int, length: int, scales: torch.Tensor | None
) -> torch.Tensor:
    blocks, _, kept = indices.shape
    wide = widest(values.device)
    total = torch.zeros(rows, dtype=wide, device=values.device)
    for part in _chunks(blocks, max(length, rows * kept)):
        count = part.stop - part.start
        row = torch.zeros(count, length, dtype=wide, device=values.device)
        entries = _entries_of(values, scales, part, slice(newest, newest + 1), length, wide)[:, 0]
        row.scatter_(1, indices[part, newest].to(torch.int64), entries)
        _add_products(indices, values, scales, part, row, total)
    return total


def project(
    indices: torch.Tensor,
    values: torch.Tensor,
    dense: torch.Tensor,
    rows: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Inner products `<x, row_i>` of a dense vector with the first `rows` rows, over one piece.

    Args:
        indices: `(blocks, m, kept)`, unsigned integers.
        values: `(blocks, m, kept)`, float32, bfloat16 or int8.
        dense: `x`, `(blocks, length)`, float32.
        rows: Number of rows that were ever written.
        scales: `(groups, m)`, bfloat16, for int8 values.

    Returns:
        `(rows,)`, accumulated as in `dots`.
    """
    blocks, _, kept = indices.shape
    wide = widest(values.device)
    total = torch.zeros(rows, dtype=wide, device=values.device)
    for part in _chunks(blocks, max(dense.shape[1], rows * kept)):
        _add_products(indices, values, scales, part, dense[part].to(wide), total)
    return total


def combine(
    indices: torch.Tensor,
    values: torch.Tensor,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    scale: float = 0.0,
    squared: bool = False,
) -> None:
    """`out = scale * x + G^T c` over one piece: the rows of the window, weighted and added to a dense vector.

    Args:
        indices: `(blocks, m, kept)`, unsigned integers.
        values: `(blocks, m, kept)`, float32, bfloat16 or int8.
        coefficients: `c`, `(rows,)`, float64, for the first `rows` rows.
        out: `(blocks, length)`, float32; overwritten. The sum is float64 (float32 where the device has no float64).
        scales: `(groups, m)`, bfloat16, for int8 values.
        base: `x`, `(blocks, length)`, float32; zero without it.
        scale: Factor of `base`.
        squared: Take the squares of the rows' entries.
    """
    blocks, _, kept = indices.shape
    rows = coefficients.shape[0]
    wide = widest(values.device)
    weights = coefficients.to(values.device, wide)[:, None]
    for part in _chunks(blocks, max(out.shape[1], rows * kept)):
        count = part.stop - part.start
        total = torch.zeros_like(out[part], dtype=wide) if base is None else scale * base[part].to(wide)
        for some in _chunks(rows, count * kept):
            index = indices[part, some].to(torch.int64).flatten(1)
            value = _entries_of(values, scales, part, some, out.shape[1], wide)
            total.scatter_add_(1, index, ((value * value if squared else value) * weights[some]).flatten(1))
        out[part] = total.to(out.dtype)


def quantize(error: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, key: int, start: int = 0) -> None:
    """Round an error stochastically to symmetric levels, -7 to 7 (4 bits) or -127 to 127 (int8), bucket by bucket.

    `scale` is the largest magnitude of the bucket over the number of levels, and `|error| / scale` rounds up with a
    probability that is its fraction (to 2^-31), so that the expectation of `stored * scale` is the error. Zeros stay.

    Args:
        error: `(n,)`, float32, finite.
        stored: `(n,)`, int8, or `(ceil(n / 2),)`, uint8, with entry `2 i` in the lower half of byte `i`; written.
        scale: `(ceil(n / BUCKET),)`, float32; written.
        key: The noise of entry `i` is `mix((start + i) ^ key)`; see `hf_efcp.noise`.
        start: Where the entries begin in the parameter.
    """
    levels = 127 if stored.dtype == torch.int8 else 7
    for part in _chunks(scale.shape[0], BUCKET):
        span = _entries(part, error)
        x = _padded(error[span].clamp(-_LARGEST, _LARGEST), BUCKET).view(-1, BUCKET)
        magnitude = x.abs()
        largest = magnitude.amax(dim=1, keepdim=True)
        unit = (largest / levels).clamp_(min=_SMALLEST)
        multiple = magnitude / unit
        whole = multiple.floor()
        threshold = ((multiple - whole) * 2.0**31).to(torch.int64)
        noise = _noise(start + span.start, x.numel(), key, x.device).view_as(x) >> 1
        level = (whole.to(torch.int64) + (noise < threshold)).clamp_(max=levels)
        signed = torch.where(x < 0, -level, level).view(-1)[: span.stop - span.start]
        scale[part] = unit.view(-1)
        if stored.dtype == torch.int8:
            stored[span] = signed.to(torch.int8)
        else:
            pairs = _padded(signed & 15, 2).view(-1, 2)
            stored[span.start // 2 : (span.stop + 1) // 2] = (pairs[:, 0] | (pairs[:, 1] << 4)).to(torch.uint8)


def dequantize(stored: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """`out = stored * scale`, bucket by bucket: what `quantize` kept.

    Args:
        stored: As in `quantize`.
        scale: As in `quantize`.
        out: `(n,)`, float32; overwritten.
    """
    for part in _chunks(scale.shape[0], BUCKET):
        span = _entries(part, out)
        if stored.dtype == torch.int8:
            levels = stored[span]
        else:
            both = stored[span.start // 2 : (span.stop + 1) // 2].to(torch.int8)
            # The shift to the left drops the upper half, the one to the right copies the sign.
            levels = torch.stack(((both << 4) >> 4, both >> 4), dim=1).view(-1)[: span.stop - span.start]
        product = _padded(levels, BUCKET).view(-1, BUCKET).to(torch.float32) * scale[part, None]
        out[span] = product.view(-1)[: span.stop - span.start]


def round_to_bfloat16(error: torch.Tensor, stored: torch.Tensor, key: int, start: int = 0) -> None:
    """Round an error stochastically to one of its two neighbours in bfloat16; the expectation is the error.

    Args:
        error: `(n,)`, float32, finite.
        stored: `(n,)`, bfloat16; written.
        key: As in `quantize`.
        start: As in `quantize`.
    """
    for span in _chunks(error.shape[0], 1):
        x = error[span].clamp(-_LARGEST, _LARGEST)
        noise = _noise(start + span.start, x.shape[0], key, x.device) & 0xFFFF
        # Magnitudes are ordered as their bits are: noise below the cut carries into what is kept.
        bits = (x.view(torch.int32) + noise.to(torch.int32)) >> 16
        stored[span] = bits.to(torch.int16).view(torch.bfloat16)


def observe(moments: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
    """AdamW's second moment: `v <- beta2 v + (1 - beta2) g^2`, saturating where float32 ends.

    Args:
        moments: `v`, `(n,)`, float32; updated.
        gradient: `g`, `(n,)`, float32.
        beta2: Decay.
    """
    for part in _chunks(len(moments), 1):
        g = gradient[part]
        moments[part].mul_(beta2).addcmul_(g, g, value=1.0 - beta2).clamp_(max=torch.finfo(torch.float32).max)


def whiten(
    x: torch.Tensor, moments: torch.Tensor, factor: float, correction: float, eps: float, out: torch.Tensor
) -> None:
    """`out = factor D^-1/2 x`, `D = correction sqrt(v) + eps`; 0 where `v` is 0, and no entry beyond `WHITENED`.

    Args:
        x: `(n,)`, float32.
        moments: `v`, `(n,)`, float32.
        factor: A number.
        correction: `1 / sqrt(1 - beta2^t)`.
        eps: As AdamW's.
        out: `(n,)`, float32; overwritten. May be `x`.
    """
    for part in _chunks(len(x), 1):
        v = moments[part]
        root = v.sqrt().mul_(correction).add_(eps).rsqrt_()
        whitened = (factor * x[part] * root).clamp_(-WHITENED, WHITENED)
        out[part] = torch.where(v > 0.0, whitened, 0.0)


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
    """AdamW's second moment, kept as levels of its root, and the gradient in the metric: `observe` and `whiten` in one.

    `v = (level scale)^2`, `v <- beta2 v + (1 - beta2) g^2`, `sqrt(v)` is rounded as in `quantize`, and the metric is
    that of what is stored: `out += D^-1/2 g`.

    Args:
        roots: Levels of `sqrt(v)`, `(n,)`, int8, from the start of a bucket on; updated.
        scale: Of each bucket, `(ceil(n / BUCKET),)`, float32; updated.
        gradient: `g`, `(n,)`, float32.
        beta2: Decay.
        key: As in `quantize`.
        start: As in `quantize`.
        correction: As in `whiten`.
        eps: As in `whiten`.
        out: `(n,)`, float32; updated.
    """
    for part in _chunks(len(scale), BUCKET):
        span = _entries(part, roots)
        g, v = gradient[span], torch.empty(span.stop - span.start, dtype=torch.float32, device=roots.device)
        dequantize(roots[span], scale[part], v)
        # Each product is rounded by itself, and the root to nearest, which torch's of float32 is not on every CPU: a
        # single bit would be a whole level here and there.
        v.square_().mul_(beta2).add_(g.square().mul_(1.0 - beta2)).clamp_(max=torch.finfo(torch.float32).max)
        quantize(v.to(widest(v.device)).sqrt_().to(torch.float32), roots[span], scale[part], key, start + span.start)
        whitened = g.clone()
        whiten_levels(whitened, roots[span], scale[part], 0, 1.0, correction, eps)
        out[span] += whitened


def whiten_levels(
    x: torch.Tensor, roots: torch.Tensor, scale: torch.Tensor, start: int, factor: float, correction: float, eps: float
) -> None:
    """`x <- factor D^-1/2 x` as in `whiten`, in place, with `sqrt(v)` as levels.

    Args:
        x: `(n,)`, float32; updated.
        roots: Levels of `sqrt(v)` of a whole parameter, int8, flat.
        scale: Of its buckets, float32.
        start: Position of `x` in the parameter.
        factor: A number.
        correction: `1 / sqrt(1 - beta2^t)`.
        eps: As AdamW's.
    """
    first = start // BUCKET
    for part in _chunks(-(-(start + len(x)) // BUCKET) - first, BUCKET):
        begin, end = (first + part.start) * BUCKET, min((first + part.stop) * BUCKET, start + len(x))
        root = torch.empty(end - begin, dtype=torch.float32, device=x.device)
        dequantize(roots[begin:end], scale[first + part.start : first + part.stop], root)
        root = root[max(start - begin, 0) :]
        inside = slice(max(begin, start) - start, end - start)
        divided = (factor * x[inside] * (root * correction).add_(eps).rsqrt_()).clamp_(-WHITENED, WHITENED)
        x[inside] = torch.where(root > 0.0, divided, 0.0)


def apply(
    theta: torch.Tensor,
    update: torch.Tensor,
    *,
    lr: float,
    keep: float,
    velocity: torch.Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """Move a slab of a parameter: `v <- momentum v + u`, `theta <- keep theta - lr v`.

    Args:
        theta: The slab, `(n,)`, float32; updated.
        update: `u`, `(n,)`, float32.
        lr: Learning rate.
        keep: What weight decay leaves of the parameter.
        velocity: `v`, `(n,)`, float32; updated. None for no momentum.
        momentum: Heavy-ball factor.
    """
    if velocity is not None:
        update = velocity.mul_(momentum).add_(update)
    if keep != 1.0:
        theta.mul_(keep)
    theta.add_(update, alpha=-lr)


def _noise(start: int, count: int, key: int, device: torch.device) -> torch.Tensor:
    """32 bits of noise for `count` entries from `start`, as int64."""
    return mix((torch.arange(start, start + count, device=device) & MASK) ^ key)


def _entries(buckets: slice, flat: torch.Tensor) -> slice:
    """The entries of some buckets; the last bucket may be short."""
    return slice(buckets.start * BUCKET, min(buckets.stop * BUCKET, flat.shape[0]))


def _padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    """The tensor with zeros behind it, up to a multiple."""
    return torch.nn.functional.pad(flat, (0, -flat.shape[0] % multiple))


def _shared_scales(exact: torch.Tensor, share: int) -> torch.Tensor:
    """The scales of `share` blocks of kept entries each: the largest magnitude over the levels, rounded up."""
    largest = _padded(exact.abs().amax(dim=1), share).view(-1, share).amax(dim=1)
    unit = (largest / _LEVELS).clamp_(min=_SMALLEST)
    # Magnitudes are ordered as their bits are: what bfloat16 would cut off carries.
    return ((unit.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _groups(part: slice, share: int) -> slice:
    """The scales of some blocks, of which the first is the first that has its scale."""
    return slice(part.start // share, -(-part.stop // share))


def _entries_of(
    values: torch.Tensor, scales: torch.Tensor | None, part: slice, some: slice, length: int, wide: torch.dtype
) -> torch.Tensor:
    """Values of some blocks and rows, `(blocks, rows, kept)`, with the scales that int8 values have."""
    entries = values[part, some].to(wide)
    if scales is not None:
        group = torch.arange(part.start, part.stop, device=scales.device) // sharing(length)
        entries *= scales[group, some, None]
    return entries


def _add_products(
    indices: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    part: slice,
    dense: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Add the inner products of dense blocks, those of a part of the window, with their rows to `total`."""
    count, length = dense.shape
    for some in _chunks(total.shape[0], count * indices.shape[2]):
        index = indices[part, some].to(torch.int64)
        gathered = dense.gather(1, index.flatten(1)).view(index.shape)
        total[some] += (gathered * _entries_of(values, scales, part, some, length, total.dtype)).sum(dim=(0, 2))


def _chunks(blocks: int, entries: int, multiple: int = 1) -> list[slice]:
    """Slices over the blocks that keep `entries` a block below the size of a temporary, cut at multiples."""
    step = max(1, _CHUNK // max(1, entries * multiple)) * multiple
    return [slice(start, min(start + step, blocks)) for start in range(0, blocks, step)]
