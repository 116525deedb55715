"""SparseMFAC against the explicit matrices of `naive.py`, by the distance moved."""

import pytest
import torch
from naive import NaiveMFAC
from papers import SparseMFAC
from problems import Regression, distance, flat, set_gradients
from states import refuse

from hf_efcp import estimate_memory

BACKENDS = ["reference", "numba"]


def run(problem, steps, *, backend, dtype=torch.float32, groups=None, **settings):
    """Ours on its own trajectory."""
    params = problem.parameters(dtype)
    optimizer = SparseMFAC(groups(params) if groups else params, backend=backend, **settings)
    for step in range(steps):
        set_gradients(params, problem.gradients(params, step))
        optimizer.step()
    return params, optimizer


def run_naive(problem, steps, **settings):
    """Brute force on its own trajectory, in float64."""
    naive = NaiveMFAC(problem.start, **settings)
    for step in range(steps):
        naive.step(problem.gradients(naive.parameters(), step))
    return naive.parameters()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 6, 64, 4096])
def test_density_one_equals_dense_mfac(backend, block_size):
    problem = Regression()
    settings = dict(lr=0.03, num_grads=12, damp=1e-4, density=1.0, block_size=block_size, value_dtype=torch.float32)
    ours, _ = run(problem, 60, backend=backend, **settings)
    error, moved = distance(ours, run_naive(problem, 60, **settings), problem.start)
    assert 0.3 < moved < 3.0
    assert error < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("density", "block_size"), [(0.05, 4096), (0.05, 10), (0.3, 16), (0.05, 300)])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_sparse_equals_brute_force_with_the_same_top_k(backend, density, block_size, value_dtype):
    """Both see the gradients of our trajectory: a last bit decides what is kept, and chaos does the rest."""
    problem = Regression(seed=1, width=40)
    settings = dict(lr=0.08, num_grads=10, damp=1e-3, density=density, block_size=block_size, value_dtype=value_dtype)
    params = problem.parameters()
    optimizer, naive = SparseMFAC(params, backend=backend, **settings), NaiveMFAC(problem.start, **settings)
    for step in range(60):
        gradients = problem.gradients(params, step)
        set_gradients(params, gradients)
        optimizer.step()
        naive.step(gradients)
    error, moved = distance(params, naive.parameters(), problem.start)
    assert 0.3 < moved < 3.0
    assert error < 1e-4
    ours = torch.cat([optimizer.state[param]["error"].double().reshape(-1) for param in params])
    assert torch.equal(ours, torch.cat(naive.errors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_density_matters(backend):
    """The comparison above would mean little if compression changed nothing."""
    problem = Regression(seed=1, width=40)
    settings = dict(lr=0.05, num_grads=10, damp=2e-3, value_dtype=torch.float32)
    sparse, _ = run(problem, 60, backend=backend, density=0.05, **settings)
    error, _ = distance(sparse, run_naive(problem, 60, density=1.0, **settings), problem.start)
    assert error > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_decay_and_momentum_equal_brute_force(backend):
    problem = Regression(seed=2)
    ours, _ = run(
        problem, 50, backend=backend, num_grads=8, damp=1e-3, density=0.4, block_size=9, momentum=0.7,
        value_dtype=torch.float32, weight_decay=0.5,
        groups=lambda p: [{"params": p[:2], "lr": 0.02}, {"params": []},
                          {"params": p[2:], "lr": 0.005, "weight_decay": 2.0}],
    )  # fmt: skip
    naive = run_naive(
        problem, 50, num_grads=8, damp=1e-3, density=0.4, block_size=9, momentum=0.7,
        lr=[0.02, 0.02, 0.005, 0.005], weight_decay=[0.5, 0.5, 2.0, 2.0],
    )  # fmt: skip
    error, moved = distance(ours, naive, problem.start)
    assert moved > 0.3
    assert error < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_a_gradient_equal_brute_force(backend):
    """Each parameter misses some steps, the whole of the window's length among them."""
    problem = Regression(seed=3)
    settings = dict(lr=0.1, num_grads=6, damp=1e-2, density=0.3, block_size=8, value_dtype=torch.float32)
    params = problem.parameters()
    optimizer = SparseMFAC(params, backend=backend, weight_decay=0.1, **settings)
    naive = NaiveMFAC(problem.start, weight_decay=0.1, **settings)
    for step in range(40):
        missing = [step % 3 == 0, False, 10 <= step < 20, step < 5]
        for target, at in ((params, params), (naive, naive.parameters())):
            gradients = [None if skip else g for skip, g in zip(missing, problem.gradients(at, step), strict=True)]
            if target is naive:
                naive.step(gradients)
            else:
                set_gradients(params, gradients)
                before = [param.detach().clone() for param in params]
                optimizer.step()
                for skip, old, param in zip(missing, before, params, strict=True):
                    assert torch.equal(old, param) == skip
    error, moved = distance(params, naive.parameters(), problem.start)
    assert moved > 0.2
    assert error < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_identical_rows_at_small_damping(backend, density):
    """Coefficients of 1 / lambda cancel: float32 sums are wrong by a factor here."""
    start = [torch.zeros(200)]
    gradient = torch.randn(200, generator=torch.Generator().manual_seed(4))
    # Sums of these are exact in float32; rounding of the accumulator would be amplified by 1 / lambda.
    gradient = (gradient * 256).round() / 256
    gradient[:150] = gradient[:150].sign()  # and ties
    settings = dict(lr=1.0, num_grads=24, damp=1e-6, density=density, block_size=50, value_dtype=torch.float32)
    param = torch.nn.Parameter(start[0].clone())
    optimizer = SparseMFAC([param], backend=backend, **settings)
    naive = NaiveMFAC(start, **settings)
    for _ in range(60):
        before, naive_before = param.detach().double().clone(), naive.parameters()[0].clone()
        set_gradients([param], [gradient])
        optimizer.step()
        naive.step([gradient])
        update = param.detach().double() - before
        expected = naive.parameters()[0] - naive_before
        assert expected.norm() > 0.01
        # theta is float32 and grows to about 20: an update of 0.2 is known to a few 1e-6 of theta
        assert (update - expected).norm() < 1e-4 * expected.norm() + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dampening_is_a_pseudo_inverse(backend):
    """Identical gradients, lambda = 0: u = m row / (rows |row|^2), and zero for zero gradients."""
    gradient = torch.randn(64, generator=torch.Generator().manual_seed(5))
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = SparseMFAC(
        [param], lr=1.0, num_grads=8, damp=0.0, density=1.0, value_dtype=torch.float32, backend=backend
    )
    for step in range(12):
        before = param.detach().clone()
        set_gradients([param], [gradient])
        optimizer.step()
        expected = 8 * gradient / (min(step + 1, 8) * gradient.norm() ** 2)
        assert (before - param.detach() - expected).norm() < 1e-4 * expected.norm()
    zero = torch.nn.Parameter(torch.ones(64))
    optimizer = SparseMFAC([zero], lr=1.0, num_grads=8, damp=0.0, backend=backend)
    set_gradients([zero], [torch.zeros(64)])
    optimizer.step()
    assert torch.equal(zero, torch.ones(64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precision_parameters_follow_brute_force(backend, dtype, tolerance):
    """The same gradients for both: what differs is that theta is rounded once a step."""
    problem = Regression(seed=6)
    settings = dict(lr=0.05, num_grads=8, damp=1e-3, density=0.5, block_size=16, weight_decay=0.1)
    params = problem.parameters(dtype)
    start = problem.parameters(dtype)
    optimizer = SparseMFAC(params, backend=backend, **settings)
    naive = NaiveMFAC(start, value_dtype=torch.bfloat16, **settings)
    for step in range(20):
        gradients = [gradient.to(dtype) for gradient in problem.gradients(problem.start, step)]
        set_gradients(params, gradients)
        optimizer.step()
        naive.step(gradients)
    error, moved = distance(params, naive.parameters(), start)
    assert 0.3 < moved < 3.0
    assert error < tolerance
    assert all(param.dtype == dtype for param in params)
    assert all(optimizer.state[param]["error"].dtype == torch.float32 for param in params)


def test_small_windows_take_the_bytes_that_are_announced():
    """uint8 indices, int8 values, an error in 4 bits: a scale for every 16 blocks of 256, and one for the tail."""
    param = torch.nn.Parameter(torch.zeros(256 * 40 + 100))
    settings = dict(num_grads=8, block_size=256, value_dtype=torch.int8, error_dtype=torch.uint4)
    optimizer = SparseMFAC([param], **settings)
    set_gradients([param], [torch.linspace(-1, 1, param.numel())])
    optimizer.step()
    kept, groups = 40 * 3 + 1, 3 + 1
    assert optimizer.state[param]["scales"].dtype == torch.bfloat16
    assert optimizer.state[param]["scales"].shape == (8 * groups,)
    error = param.numel() // 2 + 4 * -(-param.numel() // 64)
    memory = {
        "indices": 8 * kept,
        "values": 8 * kept + 2 * 8 * groups,
        "error": error,
        "momentum": 0,
        "metric": 0,
        "gram": 8 * 64,
    }
    assert optimizer.memory() == {**memory, "total": sum(memory.values())}
    assert estimate_memory([param], SparseMFAC, **settings) == optimizer.memory()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_damaged_scales_are_refused(scale):
    problem = Regression(seed=8)
    params = problem.parameters()
    optimizer = SparseMFAC(params, num_grads=3, block_size=8, value_dtype=torch.int8)
    set_gradients(params, problem.gradients(params, 0))
    optimizer.step()
    good = optimizer.state_dict()
    assert (good["state"][0]["scales"] > 0).any()
    state = dict(good["state"][0], scales=torch.full_like(good["state"][0]["scales"], scale))
    spoilt = {**good, "state": {**good["state"], 0: state}}
    refuse(optimizer, spoilt, "window of .* is damaged: it has scales that are negative, NaN or infinite")


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_backends_agree(value_dtype):
    """The windows hold the same bits as long as the gradients are the same."""
    problem = Regression(seed=7, width=50)
    settings = dict(lr=0.02, num_grads=9, damp=1e-5, density=0.1, block_size=64, value_dtype=value_dtype)
    gradients = [problem.gradients(problem.parameters(), step) for step in range(25)]
    states = []
    for backend in BACKENDS:
        params = problem.parameters()
        optimizer = SparseMFAC(params, backend=backend, **settings)
        for gradient in gradients:
            set_gradients(params, gradient)
            optimizer.step()
        states.append((optimizer.state_dict()["state"], flat(params)))
    (reference, theta), (numba, other) = states
    for key, state in reference.items():
        assert ("scales" in state) == (value_dtype == torch.int8)
        for name in state.keys() & {"indices", "values", "scales", "error"}:
            assert torch.equal(state[name], numba[key][name]), name
    torch.testing.assert_close(reference[0]["gram"], numba[0]["gram"], rtol=1e-12, atol=1e-12)
    assert (theta - other).norm() < 1e-5 * (theta - flat(problem.start)).norm()
