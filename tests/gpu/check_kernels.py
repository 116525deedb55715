"""Single Triton kernels in the interpreter, against plain torch to the bit, or against float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rig import FiniteCheck, Model, error_of, place_scratch, row, settings, sparse_rows

from hf_efcp import noise
from hf_efcp.compressors import SparseWindow
from hf_efcp.errors import UINT4, error_store
from hf_efcp.kernels import reference

CPU = torch.device("cpu")
# Few distinct values make ties; the rest are the corners of float32.
CORNERS = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-40, 1e-38, 3e38, -3e38, 0.1, 1 + 2**-9, 3.4e38]
ENTRIES = st.one_of(st.sampled_from(CORNERS), st.floats(-10, 10, width=32))
ERRORS = [torch.float32, torch.bfloat16, torch.int8, UINT4]


def vectors(count):
    """So many float32 vectors of one length."""
    length = st.one_of(st.integers(1, 70), st.integers(120, 300))
    return length.flatmap(lambda n: st.tuples(*[arrays.arrays(np.float32, n, elements=ENTRIES)] * count))


def same_bits(left, right):
    """Equal, with zeros of both signs told apart only by what they are stored as."""
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("error_dtype", ERRORS)
@given(drawn=vectors(2), block_size=st.sampled_from([64, 128]), density=st.sampled_from([0.01, 0.2, 1.0]))
@effort(max_examples=8, deadline=None)
def test_top_k_is_the_references_to_the_bit(value_dtype, error_dtype, drawn, block_size, density):
    gradient, old = (torch.from_numpy(x) for x in drawn)
    window, store, key = SparseWindow(3, density, block_size, value_dtype), error_store(error_dtype), noise.key(5, 0)
    states = [window.allocate(gradient.shape, CPU) for _ in range(2)]
    kept, accumulated = error_of(old.clamp(-3e38, 3e38), error_dtype, reference)
    expected = {name: tensor.clone() for name, tensor in kept.items()}

    row_of = window.row(states[0], gradient.shape, 1)
    pieces = [part.piece for part in row_of]
    reference.accumulate_topk(
        [piece.of(gradient) for piece in pieces], [piece.of(accumulated) for piece in pieces], row_of
    )
    if error_dtype == torch.float32:
        expected["error"] = accumulated
    else:
        store.save(expected, accumulated, slice(0, len(gradient)), 5, 0, reference)

    model = Model(CPU)
    rows = sparse_rows(gradient, kept, states[1], window, key)
    compiled = settings(stored=error_dtype, values=value_dtype, block_size=block_size)
    model.begin(rows, 1)
    model.push_top_k(rows, compiled)
    for name, tensor in states[0].items():
        assert same_bits(states[1][name], tensor), name
    for name, tensor in expected.items():
        if error_dtype in (torch.float32, torch.bfloat16):  # a zero may have either sign
            assert torch.equal(kept[name], tensor)
        else:
            assert same_bits(kept[name], tensor), name


@given(drawn=vectors(2), steps=st.integers(1, 3))
@effort(max_examples=15, deadline=None)
def test_levels_of_second_moments_are_the_references_to_the_bit(drawn, steps):
    gradient, _ = (torch.from_numpy(x) for x in drawn)
    roots = torch.zeros(len(gradient), dtype=torch.int8)
    scale = torch.zeros(-(-len(gradient) // 64))
    mine, my_scale = roots.clone(), scale.clone()
    model, compiled = Model(CPU), settings(metric=torch.int8)
    for step in range(steps):
        key = noise.key(step, 3)
        out = torch.zeros_like(gradient)
        reference.observe_levels(roots, scale, gradient, 0.9, key, 0, 1.0, 1e-8, out)
        rows = [row(gradient, {"second": mine, "second_scale": my_scale}, second_key=key)]
        model.begin(rows, 1)
        model.observe(rows, compiled)
    assert same_bits(mine, roots)
    assert same_bits(my_scale, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments(dtype):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1000, generator=generator)
    v = torch.rand(1000, generator=generator).to(dtype)
    mine, model = v.clone(), Model(CPU)
    rows = [row(gradient, {"second": mine}, second_key=7)]
    model.begin(rows, 1)
    model.observe(rows, settings(metric=dtype))
    exact = 0.9 * v.double() + 0.1 * gradient.double() ** 2
    difference = (mine.double() - exact).abs() / exact
    assert float(difference.max()) < (3e-7 if dtype == torch.float32 else 2**-7)
    if dtype == torch.bfloat16:  # rounded both ways, and not to nearest
        assert 0.3 < float((mine.double() > exact).double().mean()) < 0.7
        assert abs(float((mine.double() - exact).mean() / exact.mean())) < 3e-4


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error_dtype", ERRORS)
@given(drawn=vectors(2))
@effort(max_examples=8, deadline=None)
def test_what_is_kept_whole_is_the_references_to_the_bit(value_dtype, error_dtype, drawn):
    gradient, old = (torch.from_numpy(x).clamp(-1e38, 1e38) for x in drawn)
    kept, accumulator = error_of(old, error_dtype, reference)
    expected, store = {name: tensor.clone() for name, tensor in kept.items()}, error_store(error_dtype)
    accumulator += gradient
    line = accumulator.to(value_dtype, copy=True)
    accumulator -= line
    if error_dtype == torch.float32:
        expected["error"] = accumulator
    else:
        store.save(expected, accumulator, slice(0, len(gradient)), 5, 2, reference)
    values = torch.zeros(3, len(gradient), dtype=value_dtype)
    rows = [row(gradient, kept | {"values": values}, error_key=noise.key(5, 2))]
    place_scratch(rows, 2)
    model = Model(CPU)
    model.begin(rows, 1)
    model.push_low_rank(rows, settings(stored=error_dtype, values=value_dtype, rank=2))
    assert not values[::2].any()
    assert torch.equal(values[1], line)
    for name, tensor in expected.items():
        assert torch.equal(kept[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(dtype, bad):
    gradients = [
        torch.full((length,), 1e-40 if dtype == torch.float32 else 1.0, dtype=dtype) for length in (1, 4097, 5)
    ]
    check = FiniteCheck(CPU)
    assert check.find(gradients) == [False] * 3
    gradients[0][0] = torch.finfo(dtype).max
    gradients[1][4096] = bad
    assert check.find(gradients) == [False, True, False]


def test_ten_million_entries_in_three_tensors():
    gradients = [torch.zeros(length) for length in (1, 9_999_998, 1)]
    check = FiniteCheck(CPU)
    assert check.find(gradients) == [False] * 3
    gradients[1][-1] = math.nan
    assert check.find(gradients) == [False, True, False]


@pytest.mark.parametrize(("height", "rank"), [(9, 1), (40, 4), (600, 3), (70, 16)])
@pytest.mark.parametrize("kind", ["full", "deficient", "zero", "tiny", "huge"])
def test_the_basis_is_orthonormal_and_spans_the_columns(height, rank, kind):
    generator = torch.Generator().manual_seed(height + rank)
    A = torch.randn(height, rank, generator=generator)
    if kind == "deficient":
        A = A[:, :1].repeat(1, rank) * torch.arange(1, rank + 1)
    A *= {"zero": 0.0, "tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    basis = orthonormal(A)
    # float32 at every pass, and not more than LAPACK's own loss
    assert float((basis.T @ basis - torch.eye(rank, dtype=torch.float64)).abs().max()) < 3e-6
    left_over = A.double() - basis @ (basis.T @ A.double())
    assert float(left_over.norm()) <= 1e-6 * float(A.double().norm())


def orthonormal(A):
    """What `orthonormalise` makes of the columns of a matrix, float64."""
    from hf_efcp.kernels.triton.launch import launch, padded
    from hf_efcp.kernels.triton.orthonormal import orthonormalise

    height, rank = A.shape
    scratch = A.T.contiguous().view(-1).clone()
    model = Model(CPU)
    model.begin([row(torch.zeros(height * 50), {}, height=height, width=50)], 1)
    which = torch.zeros(1, dtype=torch.int64)
    launch(orthonormalise, (1,), model.table, which, scratch, RANK=rank, PADDED=padded(rank), ROWS=64)
    return scratch.view(rank, height).T.double()


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.int8])
@given(
    numel=st.sampled_from([1, 64, 130, 700]),
    density=st.sampled_from([0.02, 0.3, 1.0]),
    newest=st.integers(0, 2),
    held=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@effort(max_examples=8, deadline=None)
def test_sparse_products_and_combinations(value_dtype, numel, density, newest, held, seed):
    newest = min(newest, held - 1)
    generator = torch.Generator().manual_seed(seed)
    window = SparseWindow(3, density, 128, value_dtype)
    state, shape = window.allocate(torch.Size((numel,)), CPU), torch.Size((numel,))
    dense = torch.zeros(3, numel, dtype=torch.float64)
    for position in range(held):
        if position == 1 and newest != 1:
            continue  # a row of zeros
        gradient = torch.randn(numel, generator=generator)
        error, written = torch.zeros(numel), window.row(state, shape, position)
        pieces = [part.piece for part in written]
        reference.accumulate_topk([p.of(gradient) for p in pieces], [p.of(error) for p in pieces], written)
        dense[position] = gradient.double() - error.double()
    gradient = torch.randn(numel, generator=generator)
    rows = sparse_rows(gradient, {}, state, window, 0, newest)
    for own in rows:
        own.theta = rows[0].theta
        own.places["held"] = held
        own.numbers |= {"lr": 0.5, "keep": 0.9}
    rows[0].theta.fill_(2.0)
    model, compiled = Model(CPU), settings(values=value_dtype, block_size=128)
    model.begin(rows, 1)
    ((column,),) = model.add_up(*model.products_sparse(rows, compiled))
    dense_too = settings(values=value_dtype, block_size=128, outside=True)
    (again,), (products,) = model.add_up(*model.products_sparse(rows, dense_too))
    assert torch.equal(again, column)
    assert torch.allclose(products[:held], dense[:held] @ gradient.double(), rtol=1e-6, atol=1e-6 * numel**0.5)
    exact = dense @ dense[newest]
    assert torch.allclose(column[:held], exact[:held], rtol=1e-6, atol=1e-6 * float(exact[newest]))
    assert not column[held:].any()
    c = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    model.move_sparse(rows, compiled, c)
    update = c[0, :held] @ dense[:held]
    moved = rows[0].theta.double() - 0.9 * 2.0
    assert torch.allclose(moved, -0.5 * update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@given(
    height=st.sampled_from([5, 33, 70]),
    width=st.sampled_from([6, 64, 75]),
    rank=st.sampled_from([1, 2, 4]),
    held=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@effort(max_examples=8, deadline=None)
def test_low_rank_products_and_combinations(value_dtype, height, width, rank, held, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(3, rank, side, generator=generator).to(value_dtype) for side in (height, width))
    whole = torch.randn(3, 45, generator=generator).to(value_dtype)
    lines = torch.einsum("mkr,mkc->mrc", left.double(), right.double()).flatten(1), whole.double()
    x = [torch.randn(height * width, generator=generator), torch.randn(45, generator=generator)]
    rows = [
        row(x[0], {"left": left, "right": right}, height=height, width=width, newest=held - 1),
        row(x[1], {"values": whole}, newest=held - 1, unit=1, lr=0.25, keep=1.0),
    ]
    for own in rows:
        own.places["held"] = held
    rows[0].numbers |= {"lr": 0.5, "keep": 0.9}
    for own in rows:
        own.theta.fill_(2.0)
    model, compiled = Model(CPU), settings(values=value_dtype, rank=rank)
    model.begin(rows, 2)
    (columns,) = model.add_up(*model.products_low_rank(rows, compiled))
    dense_too = settings(values=value_dtype, rank=rank, outside=True)
    again, products = model.add_up(*model.products_low_rank(rows, dense_too))
    assert torch.equal(again, columns)
    for product, line, vector in zip(products, lines, x, strict=True):
        lengths = float(line.norm(dim=1).max() * vector.norm())
        assert float((product[:held] - line[:held] @ vector.double()).abs().max()) < 1e-6 * lengths
    c = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    model.move_low_rank(rows, compiled, c)
    for own, column, line, weights in zip(rows, columns, lines, c, strict=True):
        assert torch.allclose(column[:held], line[:held] @ line[held - 1], rtol=1e-9)
        assert not column[held:].any()
        moved = own.theta.double() - own.numbers["keep"] * 2.0
        update = weights[:held] @ line[:held]
        assert float((moved + own.numbers["lr"] * update).abs().max()) < 1e-6 * max(1.0, float(update.abs().max()))


def test_a_coefficient_beyond_float32_of_a_tiny_row():
    left, right = torch.ones(3, 1, 20), torch.full((3, 1, 30), 1e-35)
    rows = [row(torch.zeros(600), {"left": left, "right": right}, height=20, width=30, held=1, newest=0, lr=1.0)]
    model = Model(CPU)
    model.begin(rows, 1)
    model.move_low_rank(rows, settings(rank=1), torch.tensor([[1e42, 0.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(rows[0].theta, torch.full((600,), -1e7), rtol=1e-6)
