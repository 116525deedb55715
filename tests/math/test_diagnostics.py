"""What `hf_efcp.diagnostics` measures, against numbers by hand and brute force in float64."""

import math

import pytest
import torch
from naive import NaiveGGT, NaiveMFAC
from problems import Regression, flat, set_gradients
from states import assert_same
from variants import build, exact, names, papers_names

from hf_efcp import EFCP, DenseMFAC, LowRankMFAC, MicroAdam, SparseAdaGrad, SparseGGT, SparseMFAC
from hf_efcp.compressors import Identity
from hf_efcp.diagnostics import effective_rank, error_norm, error_share, gram_matrix, measure, snapshot
from hf_efcp.preconditioners import AdaGradSum

OF_THE_STEP = {"gradient_norm", "update_norm", "cosine", "scaling_p05", "scaling_p50", "scaling_p95"}


def parameter(*values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def measured(optimizer, params, gradients):
    set_gradients(params, gradients)
    before = snapshot(optimizer)
    optimizer.step()
    return measure(optimizer, before)


def nearest(values, q):
    return sorted(values)[round(q * (len(values) - 1))]


# Rotation and scaling


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


def test_more_entries_than_torch_has_quantiles_for():
    count = 2**24 + 3
    param = torch.nn.Parameter(torch.zeros(count))
    gradient = torch.full((count,), 1.0)
    gradient[: count // 4] = 4.0
    whole = EFCP([param], lr=1.0, compressor=Identity(), preconditioner=AdaGradSum(), num_grads=1)
    values = measured(whole, [param], [gradient])
    assert [values[f"scaling_{p}"] for p in ("p05", "p50", "p95")] == [0.25, 1.0, 1.0]  # the gradient's sign
    with pytest.raises(RuntimeError, match="too large"):
        gradient.quantile(0.5)


# Steps that do not happen


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


# Error


def errors(optimizer, params):
    """The error as one vector, read from where the optimizer keeps it in float32."""
    states = [optimizer.state[param] for param in params]
    return flat([state["error"] for state in states if "error" in state])


@pytest.mark.parametrize("name", [name for name in papers_names() if not name.startswith("dense")])
def test_the_share_is_that_of_the_accumulator(name):
    """`|e| / |e_old + g|`, which the step never shows, to the rounding of the rows."""
    problem = Regression(seed=1)
    params = problem.parameters()
    optimizer = build(name, params, **({"error_dtype": torch.float32} if "microadam" in name else {}))
    shares = []
    for step in range(8):
        gradients = problem.gradients(params, step)
        accumulator = flat(gradients) + (errors(optimizer, params) if step else 0.0)
        values = measured(optimizer, params, gradients)
        left = errors(optimizer, params).norm()
        assert values["error_norm"] == error_norm(optimizer) == pytest.approx(float(left), rel=1e-6)
        assert values["error_share"] == error_share(optimizer)
        exactly = name in ("sparse_mfac_float32", "sparse_adagrad")
        assert values["error_share"] == pytest.approx(float(left / accumulator.norm()), rel=1e-6 if exactly else 4e-3)
        shares.append(values["error_share"])
    assert 0.05 < max(shares) < 1.0


@pytest.mark.parametrize("error_dtype", [torch.bfloat16, torch.int8, torch.uint4])
def test_the_error_of_a_quantised_store_is_what_it_has_kept(error_dtype):
    params, twins = ([torch.nn.Parameter(torch.zeros(64, 9))] for _ in range(2))
    gradients = [torch.randn(64, 9, generator=torch.Generator().manual_seed(0))]
    settings = dict(lr=0.01, density=0.1)
    kept = measured(MicroAdam(params, error_dtype=error_dtype, **settings), params, gradients)
    true = measured(MicroAdam(twins, error_dtype=torch.float32, **settings), twins, gradients)
    assert kept["error_norm"] == pytest.approx(true["error_norm"], rel=0.03)
    assert kept["error_norm"] != true["error_norm"]
    assert kept["error_share"] == pytest.approx(true["error_share"], rel=0.03)


@pytest.mark.parametrize("name", ["dense_mfac", "dense_ggt"])
def test_without_compression_there_is_no_error(name):
    problem = Regression()
    params = problem.parameters()
    optimizer = build(name, params)
    values = measured(optimizer, params, problem.gradients(params, 0))
    assert not {"error_norm", "error_share"} & set(values)
    assert error_norm(optimizer) == error_share(optimizer) == 0.0


# Gram matrix


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        (torch.eye(5), 5.0),
        (7.0 * torch.eye(3, dtype=torch.float64), 3.0),
        (torch.ones(6, 6), 1.0),
        (torch.outer(torch.arange(4.0), torch.arange(4.0)), 1.0),
        (torch.diag(torch.tensor([3.0, 1.0])), math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        (torch.zeros(4, 4), 0.0),
    ],
)
def test_effective_rank(gram, expected):
    assert effective_rank(gram) == pytest.approx(expected, abs=1e-6)


def test_the_gram_matrix_is_oldest_first():
    param = torch.nn.Parameter(torch.zeros(6))
    optimizer = DenseMFAC([param], lr=0.1, num_grads=3, metric="none")
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for step, row in enumerate(rows):
        values = measured(optimizer, [param], [row])
        written = rows[max(0, step - 2) : step + 1].double()
        gram = gram_matrix(optimizer)
        torch.testing.assert_close(gram, written @ written.T)
        assert values["effective_rank"] == effective_rank(gram)
        p = torch.linalg.svdvals(written) ** 2
        p /= p.sum()
        assert values["effective_rank"] == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)
    gram.zero_()
    assert gram_matrix(optimizer).diagonal().min() > 0  # what was handed out was a copy


def test_layers_have_a_matrix_each():
    first, second, late = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(3))
    settings = dict(lr=0.1, num_grads=3, rank=3, scope="layer", value_dtype=torch.float32, metric="none")
    optimizer = LowRankMFAC([first, second, late], **settings)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 2, 4, 3, generator=generator)
    for row in rows:
        values = measured(optimizer, [first, second, late], [*row, None])
    grams = [gram_matrix(optimizer, first), gram_matrix(optimizer, second)]
    for index, gram in enumerate(grams):
        G = rows[-3:, index].flatten(1).double()
        torch.testing.assert_close(gram, G @ G.T, rtol=1e-5, atol=1e-5)
    assert values["effective_rank"] == pytest.approx(sum(map(effective_rank, grams)) / 2)
    with pytest.raises(ValueError, match=r'scope="layer" has a Gram matrix for each parameter.*\(param=\.\.\.\)'):
        gram_matrix(optimizer)
    with pytest.raises(ValueError, match="no Gram matrix before the first step"):
        gram_matrix(optimizer, late)


def test_what_has_no_gram_matrix():
    param = parameter(1.0)
    with pytest.raises(ValueError, match="no Gram matrix before the first step"):
        gram_matrix(DenseMFAC([param], lr=0.1, scope="model"))
    with pytest.raises(ValueError, match="AdaGradSum is a diagonal rule, which has no Gram matrix"):
        gram_matrix(SparseAdaGrad([param]))
    assert "effective_rank" not in measured(SparseAdaGrad([param]), [param], [torch.ones(1)])


# The rest


def test_excluded_groups_are_ignored_but_for_their_bytes():
    def values(*excluded):
        problem = Regression()
        params = problem.parameters()
        groups = [{"params": params}, {"params": list(excluded), "preconditioned": False, "lr": 1.0}]
        optimizer = SparseMFAC(groups[: 1 + bool(excluded)], lr=0.1, num_grads=3, density=0.3)
        for step in range(3):
            gradients = problem.gradients(params, step) + [torch.full_like(other, 100.0) for other in excluded]
            found = measured(optimizer, [*params, *excluded], gradients)
        return found, sum(param.numel() for param in params)

    (alone, count), (beside, _) = values(), values(parameter(*range(10)))
    adamw = beside.pop("state_bytes") - alone.pop("state_bytes")
    assert 10 * 8 <= adamw <= 10 * 8 + 8  # two moments, and the count of steps
    per_parameter = alone.pop("state_bytes_per_parameter")
    assert beside.pop("state_bytes_per_parameter") == pytest.approx((per_parameter * count + adamw) / (count + 10))
    assert alone == beside
    assert set(alone) >= OF_THE_STEP


@pytest.mark.parametrize("name", names())
def test_measuring_changes_nothing(name):
    problem = Regression()
    runs = []
    for measures in (True, False):
        params = problem.parameters()
        optimizer = build(name, params, weight_decay=0.1)
        torch.manual_seed(0)
        for step in range(7):
            set_gradients(params, problem.gradients(params, step))
            kept = [param.grad.clone() for param in params]
            before = snapshot(optimizer) if measures else None
            optimizer.step()
            if before:
                measure(optimizer, before)
                assert all(torch.equal(param.grad, grad) for param, grad in zip(params, kept, strict=True))
        runs.append((flat(params), optimizer.state_dict(), torch.get_rng_state()))
    assert_same(*runs)
    assert not torch.equal(runs[0][0], flat(problem.start))


def test_gradients_that_are_gone():
    param = parameter(1.0)
    optimizer = SparseMFAC([param])
    param.grad = torch.ones(1)
    before = snapshot(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="call measure before zero_grad"):
        measure(optimizer, before)


def test_shards_are_refused(sharded):
    optimizer = SparseMFAC([sharded])
    for look in (snapshot, error_norm, error_share):
        with pytest.raises(ValueError, match=r"need whole parameters, but FSDP has sharded them.*with DDP"):
            look(optimizer)
