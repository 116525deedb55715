"""Noise without a generator: a hash of when and where. Equal on replicas and after a resume, with no state to save."""

from __future__ import annotations

from typing import TypeVar

import torch

MASK = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)  # below 2^31: the product of one and 32 bits fits int64

Bits = TypeVar("Bits", int, torch.Tensor)


def mix(bits: Bits) -> Bits:
    """Spread 32 bits over 32 bits, one to one: shifts and products with which flipping a bit flips about half of them.

    Args:
        bits: 0 to 2^32 - 1, as an int or an int64 tensor.

    Returns:
        The same range and type.
    """
    bits = bits ^ (bits >> 16)
    bits = (bits * MULTIPLIERS[0]) & MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * MULTIPLIERS[1]) & MASK
    return bits ^ (bits >> 15)


def key(step: int, position: int) -> int:
    """What tells the noise of one parameter in one step from all other; entry `i` then takes `mix(i ^ key)`.

    Args:
        step: Number of the step.
        position: Position of the parameter among all of the optimizer.

    Returns:
        0 to 2^32 - 1.
    """
    return mix(mix(step & MASK) ^ (position & MASK))
