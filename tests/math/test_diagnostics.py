"""What `hf_efcp.diagnostics` measures of a step, against numbers by hand and brute force in float64."""

import math

import pytest
import torch
from diagnostics_cases import OF_THE_STEP, measured, parameter
from naive import NaiveGGT, NaiveMFAC
from problems import Regression, flat
from variants import build, exact, names

from hf_efcp import EFCP, SparseAdaGrad, SparseGGT, SparseMFAC
from hf_efcp.compressors import Identity
from hf_efcp.diagnostics import measure, snapshot
from hf_efcp.preconditioners import AdaGradSum


def nearest(values, q):
    return sorted(values)[round(q * (len(values) - 1))]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_step_by_hand(weight_decay):
    """AdaGrad's first step is the sign of the gradient."""
    param = parameter(1.0, -2.0, 3.0, 0.5)
    optimizer = SparseAdaGrad([param], lr=0.125, density=1.0, weight_decay=weight_decay, metric="none")
    values = measured(optimizer, [param], [torch.tensor([3.0, -4.0, 0.0, 12.0])])
    expected = {
        "gradient_norm": 13.0,
        "update_norm": math.sqrt(3.0),
        "cosine": 19.0 / (13.0 * math.sqrt(3.0)),
        "scaling_p05": 1 / 12,
        "scaling_p50": 1 / 4,
        "scaling_p95": 1 / 3,
        "error_norm": 0.0,
        "error_share": 0.0,
        "state_bytes": 4 * 4 + 4 * 4 + 4 * (2 + 4),  # sum, error, one row of whole indices and values
        "state_bytes_per_parameter": 14.0,
    }
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize(
    ("cls", "naive_cls", "matrix"),
    [(SparseMFAC, NaiveMFAC, {"damp": 1e-3}), (SparseGGT, NaiveGGT, {"eps": 1e-2, "beta1": 0.5, "beta2": 0.9})],
)
def test_rotation_and_scaling_are_those_of_the_explicit_matrix(cls, naive_cls, matrix, l2):
    """With momentum, either weight decay and groups of different learning rates, of which one is 0."""
    problem = Regression(seed=3)
    params = problem.parameters()
    rates = [0.02, 0.01, 0.02, 0.0]
    common = dict(num_grads=4, density=0.3, block_size=16, momentum=0.5, value_dtype=torch.float32)
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, rates, strict=True)]
    optimizer = cls(groups, lr=1.0, weight_decay=0.1, decoupled_weight_decay=not l2, metric="none", **common, **matrix)
    naive = naive_cls(params, lr=rates, weight_decay=[0.1] * 4, l2=l2, **common, **matrix)
    for step in range(7):
        gradients = problem.gradients(params, step)
        thetas = [param.detach().clone() for param in params]
        values = measured(optimizer, params, gradients)
        naive.step(gradients)
    g = [gradient + 0.1 * theta if l2 else gradient for gradient, theta in zip(gradients, thetas, strict=True)]
    u = naive.velocity
    moved_g, moved_u = flat(g[:3]), flat(u[:3])  # the last has no learning rate
    # Where no row has an entry, the explicit matrix has rounding.
    ratios = [abs(a / b) for a, b in zip(moved_u.tolist(), moved_g.tolist(), strict=True) if abs(a) > 1e-9 and b]
    assert 20 < len(ratios) < len(moved_u)
    expected = {
        "gradient_norm": flat(g).norm(),
        "update_norm": moved_u.norm(),
        "cosine": torch.cosine_similarity(moved_u, moved_g, dim=0),
        "scaling_p05": nearest(ratios, 0.05),
        "scaling_p50": nearest(ratios, 0.5),
        "scaling_p95": nearest(ratios, 0.95),
        "error_norm": flat(naive.errors).norm(),
    }
    assert {name: values[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-3
    )
    assert abs(values["cosine"]) < 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_decay_is_no_update_in_any_dtype(dtype):
    """One entry of eight is moved by the row; decay alone moves the others, and rounds them."""
    start = torch.linspace(0.31, 0.97, 8).to(dtype)
    param = torch.nn.Parameter(start.clone())
    optimizer = SparseAdaGrad([param], lr=0.125, density=0.125, weight_decay=0.37, metric="none")
    gradient = torch.arange(1.0, 9.0)
    values = measured(optimizer, [param], [gradient])
    assert (param != start).all()
    assert values["update_norm"] == pytest.approx(1.0, rel=0.02)
    assert values["cosine"] == pytest.approx(8.0 / float(gradient.norm()), rel=1e-6)
    assert values["scaling_p05"] == values["scaling_p95"] == pytest.approx(1 / 8, rel=0.02)
    assert values["error_norm"] == pytest.approx(float(gradient[:7].norm()), rel=1e-6)
    assert values["error_share"] == pytest.approx(float(gradient[:7].norm() / gradient.norm()), rel=1e-6)


def test_a_parameter_that_is_not_contiguous():
    whole, turned = torch.nn.Parameter(torch.randn(6, 5)), torch.nn.Parameter(torch.empty(5, 6).T)
    turned.data.copy_(whole.data)
    assert not turned.is_contiguous()
    gradient = torch.randn(6, 5)
    first, second = (
        measured(SparseMFAC([param], lr=0.1, num_grads=2, density=0.5), [param], [gradient])
        for param in (whole, turned)
    )
    assert first == second
    assert 0.1 < first["cosine"] < 0.999


def test_more_entries_than_torch_had_quantiles_for():
    count = 2**24 + 3
    param = torch.nn.Parameter(torch.zeros(count))
    gradient = torch.full((count,), 1.0)
    gradient[: count // 4] = 4.0
    whole = EFCP([param], lr=1.0, compressor=Identity(), preconditioner=AdaGradSum(), num_grads=1)
    values = measured(whole, [param], [gradient])
    assert [values[f"scaling_{p}"] for p in ("p05", "p50", "p95")] == [0.25, 1.0, 1.0]  # the gradient's sign
    if torch.__version__ < (2, 14):
        with pytest.raises(RuntimeError, match="too large"):
            gradient.quantile(0.5)


def test_a_step_that_is_skipped_has_no_gradient_and_no_update():
    problem = Regression()
    params = problem.parameters()
    optimizer = SparseMFAC(params, lr=0.1, num_grads=3, density=0.3, weight_decay=0.1, nonfinite="skip")
    gradients = problem.gradients(params, 0)
    broken = [*gradients[:-1], torch.tensor(float("nan"))]
    assert measured(optimizer, params, broken) == {"state_bytes": 0}  # nothing is there yet
    first = measured(optimizer, params, gradients)
    skipped = measured(optimizer, params, broken)
    assert optimizer.skipped_steps == 2
    assert set(first) - set(skipped) == OF_THE_STEP
    assert skipped == {name: value for name, value in first.items() if name not in OF_THE_STEP}


def test_an_overflow_that_the_scaler_skips_and_the_unscaled_gradient():
    param = parameter(1.0, 2.0)
    optimizer = SparseMFAC([param], lr=0.1, num_grads=2, density=1.0, weight_decay=0.5, metric="none")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for spoiled in (True, False):
        optimizer.zero_grad()
        scaler.scale((param * torch.tensor([3.0, 4.0])).sum()).backward()
        if spoiled:
            param.grad[0] = float("inf")
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(measure(optimizer, before))
    assert found[0] == {"state_bytes": 0}
    assert found[1]["gradient_norm"] == pytest.approx(5.0)
    assert found[1]["cosine"] == pytest.approx(1.0)  # one row: the matrix only scales it


def test_without_a_learning_rate_there_is_no_update():
    problem = Regression()
    params = problem.parameters()
    gradients = problem.gradients(params, 0)
    values = measured(SparseMFAC(params, lr=0.0, num_grads=3, weight_decay=0.1), params, gradients)
    assert values["gradient_norm"] == pytest.approx(float(flat(gradients).norm()))
    assert OF_THE_STEP & set(values) == {"gradient_norm"}
    assert values["error_norm"] > 0


def test_gradients_of_zero_have_no_cosine():
    param = parameter(1.0, 2.0)
    optimizer = SparseMFAC([param], lr=0.1, num_grads=2, density=1.0)
    values = measured(optimizer, [param], [torch.zeros(2)])
    found = {name: values[name] for name in values if not name.startswith("state")}
    assert found == {
        "gradient_norm": 0.0, "update_norm": 0.0, "error_norm": 0.0, "error_share": 0.0, "effective_rank": 0.0,
    }  # fmt: skip


# Those whose result for some parameters does not hang on the others.
@pytest.mark.parametrize("name", [n for n in names() if "lowrank" not in n and "global" not in n])
def test_a_parameter_without_a_gradient_has_no_update(name):
    problem = Regression()
    params, others = problem.parameters(), problem.parameters()[1:]
    gradients = problem.gradients(params, 0)
    gradients[0] = None
    found = measured(build(name, params, weight_decay=0.1, **exact(name)), params, gradients)
    alone = measured(build(name, others, weight_decay=0.1, **exact(name)), others, gradients[1:])
    assert found.pop("state_bytes") > alone.pop("state_bytes")
    del found["state_bytes_per_parameter"], alone["state_bytes_per_parameter"]
    assert found == alone
    assert set(found) >= OF_THE_STEP
