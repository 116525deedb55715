"""Stochastic rounding: 4 bits, int8 and bfloat16."""

from __future__ import annotations

import torch

from .. import BUCKET
from .chunks import LARGEST, SMALLEST, chunks, entries_of_buckets, noise_of, padded


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
    for part in chunks(scale.shape[0], BUCKET):
        span = entries_of_buckets(part, error)
        x = padded(error[span].clamp(-LARGEST, LARGEST), BUCKET).view(-1, BUCKET)
        magnitude = x.abs()
        largest = magnitude.amax(dim=1, keepdim=True)
        unit = (largest / levels).clamp_(min=SMALLEST)
        multiple = magnitude / unit
        whole = multiple.floor()
        threshold = ((multiple - whole) * 2.0**31).to(torch.int64)
        noise = noise_of(start + span.start, x.numel(), key, x.device).view_as(x) >> 1
        level = (whole.to(torch.int64) + (noise < threshold)).clamp_(max=levels)
        signed = torch.where(x < 0, -level, level).view(-1)[: span.stop - span.start]
        scale[part] = unit.view(-1)
        if stored.dtype == torch.int8:
            stored[span] = signed.to(torch.int8)
        else:
            pairs = padded(signed & 15, 2).view(-1, 2)
            stored[span.start // 2 : (span.stop + 1) // 2] = (pairs[:, 0] | (pairs[:, 1] << 4)).to(torch.uint8)


def dequantize(stored: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """`out = stored * scale`, bucket by bucket: what `quantize` kept.

    Args:
        stored: As in `quantize`.
        scale: As in `quantize`.
        out: `(n,)`, float32; overwritten.
    """
    for part in chunks(scale.shape[0], BUCKET):
        span = entries_of_buckets(part, out)
        if stored.dtype == torch.int8:
            levels = stored[span]
        else:
            both = stored[span.start // 2 : (span.stop + 1) // 2].to(torch.int8)
            # The shift to the left drops the upper half, the one to the right copies the sign.
            levels = torch.stack(((both << 4) >> 4, both >> 4), dim=1).view(-1)[: span.stop - span.start]
        product = padded(levels, BUCKET).view(-1, BUCKET).to(torch.float32) * scale[part, None]
        out[span] = product.view(-1)[: span.stop - span.start]


def round_to_bfloat16(error: torch.Tensor, stored: torch.Tensor, key: int, start: int = 0) -> None:
    """Round an error stochastically to one of its two neighbours in bfloat16; the expectation is the error.

    Args:
        error: `(n,)`, float32, finite.
        stored: `(n,)`, bfloat16; written.
        key: As in `quantize`.
        start: As in `quantize`.
    """
    for span in chunks(error.shape[0], 1):
        x = error[span].clamp(-LARGEST, LARGEST)
        noise = noise_of(start + span.start, x.shape[0], key, x.device) & 0xFFFF
        # Magnitudes are ordered as their bits are: noise below the cut carries into what is kept.
        bits = (x.view(torch.int32) + noise.to(torch.int32)) >> 16
        stored[span] = bits.to(torch.int16).view(torch.bfloat16)
