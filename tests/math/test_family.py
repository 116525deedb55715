"""GGT, the dense baselines and the options, against the explicit matrices of `naive.py`, by the distance moved."""

from dataclasses import dataclass

import pytest
import torch
from naive import NaiveGGT, NaiveMFAC
from papers import DenseGGT, DenseMFAC, SparseGGT, SparseMFAC
from problems import Regression, distance, flat, set_gradients
from variants import VARIANTS, build

from hf_efcp import EFCP
from hf_efcp.compressors import Identity, TopK
from hf_efcp.preconditioners import GGT, MFAC, GramPreconditioner


def compare(optimizer, naive, problem, params, steps=40, missing=None):
    """Both see the gradients of our trajectory; the distance between them, and that moved."""
    for step in range(steps):
        gradients = problem.gradients(params, step)
        if missing is not None and missing(step):
            gradients[missing(step)] = None
        set_gradients(params, gradients)
        optimizer.step()
        naive.step(gradients)
    return distance(params, naive.parameters(), problem.start)


@pytest.mark.parametrize("beta1", [0.0, 0.8])
@pytest.mark.parametrize("beta2", [1.0, 0.9])
@pytest.mark.parametrize("cls", [SparseGGT, DenseGGT])
def test_ggt_equals_brute_force(cls, beta1, beta2):
    problem = Regression(seed=30, width=12)
    common = dict(lr=0.2, num_grads=9, eps=1e-3, beta1=beta1, beta2=beta2, momentum=0.3, weight_decay=0.05)
    sparse = dict(density=0.2, block_size=16, value_dtype=torch.bfloat16) if cls is SparseGGT else {}
    params = problem.parameters()
    naive = NaiveGGT(problem.start, **common, **sparse)
    error, moved = compare(
        cls(params, **common, **sparse), naive, problem, params, missing=lambda step: 2 if step % 4 == 1 else 0
    )
    assert moved > 0.2
    assert error < 1e-4


@pytest.mark.parametrize("cls", [SparseGGT, DenseGGT])
def test_ggt_survives_identical_rows(cls):
    """A Gram matrix of rank one: u = g / (sqrt(rows) |g| + eps), whatever the rounding of its other eigenvalues."""
    gradient = torch.randn(60, generator=torch.Generator().manual_seed(31))
    param = torch.nn.Parameter(torch.zeros(60))
    sparse = dict(density=1.0, value_dtype=torch.float32) if cls is SparseGGT else {}
    optimizer = cls([param], lr=1.0, num_grads=8, eps=1e-6, **sparse)
    for step in range(20):
        before = param.detach().clone()
        set_gradients([param], [gradient])
        optimizer.step()
        expected = gradient / (min(step + 1, 8) ** 0.5 * gradient.norm())
        assert (before - param.detach() - expected).norm() < 1e-4 * expected.norm()


def test_ggt_is_invariant_to_the_scale_of_gradients():
    problem = Regression(seed=32, width=20)
    moved = []
    for scale in (1.0, 1000.0):
        params = problem.parameters()
        optimizer = SparseGGT(params, lr=0.05, num_grads=6, density=0.3, eps=1e-8, value_dtype=torch.float32)
        for step in range(15):
            set_gradients(params, [scale * g for g in problem.gradients(problem.start, step)])
            optimizer.step()
        moved.append(flat(params) - flat(problem.start))
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()


def test_dense_mfac_equals_brute_force_on_its_own_trajectory():
    problem = Regression(seed=33)
    settings = dict(lr=0.03, num_grads=12, damp=1e-3, momentum=0.2, weight_decay=0.1)
    params = problem.parameters()
    optimizer, naive = DenseMFAC(params, **settings), NaiveMFAC(problem.start, **settings)
    for step in range(60):
        set_gradients(params, problem.gradients(params, step))
        optimizer.step()
        naive.step(problem.gradients(naive.parameters(), step))
    error, moved = distance(params, naive.parameters(), problem.start)
    assert moved > 0.3
    assert error < 1e-3
    assert optimizer.memory()["error"] == 0


@pytest.mark.parametrize("pair", [(SparseMFAC, DenseMFAC), (SparseGGT, DenseGGT)])
def test_density_one_equals_dense(pair):
    problem = Regression(seed=34, width=20)
    gradients = [problem.gradients(problem.start, step) for step in range(25)]
    ends = []
    for cls, extra in zip(pair, (dict(density=1.0, block_size=64, value_dtype=torch.float32), {}), strict=True):
        params = problem.parameters()
        optimizer = cls(params, lr=0.1, num_grads=7, **extra)
        for gradient in gradients:
            set_gradients(params, gradient)
            optimizer.step()
        ends.append(params)
    error, moved = distance(*ends, problem.start)
    assert moved > 0.05
    assert error < 1e-5


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"decoupled_weight_decay": False, "weight_decay": 0.3}, {"l2": True, "weight_decay": 0.3}),
        ({"precondition": "gradient"}, {"dense_gradient": True}),
    ],
    ids=["l2", "dense-gradient"],
)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_options_of_mfac_equal_brute_force(ours, theirs, backend):
    problem = Regression(seed=35, width=15)
    # A dense gradient has parts outside the window, which are multiplied by 1 / lambda.
    settings = dict(lr=0.1, num_grads=9, damp=0.5, density=0.3, block_size=16, value_dtype=torch.bfloat16)
    params = problem.parameters()
    naive = NaiveMFAC(problem.start, **settings, **theirs)
    plain = NaiveMFAC(problem.start, **settings)
    optimizer = SparseMFAC(params, backend=backend, **settings, **ours)
    error, moved = compare(optimizer, naive, problem, params, steps=30)
    assert moved > 0.02
    assert error < 1e-4
    others = problem.parameters()
    control, _ = compare(SparseMFAC(others, backend=backend, **settings, **ours), plain, problem, others, steps=30)
    assert control > 0.01


def test_dense_gradient_of_ggt_and_of_dense_windows_equals_brute_force():
    problem = Regression(seed=36, width=15)
    settings = dict(lr=0.01, num_grads=6)
    for compressor, naive_settings in (
        (TopK(0.3, 16, torch.float32), dict(density=0.3, block_size=16)),
        (Identity(), dict(density=1.0)),
    ):
        for rule, naive_cls, matrix in (
            (GGT(eps=0.05, beta2=0.8), NaiveGGT, dict(eps=0.05, beta2=0.8)),
            (MFAC(damp=0.1), NaiveMFAC, dict(damp=0.1)),
        ):
            params = problem.parameters()
            optimizer = EFCP(params, compressor=compressor, preconditioner=rule, precondition="gradient", **settings)
            naive = naive_cls(problem.start, dense_gradient=True, **settings, **naive_settings, **matrix)
            error, moved = compare(optimizer, naive, problem, params, steps=20)
            assert moved > 0.001
            assert error < 1e-4


def test_dampening_may_change_during_training():
    """In the groups, between steps; what is out of range is refused before anything has changed, and not saved."""
    problem = Regression(seed=37, width=15)
    settings = dict(lr=0.2, num_grads=6, density=0.4, block_size=16, value_dtype=torch.float32)
    params = problem.parameters()
    optimizer, naive = SparseMFAC(params, damp=0.1, **settings), NaiveMFAC(problem.start, damp=0.1, **settings)
    for step in range(12):
        optimizer.param_groups[0]["damp"] = naive.matrix["damp"] = 0.1 / (1 + step)
        gradients = problem.gradients(params, step)
        set_gradients(params, gradients)
        optimizer.step()
        naive.step(gradients)
    error, moved = distance(params, naive.parameters(), problem.start)
    assert moved > 0.01
    assert error < 1e-4
    assert optimizer.state_dict()["param_groups"][0]["damp"] == 0.1 / 12
    optimizer.param_groups[0]["damp"] = -0.9
    before = flat(params)
    with pytest.raises(ValueError, match="damp must be a finite number of at least 0, got -0.9"):
        optimizer.step()
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("name", ["sparse_mfac", "dense_ggt"])
def test_scope_layer_is_one_optimizer_for_each_parameter(name):
    problem = Regression(seed=38, width=20)
    cls, settings = VARIANTS[name]
    template = build(name, problem.parameters())

    def make(params):
        return EFCP(
            params, settings["lr"], compressor=template._layout.compressor, preconditioner=template._preconditioner,
            num_grads=settings["num_grads"], scope="layer",
        )  # fmt: skip

    params, alone, whole = problem.parameters(), problem.parameters(), problem.parameters()
    together, model = make(params), cls(whole, **settings)
    separate = [cls([param], **settings) for param in alone]
    for step in range(15):
        gradients = problem.gradients(problem.start, step)
        if step % 5 == 2:
            gradients[1] = None
        for targets in (params, alone, whole):
            set_gradients(targets, gradients)
        for optimizer in (together, model, *separate):
            optimizer.step()
    assert torch.equal(flat(params), flat(alone))
    assert (flat(params) - flat(whole)).norm() > 0.05 * (flat(whole) - flat(problem.start)).norm()
    resumed = make(problem.parameters())
    resumed.load_state_dict(together.state_dict())
    assert resumed.memory() == together.memory() == together.planned_memory()
    assert together.memory()["gram"] == 4 * model.memory()["gram"]


def test_own_parts_take_a_few_lines():
    """A function of the Gram matrix, and a compressor, that the package does not have."""

    @dataclass(frozen=True)
    class Normalised(GramPreconditioner):
        length: float = 2.0

        def coefficients(self, gram, now):
            c = torch.zeros(now.rows, dtype=torch.float64)
            c[now.newest] = self.length / gram[now.newest, now.newest].sqrt()
            return c

    @dataclass(frozen=True)
    class Halves(Identity):
        lossless = False

        def compress(self, jobs, kernels):
            for job in jobs:
                job.row.copy_(job.error.div_(2).view(-1))  # half of the accumulator; the other half stays

    param = torch.nn.Parameter(torch.zeros(10))
    optimizer = EFCP([param], 0.5, compressor=Halves(), preconditioner=Normalised(), num_grads=3)
    gradient = torch.arange(10.0)
    set_gradients([param], [gradient])
    optimizer.step()
    torch.testing.assert_close(-param.detach(), gradient / gradient.norm())
    torch.testing.assert_close(optimizer.state[param]["error"], gradient / 2)
    assert optimizer.param_groups[0]["length"] == 2.0
    parts = dict(compressor=Halves(), preconditioner=Normalised(), num_grads=3)
    refused = EFCP([param], 0.5, precondition="gradient", **parts)
    with pytest.raises(TypeError, match='Normalised cannot precondition the dense gradient: use precondition="row"'):
        refused.step()


def test_a_field_may_not_be_called_as_something_else_in_the_groups():
    """Fields of compressor and preconditioner stand there, where a second one would hide the first."""

    @dataclass(frozen=True)
    class Damped(Identity):
        damp: float = 1.0

    @dataclass(frozen=True)
    class Scoped(Identity):
        scope: str = "layer"

    @dataclass(frozen=True)
    class WithRate(MFAC):
        lr: float = 1.0

    param = torch.nn.Parameter(torch.zeros(3))
    clashes = ((Damped(), MFAC(), "damp"), (Scoped(), MFAC(), "scope"), (Identity(), WithRate(), "lr"))
    for compressor, rule, name in clashes:
        with pytest.raises(ValueError, match=f"^{name} would stand for two things in the parameter groups"):
            EFCP([param], 0.1, compressor=compressor, preconditioner=rule, num_grads=3)


def test_bad_options_are_refused():
    param = torch.nn.Parameter(torch.zeros(10))
    for cls, options, message in [
        (SparseMFAC, {"damp": -1.0}, "damp must be a finite number of at least 0, got -1.0"),
        (SparseMFAC, {"precondition": "both"}, "precondition must be one of 'row', 'gradient', 'momentum', got 'both'"),
        (SparseMFAC, {"density": 0.0}, "density is the fraction of entries kept"),
        (SparseMFAC, {"block_size": 65537}, "block_size must be between 1 and 65536"),
        (SparseMFAC, {"value_dtype": torch.float16}, "value_dtype must be one of .*, torch.int8, got torch.float16"),
        (SparseGGT, {"eps": 0.0}, "eps must be a finite positive number"),
        (SparseGGT, {"beta1": 0.9, "beta2": 0.5}, "beta2 must be .* at least beta1"),
        (SparseGGT, {"beta1": 1.0}, "beta1 must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            cls([param], **options)
    with pytest.raises(TypeError, match="block_size must be an int, got 64.0"):
        SparseMFAC([param], block_size=64.0)
    param.grad = torch.ones(10)
    with pytest.raises(
        ValueError, match='precondition="gradient" with metric="none" needs dampening, but all of it is 0'
    ):
        SparseMFAC([param], damp=0.0, precondition="gradient")
    with pytest.raises(ValueError, match="beta1=0.5 of GGT is momentum over the window's rows"):
        SparseGGT([param], beta1=0.5, precondition="gradient")
    with pytest.raises(ValueError, match="error_dtype must be one of torch.float32.*, got torch.float64"):
        EFCP([param], 0.1, compressor=TopK(), preconditioner=MFAC(), num_grads=2, error_dtype=torch.float64)
