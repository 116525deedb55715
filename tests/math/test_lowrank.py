"""Low-rank rows: the compression by itself, the window against dense rows, the optimizers against explicit matrices."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import NaiveGGT, NaiveMFAC
from papers import DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC
from problems import Regression, distance, flat, set_gradients
from states import assert_same, refuse, train, trained
from variants import build

from hf_efcp import estimate_memory
from hf_efcp.compressors import Job, LowRank, LowRankWindow, base, lowrank, matrices, matrix
from hf_efcp.kernels import pool, reference

SHAPES = [(), (9,), (5, 4), (40, 3), (3, 40), (12, 17), (6, 3, 5), (4, 3, 2, 6), (0, 3), (1, 8)]


def dense_rows(state):
    """The rows of a window written out, `(m, numel)`, float64."""
    if "values" in state:
        return state["values"].double()
    return torch.einsum("mri,mrj->mij", state["left"].double(), state["right"].double()).flatten(1)


def random_window(shape, capacity, rank, value_dtype=torch.float32, seed=0):
    """A window full of random rows."""
    window = LowRankWindow(capacity, rank, value_dtype)
    state = window.allocate(torch.Size(shape), "cpu")
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return window, state


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


# --- the compression ---


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


# --- the window ---


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_the_window_equals_dense_rows(shape, rows, value_dtype, monkeypatch):
    """In pieces of a few entries, so that every sum is cut."""
    for module, name, size in (
        (matrices, "_SLAB", 70),
        (lowrank, "_FACTORS", 3),
        (lowrank, "_TILE_FACTORS", 4),
        (base, "_SPAN", 100),
    ):
        monkeypatch.setattr(module, name, size)
    check_window(shape, 8, 2, rows, value_dtype)


def test_the_window_equals_dense_rows_at_full_size():
    """More rows, columns and factors than a tile has."""
    check_window((1100, 1000), 10, 210, 9, torch.bfloat16)


def check_window(shape, capacity, rank, rows, value_dtype):
    window, state = random_window(shape, capacity, rank, value_dtype)
    shape, dense = torch.Size(shape), dense_rows(state)[:rows]
    generator = torch.Generator().manual_seed(9)
    x, c = torch.randn(shape, generator=generator), torch.randn(rows, dtype=torch.float64, generator=generator)
    tight = dict(rtol=1e-12, atol=1e-11 * max(1, shape.numel()))
    (column,) = window.dots([(state, shape)], rows - 1, rows, reference)
    torch.testing.assert_close(column, dense @ dense[-1], **tight)
    spans = window.spans(shape, x.device)
    products = [window.project(state, shape, span, x.view(-1)[span], rows, reference) for span in spans]
    torch.testing.assert_close(
        sum(products, torch.zeros(rows, dtype=torch.float64)), dense @ x.double().view(-1), **tight
    )
    for dense_x, scale in ((None, 0.0), (x, -0.7)):
        expected = c @ dense + (0 if dense_x is None else scale * dense_x.double().view(-1))
        update, end = torch.full((shape.numel(),), torch.nan), 0
        for span in spans:
            own = None if dense_x is None else dense_x.view(-1)[span]
            part = window.combine(state, shape, span, c, reference, base=own, scale=scale)
            assert span.start == end
            assert part.dtype == torch.float32
            update[span], end = part, span.stop
        assert end == shape.numel()
        torch.testing.assert_close(update, expected.float(), rtol=1e-6, atol=1e-6)
    window.clear(state, shape, 0)
    cleared = dense_rows(state)
    assert not cleared[0].any()
    assert torch.equal(cleared[1:rows], dense[1:])


def test_squares_are_refused():
    for shape in ((9,), (30, 20)):
        window, state = random_window(shape, 3, 2)
        c = torch.ones(3, dtype=torch.float64)
        with pytest.raises(TypeError, match="low-rank rows cannot be squared entry by entry.*use TopK or Identity"):
            window.combine(state, torch.Size(shape), slice(0, 9), c, reference, squared=True)


@pytest.mark.parametrize("precondition", ["row", "gradient"])
def test_bits_do_not_depend_on_the_number_of_threads(precondition):
    """Many tiles, and afterwards threads, old and new, have the numbers that they had."""
    generator = torch.Generator().manual_seed(10)
    gradients = [torch.randn(900, 700, generator=generator) for _ in range(6)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param = torch.nn.Parameter(torch.zeros(900, 700))
            optimizer = LowRankMFAC([param], num_grads=80, rank=5, precondition=precondition)
            for gradient in gradients:
                set_gradients([param], [gradient])
                optimizer.step()
            results.append((param.detach(), optimizer.state_dict()["state"]))
            seen = []
            thread = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert [torch.get_num_threads(), *seen] == [count, count]
    finally:
        torch.set_num_threads(threads)
    assert results[0][0].any()
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("shape", [(30000, 9), (9, 30000)])
def test_long_sums_have_the_same_bits_on_any_number_of_threads(shape):
    """Products that BLAS would cut along the sum."""
    window, state = random_window(shape, 6, 2)
    x, c = torch.randn(shape, generator=torch.Generator().manual_seed(11)), torch.ones(6, dtype=torch.float64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            held, found = (state, x.shape), [window.dots([(state, x.shape)], 2, 6, reference)]
            for span in window.spans(x.shape, x.device):
                found.append(window.combine(*held, span, c, reference))
                found.append(window.project(*held, span, x.view(-1)[span], 6, reference))
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_failing_piece_of_work_is_reported():
    threads = torch.get_num_threads()

    def work(index, begin, end):
        assert torch.get_num_threads() == 1
        if begin == 6:
            raise ArithmeticError(f"{index} {begin} {end}")

    with pytest.raises(ArithmeticError, match="2 6 8"):
        pool.run_torch(work, 8, 3, torch.device("cpu"))
    assert torch.get_num_threads() == threads


# --- the optimizers ---


class Given:
    """Brute force over rows that it is given instead of compressing: those that the optimizer stored."""

    def step_with(self, gradients, rows):
        self.given = iter(rows)
        self.step(gradients)

    def compress(self, accumulator):
        return next(self.given)


class GivenMFAC(Given, NaiveMFAC):
    pass


class GivenGGT(Given, NaiveGGT):
    pass


def newest(optimizer, params, step):
    """The row that was stored in a step, parameter by parameter; zeros for one that was never stepped."""
    position = step % optimizer.param_groups[0]["num_grads"]
    zeros = (torch.zeros(param.numel(), dtype=torch.float64) for param in params)
    states = (optimizer.state.get(param) for param in params)
    return [dense_rows(state)[position] if state else zero for state, zero in zip(states, zeros, strict=True)]


def compare(optimizer, naive, problem, params, steps=30, missing=None):
    """Both see the gradients of our trajectory and our rows; the distance between them, and that moved."""
    for step in range(steps):
        gradients = problem.gradients(params, step)
        if missing is not None and step % 4 == 1:
            gradients[missing] = None
        set_gradients(params, gradients)
        optimizer.step()
        naive.step_with(gradients, newest(optimizer, params, step))
    for error, param in zip(naive.errors, params, strict=True):
        ours = optimizer.state[param]["error"].double().flatten()
        assert (ours - error).norm() < 1e-4 * error.norm() + 2e-5
    return distance(params, naive.parameters(), problem.start)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"momentum": 0.6, "weight_decay": 0.1}, {"momentum": 0.6, "weight_decay": 0.1}),
        (
            {"weight_decay": 0.3, "decoupled_weight_decay": False, "lr": 0.3},
            {"weight_decay": 0.3, "l2": True, "lr": 0.3},
        ),
        ({"precondition": "gradient", "lr": 0.01}, {"dense_gradient": True, "lr": 0.01}),
    ],
    ids=["plain", "momentum", "l2", "gradient"],
)
def test_mfac_equals_brute_force(rank, value_dtype, ours, theirs):
    problem = Regression(seed=41, width=20)
    common = dict(lr=0.15, num_grads=9, damp=1e-3)
    params = problem.parameters()
    optimizer = LowRankMFAC(params, rank=rank, value_dtype=value_dtype, **{**common, **ours})
    error, moved = compare(optimizer, GivenMFAC(problem.start, **{**common, **theirs}), problem, params, missing=2)
    assert [("left" in optimizer.state[p]) for p in params] == [True, False, True, False]
    assert 0.1 < moved < 5.0
    assert error < 1e-4


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"beta1": 0.7, "beta2": 0.9}, {"beta1": 0.7, "beta2": 0.9}),
        ({"momentum": 0.6, "weight_decay": 0.3}, {"momentum": 0.6, "weight_decay": 0.3}),
        ({"precondition": "gradient", "lr": 0.2, "eps": 0.1}, {"dense_gradient": True, "lr": 0.2, "eps": 0.1}),
    ],
    ids=["betas", "momentum", "gradient"],
)
def test_ggt_equals_brute_force(rank, ours, theirs):
    problem = Regression(seed=42, width=20)
    common = dict(lr=0.2, num_grads=9, eps=1e-3)
    params = problem.parameters()
    optimizer = LowRankGGT(params, rank=rank, **{**common, **ours})
    error, moved = compare(optimizer, GivenGGT(problem.start, **{**common, **theirs}), problem, params, missing=0)
    assert 0.1 < moved < 5.0
    assert error < 1e-4


def test_groups_equal_brute_force():
    problem = Regression(seed=43, width=20)
    params = problem.parameters()
    groups = [
        {"params": params[:2], "lr": 0.02},
        {"params": []},
        {"params": params[2:], "lr": 0.005, "weight_decay": 2.0},
    ]
    optimizer = LowRankMFAC(groups, num_grads=8, damp=1e-3, rank=1, weight_decay=0.5)
    naive = GivenMFAC(
        problem.start, num_grads=8, damp=1e-3, lr=[0.02, 0.02, 0.005, 0.005], weight_decay=[0.5, 0.5, 2, 2]
    )
    error, moved = compare(optimizer, naive, problem, params)
    assert moved > 0.1
    assert error < 1e-4


@pytest.mark.parametrize(
    ("cls", "dense", "arguments"),
    [
        (LowRankMFAC, DenseMFAC, dict(lr=0.03, num_grads=12, damp=1e-3)),
        (LowRankGGT, DenseGGT, dict(lr=0.5, num_grads=12, eps=1e-3)),
    ],
    ids=["mfac", "ggt"],
)
def test_full_rank_equals_dense_and_rank_one_does_not(cls, dense, arguments):
    problem = Regression(seed=44, width=20)

    def run(kind, **rank):
        params = problem.parameters()
        train(params, kind(params, **arguments, **rank), problem, 40)
        return params

    reference = run(dense)
    error, moved = distance(run(cls, rank=5, value_dtype=torch.float32), reference, problem.start)
    assert 0.3 < moved < 3.0
    assert error < 1e-3
    error, _ = distance(run(cls, rank=1, value_dtype=torch.float32), reference, problem.start)
    assert error > 0.05


def test_full_rank_equals_brute_force_on_its_own_trajectory():
    problem = Regression(seed=45)
    arguments = dict(lr=0.03, num_grads=12, damp=1e-3)
    params, naive = problem.parameters(), NaiveMFAC(problem.start, **arguments)
    train(params, LowRankMFAC(params, rank=99, value_dtype=torch.float32, **arguments), problem, 40)
    for step in range(40):
        naive.step(problem.gradients(naive.parameters(), step))
    error, moved = distance(params, naive.parameters(), problem.start)
    assert 0.3 < moved < 3.0
    assert error < 1e-3


def test_scope_layer():
    """One layer alone is a model; several have a matrix each, and are not what one matrix over all makes of them."""
    problem = Regression(seed=46, width=20)

    def run(indices, scope):
        params = problem.parameters()
        chosen = [params[i] for i in indices]
        optimizer = LowRankMFAC(chosen, lr=0.02, num_grads=6, rank=1, damp=1e-3, scope=scope)
        for step in range(20):
            set_gradients(params, problem.gradients(problem.start, step))
            optimizer.step()
        assert sum("gram" in optimizer.state[p] for p in chosen) == (len(indices) if scope == "layer" else 1)
        return params

    for index in range(4):
        assert torch.equal(flat(run([index], "layer")), flat(run([index], "model")))
    layers, model = run(range(4), "layer"), run(range(4), "model")
    error, _ = distance(layers, model, problem.start)
    assert error > 0.05
    # The first has the same position, and so the same first vectors, alone and in company.
    assert torch.equal(layers[0], run([0], "model")[0])


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_identical_rows_at_small_damping(value_dtype, wide):
    """Coefficients of 1 / lambda cancel: with float32 sums the update is noise."""
    window, state = random_window((30, 20), 24, 2, value_dtype)
    for side in (state["left"], state["right"]):
        side.copy_(side[0].clone())
    shape, rows = torch.Size((30, 20)), dense_rows(state)
    gram = torch.cat([window.dots([(state, shape)], i, 24, reference) for i in range(24)])
    damped = 24e-6 * torch.eye(24, dtype=torch.float64) + gram
    coefficients = 24 * torch.linalg.solve(damped, torch.eye(24, dtype=torch.float64)[7])
    if not wide:
        coefficients = coefficients.to(torch.float32)
    update = window.combine(state, shape, slice(0, 600), coefficients, reference)
    expected = rows[0] / (1e-6 + rows[0].square().sum())
    error = (update.double() - expected).norm() / expected.norm()
    assert error < 1e-6 if wide else error > 0.1


def test_training_on_one_gradient_at_small_damping():
    """The same through the optimizer: rows that are parallel to their last bits."""
    generator = torch.Generator().manual_seed(47)
    gradient = torch.randn(20, 1, generator=generator) @ torch.randn(1, 12, generator=generator)
    param = torch.nn.Parameter(torch.zeros(20, 12))
    optimizer = LowRankMFAC([param], lr=1.0, num_grads=10, rank=1, damp=1e-6, value_dtype=torch.float32)
    naive = GivenMFAC([param], lr=1.0, num_grads=10, damp=1e-6)
    for step in range(25):
        before, naive_before = param.detach().double().clone(), naive.parameters()[0].clone()
        set_gradients([param], [gradient])
        optimizer.step()
        naive.step_with([gradient], newest(optimizer, [param], step))
        update, expected = param.detach().double() - before, naive.parameters()[0] - naive_before
        assert expected.norm() > 0.01
        assert (update - expected).norm() < 1e-3 * expected.norm()


def test_zero_gradients_first_are_harmless():
    """As checkpoint loading steps once with zeros: no movement, and compression as if nothing had been."""
    problem = Regression(seed=48, width=20)
    starts = []
    for zeros in (0, 2):
        params = problem.parameters()
        optimizer = LowRankMFAC(params, lr=0.02, num_grads=6, rank=2)
        for _ in range(zeros):
            set_gradients(params, [torch.zeros_like(p) for p in params])
            optimizer.step()
            assert torch.equal(flat(params), flat(problem.start))
        for step in range(3):
            set_gradients(params, problem.gradients(problem.start, step))
            optimizer.step()
        assert not torch.equal(flat(params), flat(problem.start))
        starts.append({i: {k: optimizer.state[p][k] for k in ("start", "error") if k in optimizer.state[p]}
                       for i, p in enumerate(params)})  # fmt: skip
    assert_same(starts[0], starts[1])


def test_the_seed_decides():
    problem = Regression(seed=49, width=20)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        params = problem.parameters()
        train(params, LowRankMFAC(params, lr=0.02, num_grads=6, rank=1, seed=seed), problem, 5)
        results.append(flat(params))
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).norm() > 1e-3 * (results[0] - flat(problem.start)).norm()


def test_bytes_of_the_state():
    params = [torch.nn.Parameter(torch.zeros(100, 60)), torch.nn.Parameter(torch.zeros(7))]
    expected = {"indices": 0, "values": 10 * 3 * 160 * 2 + 10 * 7 * 2 + 3 * 60 * 4, "error": 6007 * 4, "momentum": 0}
    expected |= {"metric": 0, "gram": 800}
    memory = estimate_memory(params, LowRankMFAC, num_grads=10, rank=3)
    assert memory == {**expected, "total": sum(expected.values())}
    assert estimate_memory(params, LowRankGGT, num_grads=10, rank=3, scope="layer")["gram"] == 1600


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an int, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": "a"}, TypeError, "seed must be an int, got 'a'"),
        ({"value_dtype": torch.float16}, ValueError, "must be torch.float32 or torch.bfloat16, got torch.float16"),
        ({"scope": "block"}, ValueError, "scope must be one of 'model', 'layer', got 'block'"),
        ({"precondition": "rows"}, ValueError, "must be one of 'row', 'gradient', 'momentum', got 'rows'"),
    ],
)
@pytest.mark.parametrize("cls", [LowRankMFAC, LowRankGGT])
def test_bad_values_are_refused(cls, changes, error, message):
    with pytest.raises(error, match=message):
        cls([torch.nn.Parameter(torch.zeros(4, 5))], **changes)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 3), ("seed", 1), ("value_dtype", torch.float32), ("scope", "layer")]
)
def test_checkpoints_of_other_settings_are_refused(name, value):
    _, params, optimizer = trained("lowrank_mfac")
    other = build("lowrank_mfac", [torch.nn.Parameter(p.detach().clone()) for p in params], **{name: value})
    refuse(
        other,
        optimizer.state_dict(),
        f"made with {name}=.*this optimizer has {name}=.*{str(value).removeprefix('torch.')}",
    )
