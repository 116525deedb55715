"""Low-rank rows: the compression by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import SHAPES, dense_rows
from papers import LowRankGGT, LowRankMFAC
from problems import set_gradients
from states import assert_same

from hf_efcp import estimate_memory
from hf_efcp.compressors import Job, LowRank, LowRankWindow, matrix
from hf_efcp.kernels import reference


class Compression:
    """A compressor with the error and the window of one matrix."""

    def __init__(self, shape, rank, *, value_dtype=torch.float32, seed=0, position=0):
        self.shape, self.compressor = torch.Size(shape), LowRank(rank, value_dtype, seed)
        self.window = self.compressor.window(1)
        self.state = self.window.allocate(self.shape, "cpu")
        self.state |= self.compressor.allocate(self.shape, "cpu", position)
        self.error = torch.zeros(self.shape)

    def push(self, gradient):
        row = self.window.row(self.state, self.shape, 0)
        self.compressor.compress([Job(None, self.error.add_(gradient), row, self.state)], reference)
        return dense_rows(self.state)[0].view(self.shape)

    @property
    def factors(self):
        return self.state["left"][0].double().T, self.state["right"][0].double().T


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 1), ((30, 20), 4), ((7, 50), 3), ((6, 4, 3, 2), 2)])
def test_one_power_iteration_from_the_last_factors(shape, rank, scale):
    generator = torch.Generator().manual_seed(1)
    compression = Compression(shape, rank)
    for _ in range(4):
        gradient = scale * torch.randn(shape, generator=generator)
        accumulator = (compression.error + gradient).double().flatten(1)
        start = compression.state["start"].double().T.clone()
        row = compression.push(gradient).flatten(1)
        P, Q = compression.factors
        assert (P.shape, Q.shape) == ((shape[0], rank), (accumulator.shape[1], rank))
        assert (P.T @ P - torch.eye(rank)).abs().max() < 1e-6
        image = accumulator @ start
        assert (image - P @ (P.T @ image)).norm() < 1e-5 * image.norm()  # P spans A Q
        size = accumulator.norm()
        assert (row - P @ (P.T @ accumulator)).norm() < 1e-6 * size  # no row in that span is nearer
        assert (compression.error.double().flatten(1) - (accumulator - row)).norm() < 1e-6 * size
        assert 0.05 * size < (accumulator - row).norm() < 0.99 * size
        assert torch.equal(compression.state["start"], compression.state["right"][0])


def test_the_start_is_not_rounded():
    compression = Compression((30, 20), 3, value_dtype=torch.bfloat16)
    compression.push(torch.randn(30, 20, generator=torch.Generator().manual_seed(2)))
    start, right = compression.state["start"], compression.state["right"][0]
    assert torch.equal(start.bfloat16(), right)
    assert not torch.equal(start, right.float())


def test_warm_starts_find_the_best_approximation():
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (40, 30))
    matrix = left[:, :30] * (0.8 ** torch.arange(30)) @ right
    best = (0.8 ** torch.arange(4, 30)).norm()
    compression, misses = Compression((40, 30), 4), []
    for _ in range(12):
        compression.error.zero_()
        misses.append((matrix - compression.push(matrix)).norm() / best)
    assert misses[0] > 1.1
    assert misses[-1] < 1.001


def test_zero_accumulators_do_not_kill_the_start():
    """Neither all of it nor the columns that a matrix of low rank has no use for."""
    gradient = torch.randn(30, 20, generator=torch.Generator().manual_seed(4))
    first, plain = Compression((30, 20), 3), Compression((30, 20), 3)
    for _ in range(3):
        assert not first.push(torch.zeros(30, 20)).any()
        assert_same(first.state["start"], plain.state["start"])
    assert torch.equal(first.push(gradient), plain.push(gradient))
    assert plain.state["left"].any()

    spike = torch.zeros(30, 20)
    spike[4, 7] = 1.0
    compression = Compression((30, 20), 3)
    seeded = compression.state["start"].clone()
    assert torch.equal(compression.push(spike), spike.double())
    dead = ~compression.state["right"][0].any(dim=1)
    assert dead.sum() == 2
    assert torch.equal(compression.state["start"][dead], seeded[dead])
    compression.push(gradient)
    assert compression.state["right"][0].any(dim=1).all()
    assert torch.linalg.matrix_rank(compression.state["right"][0]) == 3


def test_start_vectors_come_from_the_seed_and_the_position():
    def start(seed, position):
        return LowRank(2, seed=seed).allocate(torch.Size((8, 9)), "cpu", position)["start"]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    vectors = [start(seed, position) for seed in (0, 1, 2**40) for position in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(vectors[4], start(1, 1))
    for i, one in enumerate(vectors):
        assert one.dtype == torch.float32
        assert 0.5 < one.std() < 1.5
        for other in vectors[:i]:
            assert (one - other).abs().max() > 0.1


def test_what_is_factored():
    assert matrix(torch.Size(()), 1) is None
    assert matrix(torch.Size((100,)), 1) is None
    assert matrix(torch.Size((0, 100)), 1) is None
    assert matrix(torch.Size((100, 0)), 1) is None
    assert matrix(torch.Size((2, 2)), 1) is None  # 1 * 4 >= 4
    assert matrix(torch.Size((2, 3)), 1) == (2, 3)
    assert matrix(torch.Size((30, 5)), 4) == (30, 5)
    assert matrix(torch.Size((30, 5)), 5) is None
    assert matrix(torch.Size((30, 5)), 10**9) is None
    assert matrix(torch.Size((8, 3, 2, 2)), 2) == (8, 12)
    window = LowRankWindow(7, 2, torch.bfloat16)
    shapes = [{name: tuple(t.shape) for name, t in window.allocate(torch.Size(s), "meta").items()} for s in SHAPES[:5]]
    whole, tall, wide = (
        {"values": (7, 9)},
        {"left": (7, 2, 40), "right": (7, 2, 3)},
        {"left": (7, 2, 3), "right": (7, 2, 40)},
    )
    assert shapes == [{"values": (7, 1)}, whole, {"left": (7, 2, 5), "right": (7, 2, 4)}, tall, wide]


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.integers(1, 8), st.integers(1, 12), st.floats(-6.0, 6.0))
@settings(deadline=None, max_examples=40)
def test_nothing_is_lost(value_dtype, seed, shape, rank, steps, magnitude):
    """The sum of all rows pushed + the error = the sum of all gradients, zero gradients and spikes included."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = LowRankMFAC([param], num_grads=12, rank=rank, value_dtype=value_dtype)
    expected, largest = torch.zeros(shape, dtype=torch.float64), 0.0
    for step in range(steps):
        gradient = 10**magnitude * torch.randn(shape, generator=generator)
        if step % 3 == seed % 3:
            gradient *= (torch.rand(shape, generator=generator) < 0.1) * (seed % 2)
        set_gradients([param], [gradient])
        optimizer.step()
        expected += gradient.double()
        largest += gradient.norm().item()
    state = optimizer.state[param]
    rows = dense_rows(state)
    given_out = rows.sum(dim=0) + state["error"].double().flatten()
    assert (given_out - expected.flatten()).norm() <= steps * 2**-20 * (largest + rows.norm())
    assert bool(rows.any()) == (largest > 0)
    scale = rows.square().sum().item()
    torch.testing.assert_close(state["gram"], rows @ rows.T, rtol=0, atol=1e-13 * scale)
    assert optimizer.memory() == estimate_memory([param], LowRankMFAC, num_grads=12, rank=rank, value_dtype=value_dtype)


def test_accumulators_saturate_instead_of_overflowing():
    param = torch.nn.Parameter(torch.zeros(40, 30))
    for cls in (LowRankMFAC, LowRankGGT):
        optimizer = cls([param], lr=1.0, num_grads=3, rank=2)
        for step in range(5):
            set_gradients([param], [torch.full((40, 30), 3e38 * (-1) ** (step // 2))])
            optimizer.step()
        assert torch.isfinite(param).all()
        assert param.abs().max() > 0
        assert all(torch.isfinite(v).all() for v in optimizer.state[param].values() if torch.is_tensor(v))
