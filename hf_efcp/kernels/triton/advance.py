"""What changes from one step to the next, made on the device from counters, so that nothing but them has to be kept."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import (
    CORRECTION,
    DECAY,
    ERROR_KEY,
    FACTOR,
    FIELDS,
    FIRST_KEY,
    GRADIENT,
    HELD,
    KEEP,
    LR,
    MOMENTUM,
    NEWEST,
    SECOND_KEY,
    THETA,
    WIDE,
    noise,
)

# Columns of what tells a row's counters, and of a group's hyperparameters; of both there are two tables.
PUSHED, GRADIENTS, POSITION, GROUP = (tl.constexpr(place) for place in range(4))
TOLD = tl.constexpr(4)
GROUP_LR, GROUP_DECAY, GROUP_DECOUPLED, GROUP_MOMENTUM = (tl.constexpr(place) for place in range(4))
GROUP_WIDTH = tl.constexpr(4)
# Numbers of the whole optimizer, before those of the groups: logarithms of the moments' decays, and `solve`'s.
LOG_BETA2, LOG_BETA1, LOG_WEIGHT, RELATIVE_DAMP, TRUST_LR = (tl.constexpr(place) for place in range(5))
GROUPS = tl.constexpr(5)


@triton.jit
def power(logarithm, exponent):
    """`beta^n`, float64, from the logarithm of `beta`: it depends on `n` alone, as a resumed run needs it."""
    return tl.exp(logarithm * exponent.to(tl.float64))


@triton.jit
def advance(
    table,
    numbers,
    told,
    count,
    counters,
    addresses,
    hyper,
    capacity,
    METRIC: tl.constexpr,
    CHANNELS: tl.constexpr,
    SECOND_CHANNEL: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Bring some rows of the table to the step that the counters stand at.

    Keys of the noise are those of `hf_efcp.noise` and `hf_efcp.metric`.
    """
    row = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    inside = row < count
    own = told + row * TOLD
    pushed = tl.load(counters + tl.load(own + PUSHED, mask=inside, other=0), mask=inside, other=1)
    steps = tl.load(counters + tl.load(own + GRADIENTS, mask=inside, other=0), mask=inside, other=1)
    position = tl.load(own + POSITION, mask=inside, other=0)
    group = hyper + GROUPS + tl.load(own + GROUP, mask=inside, other=0) * GROUP_WIDTH

    line = table + row * FIELDS
    tl.store(line + GRADIENT, tl.load(addresses + 2 * row, mask=inside, other=0), mask=inside)
    tl.store(line + THETA, tl.load(addresses + 2 * row + 1, mask=inside, other=0), mask=inside)
    tl.store(line + NEWEST, (pushed - 1) % capacity, mask=inside)
    tl.store(line + HELD, tl.minimum(pushed, capacity), mask=inside)
    zero = tl.zeros((LENGTH,), tl.uint32)
    tl.store(line + ERROR_KEY, noise(position, noise(pushed, zero)).to(tl.int64), mask=inside)

    lr = tl.load(group + GROUP_LR, mask=inside, other=0.0)
    decay = tl.load(group + GROUP_DECAY, mask=inside, other=0.0)
    decoupled = tl.load(group + GROUP_DECOUPLED, mask=inside, other=0.0) > 0.0
    value = numbers + row * WIDE
    tl.store(value + LR, lr.to(tl.float32), mask=inside)
    tl.store(value + KEEP, tl.where(decoupled, 1.0 - lr * decay, 1.0).to(tl.float32), mask=inside)
    tl.store(value + DECAY, tl.where(decoupled, 0.0, decay).to(tl.float32), mask=inside)
    momentum = tl.load(group + GROUP_MOMENTUM, mask=inside, other=0.0)
    tl.store(value + MOMENTUM, momentum.to(tl.float32), mask=inside)
    if METRIC:
        second = noise(noise(steps * CHANNELS + SECOND_CHANNEL, zero), zero)
        first = noise(noise(steps * CHANNELS + FIRST_CHANNEL, zero), zero)
        tl.store(line + SECOND_KEY, noise(position, second).to(tl.int64), mask=inside)
        tl.store(line + FIRST_KEY, noise(position, first).to(tl.int64), mask=inside)
        correction = 1.0 / tl.sqrt(1.0 - power(tl.load(hyper + LOG_BETA2), steps))
        factor = 1.0 / (1.0 - power(tl.load(hyper + LOG_BETA1), steps))
        tl.store(value + CORRECTION, correction.to(tl.float32), mask=inside)
        tl.store(value + FACTOR, factor.to(tl.float32), mask=inside)
