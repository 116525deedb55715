"""What `hf_efcp.diagnostics` measures of errors and Gram matrices."""

import math

import pytest
import torch
from diagnostics_cases import OF_THE_STEP, measured, parameter
from problems import Regression, flat, set_gradients
from states import assert_same
from variants import build, names, papers_names

from hf_efcp import DenseMFAC, LowRankMFAC, MicroAdam, SparseAdaGrad, SparseMFAC
from hf_efcp.diagnostics import effective_rank, error_norm, error_share, gram_matrix, measure, snapshot


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
