"""AdamW's second moment, and vectors divided by its root."""

from __future__ import annotations

import torch

from .. import BUCKET, WHITENED, widest
from .chunks import chunks, entries_of_buckets
from .rounding import dequantize, quantize


def observe(moments: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
    """AdamW's second moment: `v <- beta2 v + (1 - beta2) g^2`, saturating where float32 ends.

    Args:
        moments: `v`, `(n,)`, float32; updated.
        gradient: `g`, `(n,)`, float32.
        beta2: Decay.
    """
    for part in chunks(len(moments), 1):
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
    for part in chunks(len(x), 1):
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
    for part in chunks(len(scale), BUCKET):
        span = entries_of_buckets(part, roots)
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
    for part in chunks(-(-(start + len(x)) // BUCKET) - first, BUCKET):
        begin, end = (first + part.start) * BUCKET, min((first + part.stop) * BUCKET, start + len(x))
        root = torch.empty(end - begin, dtype=torch.float32, device=x.device)
        dequantize(roots[begin:end], scale[first + part.start : first + part.stop], root)
        root = root[max(start - begin, 0) :]
        inside = slice(max(begin, start) - start, end - start)
        divided = (factor * x[inside] * (root * correction).add_(eps).rsqrt_()).clamp_(-WHITENED, WHITENED)
        x[inside] = torch.where(root > 0.0, divided, 0.0)
