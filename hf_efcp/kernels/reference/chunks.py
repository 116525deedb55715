"""How large temporaries are, and the numbers that all kernels have in common."""

from __future__ import annotations

import torch

from ...noise import MASK, mix
from .. import BUCKET

_CHUNK = 1 << 19  # entries of a temporary
# The accumulator saturates at the largest bfloat16: what is stored never rounds to infinity, and e + g cannot overflow.
LARGEST = torch.finfo(torch.bfloat16).max
LEVELS = 127  # of an int8 value, on each side of zero
# A smaller scale would have few bits left, or none.
SMALLEST = torch.finfo(torch.float32).tiny


def chunks(blocks: int, entries: int, multiple: int = 1) -> list[slice]:
    """Slices over the blocks that keep `entries` a block below the size of a temporary, cut at multiples."""
    step = max(1, _CHUNK // max(1, entries * multiple)) * multiple
    return [slice(start, min(start + step, blocks)) for start in range(0, blocks, step)]


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    """The tensor with zeros behind it, up to a multiple."""
    return torch.nn.functional.pad(flat, (0, -flat.shape[0] % multiple))


def entries_of_buckets(buckets: slice, flat: torch.Tensor) -> slice:
    """The entries of some buckets; the last bucket may be short."""
    return slice(buckets.start * BUCKET, min(buckets.stop * BUCKET, flat.shape[0]))


def noise_of(start: int, count: int, key: int, device: torch.device) -> torch.Tensor:
    """32 bits of noise for `count` entries from `start`, as int64."""
    return mix((torch.arange(start, start + count, device=device) & MASK) ^ key)
