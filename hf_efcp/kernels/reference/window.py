"""Top-k rows: into a window, their inner products and their combinations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...blocks import Part, sharing
from .. import widest
from .chunks import LARGEST, LEVELS, SMALLEST, chunks, padded


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
    for part in chunks(blocks, length, sharing(length)):
        accumulator = (error[part] + gradient[part]).clamp_(-LARGEST, LARGEST)
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
    for part in chunks(blocks, max(length, rows * kept)):
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
    for part in chunks(blocks, max(dense.shape[1], rows * kept)):
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
    for part in chunks(blocks, max(out.shape[1], rows * kept)):
        count = part.stop - part.start
        total = torch.zeros_like(out[part], dtype=wide) if base is None else scale * base[part].to(wide)
        for some in chunks(rows, count * kept):
            index = indices[part, some].to(torch.int64).flatten(1)
            value = _entries_of(values, scales, part, some, out.shape[1], wide)
            total.scatter_add_(1, index, ((value * value if squared else value) * weights[some]).flatten(1))
        out[part] = total.to(out.dtype)


def _shared_scales(exact: torch.Tensor, share: int) -> torch.Tensor:
    """The scales of `share` blocks of kept entries each: the largest magnitude over the levels, rounded up."""
    largest = padded(exact.abs().amax(dim=1), share).view(-1, share).amax(dim=1)
    unit = (largest / LEVELS).clamp_(min=SMALLEST)
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
    for some in chunks(total.shape[0], count * indices.shape[2]):
        index = indices[part, some].to(torch.int64)
        gathered = dense.gather(1, index.flatten(1)).view(index.shape)
        total[some] += (gathered * _entries_of(values, scales, part, some, length, total.dtype)).sum(dim=(0, 2))
