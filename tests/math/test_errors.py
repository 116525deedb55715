"""The kept error: what quantising it may and may not do, in both backends."""

import math

import numpy as np
import pytest
import torch
from error_cases import BELOW_FLOAT32, QUANTISED
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from states import assert_same

from hf_efcp.errors import error_store
from hf_efcp.kernels import numba, reference
from hf_efcp.noise import key, mix

BACKENDS = [reference, numba]


LARGEST = torch.finfo(torch.bfloat16).max  # what the accumulator saturates at


CORNERS = [0.0, -0.0, 1.0, -1.0, 7.0, 127.0, 1e-45, -3e-45, -1e-40, 1.1754944e-38, 3e38, -LARGEST, 0.1]


ENTRIES = st.one_of(st.sampled_from(CORNERS), st.floats(-10, 10, width=32))


SMALL = st.one_of(st.just(0.0), st.floats(-(2.0**-121), 2.0**-121, width=32))


ERRORS = st.one_of(
    *(
        st.integers(0, size).flatmap(lambda n, e=entries: arrays.arrays(np.float32, n, elements=e))
        for size, entries in ((1000, ENTRIES), (200, ENTRIES), (200, SMALL), (70, st.just(0.0)))
    )
)


def kept(backend, dtype, x, step=1, position=0):
    """What a store gives back of an error, its state, and the scale of every entry."""
    store, whole = error_store(dtype), slice(0, x.numel())
    state = store.allocate(x.shape, "cpu")
    store.save(state, x, whole, step, position, backend)
    out = store.load(state, whole, backend)
    scale = state["error_scale"].repeat_interleave(64)[: x.numel()] if dtype in QUANTISED else None
    return out, state, scale


def quantised_by_hand(x, levels, step, position):
    """One entry after the other in numpy's float32 and Python's integers."""

    def hashed(bits):
        bits ^= bits >> 16
        bits = bits * 0x21F0AAAD % 2**32
        bits ^= bits >> 15
        bits = bits * 0x735A2D97 % 2**32
        return bits ^ (bits >> 15)

    result = []
    for i, value in enumerate(x):
        bucket = x[i // 64 * 64 : i // 64 * 64 + 64]
        scale = max(np.abs(bucket).max() / np.float32(levels), np.float32(2.0**-126))
        multiple = float(np.abs(value) / scale)
        noise = hashed(i ^ hashed(hashed(step) ^ position)) // 2 / 2**31
        level = min(math.floor(multiple) + (noise < multiple % 1.0), levels)
        result.append(np.float32(math.copysign(level, value)) * scale if level else np.float32(0.0))
    return np.array(result, dtype=np.float32)


@pytest.mark.parametrize("dtype", QUANTISED)
@given(ERRORS, st.integers(1, 2**40), st.integers(0, 300))
@settings(deadline=None, max_examples=150)
def test_buckets_keep_zeros_and_are_off_by_less_than_a_level(dtype, x, step, position):
    x = torch.from_numpy(x)
    before = x.clone()
    (out, state, scale), (other, other_state, _) = (kept(b, dtype, x, step, position) for b in BACKENDS)
    assert torch.equal(x, before)
    assert_same(state, other_state)
    assert torch.equal(out, other)
    assert torch.isfinite(out).all()
    assert ((out - x).abs() < scale).all()
    assert not out[x == 0].any()
    assert (out * x >= 0).all()
    expected = [max(b.abs().max().item() / QUANTISED[dtype], 2.0**-126) for b in x.split(64) if b.numel()]
    torch.testing.assert_close(state["error_scale"], torch.tensor(expected), rtol=1e-6, atol=0.0)
    if x.numel() <= 200:
        by_hand = quantised_by_hand(x.numpy(), QUANTISED[dtype], step % 2**32, position)
        assert np.array_equal(out.numpy(), by_hand)


@given(ERRORS, st.integers(1, 2**40), st.integers(0, 300))
@settings(deadline=None, max_examples=100)
def test_bfloat16_rounds_to_a_neighbour(x, step, position):
    x = torch.from_numpy(x)
    (out, state, _), (other, other_state, _) = (kept(b, torch.bfloat16, x, step, position) for b in BACKENDS)
    assert_same(state, other_state)
    assert torch.equal(out, other)
    towards_zero = (x.view(torch.int32) & -65536).view(torch.float32)
    away = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert torch.where(towards_zero == x, out == x, (out == towards_zero) | (out == away)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BELOW_FLOAT32)
def test_slabs_keep_what_the_whole_would(dtype, backend):
    """Also the noise: where the cuts are is nobody's business."""
    x = torch.randn(1003, generator=torch.Generator().manual_seed(53))
    whole, state, _ = kept(backend, dtype, x, step=9, position=4)
    store = error_store(dtype)
    parts = store.allocate(x.shape, "cpu")
    for slab in (slice(0, 64), slice(64, 640), slice(640, 1003)):
        store.save(parts, x[slab].clone(), slab, 9, 4, backend)
        assert torch.equal(store.load(parts, slab, backend), whole[slab])
    assert_same(parts, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BELOW_FLOAT32)
def test_what_is_kept_has_the_expectation_of_the_error(backend, dtype):
    """Means over many steps, in units of what they may deviate by: their squares are chi-square distributed."""
    generator = torch.Generator().manual_seed(50)
    x = torch.randn(677, generator=generator) * torch.logspace(-3, 3, 677)
    steps = 2000
    total = torch.zeros(677, dtype=torch.float64)
    for step in range(1, steps + 1):
        out, _, scale = kept(backend, dtype, x, step, position=3)
        total += out.double()
    if scale is None:
        floor = (x.view(torch.int32) & -65536).view(torch.float32).double()
        width = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32).double() - floor
    else:
        width = scale.double()
        floor = (x.double() / width).floor() * width
    fraction = (x.double() - floor) / width
    deviation = width.abs() * (fraction * (1 - fraction) / steps).sqrt()
    # Where hardly ever a level is left, a mean is not normal yet.
    normal = (fraction * (1 - fraction)).abs() * steps > 5
    assert normal.sum() > 350
    z = (total / steps - x.double())[normal] / deviation[normal]
    count = z.numel()
    assert z.abs().max() < 5
    assert abs(z.sum()) < 4 * count**0.5
    assert abs((z**2).sum() - count) < 4 * (2 * count) ** 0.5


def test_noise_of_neighbours_steps_and_positions_is_independent():
    count = 1 << 18
    streams = torch.stack([
        mix(torch.arange(count) ^ key(step, position)).double() / 2**32 - 0.5
        for step, position in ((1, 0), (2, 0), (1, 1), (2**32 + 3, 0))
    ])  # fmt: skip
    streams = torch.cat([streams, torch.stack([streams[0].roll(shift) for shift in (1, 2, 64)])])
    assert (streams.mean(dim=1).abs() < 5 * (1 / 12 / count) ** 0.5).all()
    assert (torch.corrcoef(streams) - torch.eye(len(streams))).abs().max() < 5 / count**0.5


def test_noise_is_one_to_one_and_one_definition():
    values = torch.arange(1 << 20) * 4093 % 2**32
    mixed = mix(values)
    assert mixed.unique().numel() == values.numel()
    assert 0 <= mixed.min() < 2**13 < 2**32 - 2**13 < mixed.max() < 2**32
    assert [mix(value) for value in values[:50].tolist()] == mixed[:50].tolist()
    assert [mix(value) for value in (0, 1, 2**32 - 1)] == mix(torch.tensor([0, 1, 2**32 - 1])).tolist()
    assert len({key(step, position) for step in range(100) for position in range(100)}) == 10000
