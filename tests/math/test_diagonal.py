"""MicroAdam and sparse AdaGrad, against plain sums over the rows in float64 and against torch's own optimizers."""

import pytest
import torch
from naive import Naive, top_k
from papers import MicroAdam, SparseAdaGrad
from problems import Regression, distance, flat, set_gradients

from hf_efcp import EFCP
from hf_efcp.compressors import TopK
from hf_efcp.preconditioners import AdaGradSum, AdamMoments

BACKENDS = ["reference", "numba"]


class NaiveMicroAdam(Naive):
    """The two moments, row by row."""

    count = 0

    def update(self, x):
        self.count += 1
        beta1, beta2, eps = (self.matrix[name] for name in ("beta1", "beta2", "eps"))
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for age, row in enumerate(reversed(self.rows)):
            first += (1 - beta1) * beta1**age * row
            second += (1 - beta2) * beta2**age * row**2
        return first / (1 - beta1**self.count) / (eps + (second / (1 - beta2**self.count)).sqrt())


class NaiveAdaGrad(Naive):
    """The sum of squares of all rows."""

    total = 0.0

    def update(self, x):
        self.total = self.total + x**2
        return x / (self.total.sqrt() + self.matrix["eps"])


def compare(optimizer, naive, problem, params, steps=40):
    """Both see the gradients of our trajectory; the second parameter now and then has none."""
    for step in range(steps):
        gradients = problem.gradients(params, step)
        if step % 4 == 1:
            gradients[1] = None
        set_gradients(params, gradients)
        optimizer.step()
        naive.step(gradients)
    return distance(params, naive.parameters(), problem.start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.1), (False, 0.1)])
def test_microadam_equals_brute_force(backend, value_dtype, decoupled, decay):
    """Over many windows, with learning rates and decays of groups."""
    problem = Regression(seed=40, width=20)
    common = dict(num_grads=6, density=0.2, block_size=16, value_dtype=value_dtype, beta1=0.8, beta2=0.95, eps=1e-4)
    params = problem.parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 2 * decay}]
    optimizer = MicroAdam(
        groups, lr=0.05, weight_decay=decay, decoupled_weight_decay=decoupled, error_dtype=torch.float32,
        backend=backend, **common,
    )  # fmt: skip
    naive = NaiveMicroAdam(
        problem.start, lr=[0.05, 0.05, 0.02, 0.02], weight_decay=[decay, decay, 2 * decay, 2 * decay],
        l2=not decoupled, **common,
    )  # fmt: skip
    error, moved = compare(optimizer, naive, problem, params)
    assert moved > 0.2
    assert error < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_sparse_adagrad_equals_brute_force(backend, value_dtype):
    problem = Regression(seed=41, width=20)
    common = dict(lr=0.1, density=0.2, block_size=16, value_dtype=value_dtype, eps=1e-3, momentum=0.3, weight_decay=0.1)
    params = problem.parameters()
    optimizer = SparseAdaGrad(params, backend=backend, **common)
    naive = NaiveAdaGrad(problem.start, num_grads=1, **common)
    error, moved = compare(optimizer, naive, problem, params)
    assert moved > 0.2
    assert error < 1e-5


def follow(optimizer, params, problem, steps=40):
    """An optimizer on its own trajectory."""
    for step in range(steps):
        set_gradients(params, problem.gradients(params, step))
        optimizer.step()
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
def test_microadam_without_compression_is_adam(backend, decay):
    """While nothing has left the window: the same moments and the same corrections of their bias."""
    problem = Regression(seed=42, width=20)
    params, theirs = problem.parameters(), problem.parameters(torch.float64)
    amount = 0.0 if decay == "none" else 0.1
    adam = (torch.optim.AdamW if decay == "decoupled" else torch.optim.Adam)(theirs, lr=0.02, weight_decay=amount)
    ours = MicroAdam(
        params, lr=0.02, num_grads=50, density=1.0, value_dtype=torch.float32, error_dtype=torch.float32,
        weight_decay=amount, decoupled_weight_decay=decay == "decoupled", backend=backend,
    )  # fmt: skip
    error, moved = distance(follow(ours, params, problem), follow(adam, theirs, problem), problem.start)
    assert moved > 0.2
    assert error < 1e-4
    assert all(not optimizer_state["error"].any() for optimizer_state in ours.state.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_sparse_adagrad_without_compression_is_adagrad(backend, amount):
    problem = Regression(seed=43, width=20)
    params, theirs = problem.parameters(), problem.parameters(torch.float64)
    adagrad = torch.optim.Adagrad(theirs, lr=0.1, weight_decay=amount, eps=1e-3)
    ours = SparseAdaGrad(
        params, lr=0.1, density=1.0, eps=1e-3, weight_decay=amount, decoupled_weight_decay=False, backend=backend
    )
    error, moved = distance(follow(ours, params, problem), follow(adagrad, theirs, problem), problem.start)
    assert moved > 0.2
    assert error < 1e-4
    for param, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours.state[param]["sum"].double(), adagrad.state[other]["sum"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_microadam_with_a_quantised_error_is_invariant_to_the_scale_of_gradients(scale):
    problem = Regression(seed=44, width=20)
    moved = []
    for factor in (1.0, scale):
        params = problem.parameters()
        optimizer = MicroAdam(params, lr=0.05, num_grads=5, density=0.2, block_size=64, eps=1e-12)
        for step in range(15):
            # rounded, so that the products are exact and no rounding of the error turns on them
            gradients = [(g * 64).round() / 64 for g in problem.gradients(problem.start, step)]
            set_gradients(params, [2.0 ** round(torch.tensor(factor).log2().item()) * g for g in gradients])
            optimizer.step()
        moved.append(flat(params) - flat(problem.start))
    assert (moved[0] - moved[1]).norm() < 1e-5 * moved[0].norm()


def test_microadam_moves_what_is_in_the_window_only():
    """Three rows of one entry in eight: nothing else moves, and what left the window moves no more."""
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = MicroAdam([param], lr=0.5, num_grads=2, density=0.1, error_dtype=torch.float32)
    touched = []
    for step in range(3):
        before = param.detach().clone()
        gradient = torch.zeros(8)
        gradient[2 * step + 1] = 4.0
        set_gradients([param], [gradient])
        optimizer.step()
        touched.append((param != before).nonzero().view(-1).tolist())
    assert touched == [[1], [1, 3], [3, 5]]


def test_adagrad_survives_squares_beyond_float32():
    """The sum saturates, and no step is longer than lr."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = SparseAdaGrad([param], lr=1.0, density=1.0)
    for gradient, expected in ((1e30, -1.0), (3e38, -2.0), (1.0, -2.0)):
        set_gradients([param], [torch.tensor([gradient, 0.0])])
        optimizer.step()
        assert param.tolist() == [expected, 0.0]
    assert torch.isfinite(optimizer.state[param]["sum"]).all()


def test_defaults_are_the_papers():
    assert AdamMoments() == AdamMoments(beta1=0.9, beta2=0.999, eps=1e-8)
    group = MicroAdam([torch.nn.Parameter(torch.zeros(3))]).param_groups[0]
    assert (group["num_grads"], group["density"], group["error_dtype"]) == (10, 0.01, "uint4")


def test_bad_values_are_refused():
    param = torch.nn.Parameter(torch.zeros(10))
    for cls, options, message in [
        (MicroAdam, {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        (MicroAdam, {"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1"),
        (MicroAdam, {"eps": 0.0}, "eps must be a finite positive number, got 0.0"),
        (SparseAdaGrad, {"eps": float("nan")}, "eps must be a finite positive number, got nan"),
        (SparseAdaGrad, {"density": 2.0}, "density is the fraction of entries kept"),
    ]:
        with pytest.raises(ValueError, match=message):
            cls([param], **options)
    for rule in (AdamMoments(), AdaGradSum()):
        with pytest.raises(ValueError, match=f"{type(rule).__name__} is made of the window's rows, got .*'gradient'"):
            EFCP([param], 0.1, compressor=TopK(), preconditioner=rule, num_grads=3, precondition="gradient")


def test_settings_of_a_rule_may_change_between_steps():
    """As a user or a scheduler does it: in every group, and it counts from the next step."""
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = SparseAdaGrad([param], lr=1.0, density=1.0)
    optimizer.param_groups[0]["eps"] = 3.0
    set_gradients([param], [torch.ones(4)])
    optimizer.step()
    assert param.tolist() == [-0.25] * 4
    assert top_k(param.detach(), 0.5, 4) == [0, 1]
