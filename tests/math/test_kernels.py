"""Kernels: every backend against plain loops, and the backends against each other to the bit."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kernel_cases import BACKENDS, python
from naive import largest

from hf_efcp.blocks import Part, Piece, index_dtype, sharing
from hf_efcp.kernels import numba, reference

LARGEST = torch.finfo(torch.bfloat16).max


DTYPES = [torch.float32, torch.bfloat16, torch.int8]


# Few distinct values make ties; the rest are the corners of float32.
CORNERS = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-40, 1e-38, 3e38, -3e38, 0.1, 1 + 2**-9, 3.4e38]


ENTRIES = st.one_of(st.sampled_from(CORNERS), st.floats(-10, 10, width=32))


@st.composite
def blocks(draw):
    """Gradient and error of some blocks, and how many entries are kept."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    gradient, error = (draw(arrays.arrays(np.float32, shape, elements=ENTRIES)) for _ in range(2))
    kept = draw(st.integers(1, shape[1]))
    return torch.from_numpy(gradient), torch.from_numpy(error), kept


def part(indices, values, scales, length):
    """A part that begins where its parameter does."""
    return Part(Piece(0, len(indices), length, indices.shape[-1], 0), indices, values, scales)


def dots(backend, indices, values, scales, newest, rows, length):
    """The products of one part."""
    (column,) = backend.dots([part(indices, values, scales, length)], newest, rows)
    return column


def compress(backend, gradient, error, kept, dtype):
    """One row, written into the middle of a window of three."""
    count, length = gradient.shape
    error = error.clone()
    indices = torch.zeros(count, 3, kept, dtype=index_dtype(length))
    values = torch.zeros(count, 3, kept, dtype=dtype)
    scales = torch.zeros(-(-count // sharing(length)), 3, dtype=torch.bfloat16) if dtype == torch.int8 else None
    row = part(indices[:, 1], values[:, 1], None if scales is None else scales[:, 1], length)
    backend.accumulate_topk([gradient], [error], [row])
    scale = torch.ones(count, 1)
    if scales is not None:
        assert not scales[:, ::2].any()
        scale = per_block(scales, count, length)[:, 1:2]
    assert not values[:, ::2].any()
    assert not indices[:, ::2].to(torch.int64).any()
    return error, indices[:, 1].to(torch.int64), values[:, 1], scale


def per_block(scales, count, length):
    """The scales of every block, in float32."""
    return scales.float().repeat_interleave(sharing(length), dim=0)[:count]


def scales_by_hand(kept_values, length):
    """Per block: the largest magnitude of its group over 127, rounded up to bfloat16, never below 2^-126."""
    result = []
    for block in range(len(kept_values)):
        first = block // sharing(length) * sharing(length)
        largest = kept_values[first : first + sharing(length)].double().abs().max().item()
        scale = max(torch.tensor(largest, dtype=torch.float32).item() / 127, 2.0**-126)
        mantissa, exponent = math.frexp(np.float32(scale))
        result.append(math.ldexp(math.ceil(mantissa * 256), exponent - 8))
    return torch.tensor(result, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@given(blocks())
@settings(deadline=None, max_examples=150)
def test_compression_keeps_the_largest_and_feeds_back_the_rest(dtype, case):
    gradient, error, kept = case
    count = len(gradient)
    accumulator = (gradient + error).clamp(-LARGEST, LARGEST)
    results = [compress(backend, gradient, error, kept, dtype) for backend in BACKENDS]
    for rest, indices, values, scale in results:
        for block in range(count):
            assert indices[block].tolist() == largest(accumulator[block], kept)
        exact = accumulator.gather(1, indices)
        if dtype == torch.int8:
            assert torch.equal(scale.double(), scales_by_hand(exact, gradient.shape[1]))
            expected = (exact / scale).round()
            assert expected.abs().max() <= 127
        else:
            expected = exact.to(dtype)
        assert torch.equal(values, expected.to(dtype))
        stored = values.float() * scale
        assert torch.isfinite(stored).all()
        row = torch.zeros_like(accumulator).scatter_(1, indices, stored)
        assert torch.equal(rest, accumulator - row)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("length", [16383, 16384, 16385, 40000, 65536])
@pytest.mark.parametrize("few", [3, 100000])
def test_top_k_of_long_blocks_with_ties(length, few):
    """More keys than are counted at a time; with few distinct magnitudes the lowest indices are kept."""
    generator = torch.Generator().manual_seed(length)
    gradient = torch.randint(-few, few + 1, (2, length), generator=generator).float()
    kept = length // 90
    results = [compress(backend, gradient, torch.zeros(2, length), kept, torch.float32) for backend in BACKENDS]
    for rest, indices, values, _ in results:
        for block in range(2):
            assert indices[block].tolist() == largest(gradient[block], kept)
        assert torch.equal(rest.scatter(1, indices, values), gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rounding_takes_stays_in_the_error(backend):
    gradient = torch.full((1, 4), 1 + 2**-9)
    error, _, values, _ = compress(backend, gradient, torch.zeros(1, 4), 4, torch.bfloat16)
    assert values.tolist() == [[1.0] * 4]
    assert error.tolist() == [[2**-9] * 4]
    gradient = torch.tensor([[127.0, -12.25, 0.5, 1.5, 0.25]])  # halves go to the even level
    error, _, values, scale = compress(backend, gradient, torch.zeros(1, 5), 5, torch.int8)
    assert scale.tolist() == [[1.0]]
    assert values.tolist() == [[127, -12, 0, 2, 0]]
    assert error.tolist() == [[0.0, -0.25, 0.5, -0.5, 0.25]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_scales_are_shared_by_4096_entries(backend):
    """Blocks of 300: thirteen to a group. Each group has a magnitude of its own, and so does the last one, of four."""
    count = 30
    assert sharing(300) == 13
    assert [sharing(length) for length in (1, 256, 2048, 2049, 4096, 65536)] == [4096, 16, 2, 1, 1, 1]
    magnitude = torch.tensor([1.0] * 13 + [1e-6] * 13 + [1e6] * 4)[:, None]
    gradient = magnitude * torch.rand(count, 300, generator=torch.Generator().manual_seed(2)).add_(0.1)
    gradient[:, 7] = 1.27 * magnitude[:, 0]
    error, indices, values, scale = compress(backend, gradient, torch.zeros(count, 300), 3, torch.int8)
    assert scale[::13].flatten().unique().numel() == 3
    assert ((scale >= magnitude / 100) & (scale < magnitude / 99)).all()
    assert (values.amax(dim=1) >= 126).all()
    assert (error.gather(1, indices).abs() <= scale / 2).all()


def random_window(seed, count, rows, length, kept, dtype):
    """A window whose rows have distinct ascending indices, its scales, and the same as dense float64 rows."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, rows, length, generator=generator).argsort(dim=2)[:, :, :kept].sort(dim=2).values
    scales = None
    if dtype == torch.int8:
        values = torch.randint(-127, 128, (count, rows, kept), generator=generator, dtype=dtype)
        scales = torch.randn(-(-count // sharing(length)), rows, generator=generator).exp().to(torch.bfloat16)
        entries = values * per_block(scales, count, length)[:, :, None]
    else:
        values = entries = torch.randn(count, rows, kept, generator=generator).to(dtype)
    dense = torch.zeros(count, rows, length, dtype=torch.float64).scatter_(2, order, entries.double())
    return order.to(index_dtype(length)), values, scales, dense.transpose(0, 1).reshape(rows, count * length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 9), st.integers(1, 400), st.data())
@settings(deadline=None, max_examples=60)
def test_dots_and_combine_equal_dense_products(backend, dtype, seed, count, capacity, length, data):
    kept = data.draw(st.integers(1, length))
    rows = data.draw(st.integers(1, capacity))
    newest = data.draw(st.integers(0, rows - 1))
    indices, values, scales, dense = random_window(seed, count, capacity, length, kept, dtype)
    lengths = dense[:rows].norm(dim=1)

    def equal_products(column, x):
        assert column.shape == (rows,)
        assert column.dtype == torch.float64
        assert ((column - dense[:rows] @ x).abs() <= 1e-14 * lengths * x.norm()).all()

    equal_products(dots(backend, indices, values, scales, newest, rows, length), dense[newest])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, generator=generator)
    equal_products(backend.project(indices, values, x, rows, scales), x.view(-1).double())
    coefficients = torch.randn(rows, dtype=torch.float64, generator=generator)
    out = torch.full((count, length), float("nan"))
    for power, base in ((1, None), (2, None), (1, x)):
        backend.combine(indices, values, coefficients, out, scales=scales, base=base, scale=0.3, squared=power == 2)
        expected = coefficients @ dense[:rows] ** power + (0.0 if base is None else 0.3 * x.view(-1).double())
        terms = coefficients.abs() @ dense[:rows].abs() ** power
        assert ((out.view(-1) - expected).abs() <= 6e-8 * expected.abs() + 1e-14 * terms).all()


FEW = [(4096, 41, 100), (4096, 1, 1100), (4096, 256, 40), (4000, 250, 5), (256, 3, 300), (256, 16, 70), (100, 2, 17)]


def check_dots_of_sparse_rows(backend, dtype, length, kept, capacity, count=3):
    """Rows that meet by chance, rows that meet everywhere, rows of zeros, and a block in which the newest is zero."""
    indices, values, scales, _ = random_window(7, count, capacity, length, kept, dtype)
    newest = capacity // 14 * 7  # not a row of zeros
    indices[:, ::5] = indices[:, newest, None].clone()
    values[:, 1::7] = 0
    values[0, newest, ::2] = 0
    values[1, newest] = 0
    scale = torch.ones(count, capacity) if scales is None else per_block(scales, count, length)
    dense = torch.zeros(count, capacity, length, dtype=torch.float64)
    dense.scatter_(2, indices.to(torch.int64), values.double() * scale.double()[:, :, None])
    flat = dense.transpose(0, 1).reshape(capacity, -1)
    for rows in sorted({capacity, newest + 1}):
        column = dots(backend, indices, values, scales, newest, rows, length)
        assert (
            (column - flat[:rows] @ flat[newest]).abs() <= 1e-14 * flat[:rows].norm(dim=1) * flat[newest].norm()
        ).all()
    assert column.count_nonzero() > capacity // 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "kept", "capacity"), FEW)
def test_dots_of_sparse_rows(backend, dtype, length, kept, capacity):
    check_dots_of_sparse_rows(backend, dtype, length, kept, capacity)


def test_partial_sums_of_a_few_parts_at_a_time_are_the_same(monkeypatch):
    parts, expected = [], []
    for seed, length in enumerate((300, 500, 4096, 260)):
        indices, values, _, dense = random_window(seed, 20, 6, length, length // 10, torch.bfloat16)
        parts.append(part(indices, values, None, length))
        expected.append(dense @ dense[2])
    once = numba.dots(parts, 2, 6)
    torch.testing.assert_close(once, torch.stack(expected), rtol=1e-12, atol=1e-10)
    for most in (1, 13):
        monkeypatch.setattr(numba.products, "_PARTIAL", most)
        assert torch.equal(numba.dots(parts, 2, 6), once)


def test_a_processor_without_vectors_of_512_bits_adds_every_product(tmp_path):
    here = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = python(
        f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parents[up]) for up in (0, 1)]!r}
        from test_kernels import *
        assert not numba.products._WITH_BITS
        for length, kept, capacity in FEW[::3]:
            check_dots_of_sparse_rows(numba, torch.bfloat16, length, kept, capacity)
        print("equal")
        """,
        here,
    )
    assert done.stdout.split() == ["equal"], done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("count", "length", "kept"), [(40, 4096, 600), (450, 400, 60)])
def test_many_blocks_are_cut_into_ranges(backend, dtype, count, length, kept):
    """More blocks than one task or one temporary holds."""
    indices, values, scales, dense = random_window(0, count, 7, length, kept, dtype)
    column = dots(backend, indices, values, scales, 3, 7, length)
    torch.testing.assert_close(column, dense @ dense[3], rtol=1e-12, atol=1e-14 * dense[3].norm().item() ** 2)
    coefficients = torch.linspace(-1, 2, 7, dtype=torch.float64)
    out = torch.empty(count, length)
    backend.combine(indices, values, coefficients, out, scales=scales)
    torch.testing.assert_close(out.view(-1), (coefficients @ dense).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_squares_of_many_vectors(backend):
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(size, generator=generator) for size in (5, 0, 1, 700_001, 64)]
    vectors[2].fill_(math.nan)
    vectors.append(torch.tensor([1.0, -math.inf]))
    before = [vector.clone() for vector in vectors]
    found = backend.squares(vectors)
    assert (found.shape, found.dtype) == ((6,), torch.float64)
    expected = [vector.double().square().sum().item() for vector in vectors]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(vectors, before, strict=True))
    assert backend.squares([]).tolist() == []


def test_sums_on_a_device_without_float64_leave_what_is_summed(monkeypatch):
    monkeypatch.setattr(reference.dense, "widest", lambda device: torch.float32)
    update = torch.arange(6.0)
    assert reference.squares([update]).tolist() == [55.0]
    assert update.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_of_many_blocks(backend):
    gradient = torch.randn(40, 4096, generator=torch.Generator().manual_seed(1))
    error, chosen, stored, _ = compress(backend, gradient, torch.zeros(40, 4096), 41, torch.float32)
    assert torch.equal(stored.abs().sort(descending=True).values, gradient.abs().topk(41).values)
    assert torch.equal(error.scatter(1, chosen, stored), gradient)
