"""The benchmark of a step: an honest baseline, and windows that are valid."""

from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import SIZES, module, plenty
from naive import NaiveMFAC
from problems import Regression, flat, set_gradients

from hf_efcp import create_optimizer
from hf_efcp.blocks import as_indices
from hf_efcp.factory import parse_optim_args


@pytest.mark.parametrize("num_grads", [5, 16])  # the window wraps, or does not
def test_the_published_algorithm_makes_the_updates_of_brute_force(recipe, num_grads):
    problem = Regression(seed=3)
    theirs = problem.parameters()
    settings = dict(lr=0.02, num_grads=num_grads, density=0.15, damp=1e-3)
    published = recipe.bench_baselines.AsPublished(theirs, **settings)
    whole, blocks = (NaiveMFAC(theirs, block_size=size, **settings) for size in (None, 4096))
    off = {whole: [], blocks: []}
    for step in range(12):
        before = flat(theirs)
        gradients = problem.gradients(theirs, step)
        set_gradients(theirs, gradients)
        published.step()
        moved = flat(theirs) - before
        assert moved.norm() > 1e-3
        for naive in off:
            start = flat(naive.thetas)
            naive.step(gradients)
            expected = flat(naive.thetas) - start
            off[naive].append((moved - expected).norm() / expected.norm())
    assert max(off[whole]) < 1e-4
    assert min(off[blocks]) > 0.1  # Top-k in each parameter, which is another algorithm
    order = [i % num_grads for i in range(12)][-num_grads:]  # of the rows, oldest first
    rows = torch.stack(whole.rows)
    gram = rows @ rows.T
    assert torch.allclose(published.gram[order][:, order], gram, rtol=1e-5, atol=1e-6 * float(gram.max()))
    assert torch.equal(published.error.to(torch.float64), flat(whole.errors))


def test_the_published_window_is_filled_with_distinct_unordered_places(recipe):
    published = recipe.bench_baselines.AsPublished(module().parameters(), 0.0, num_grads=7, density=0.1)
    published.fill(seed=0)
    numel = sum(torch.Size(size).numel() for size in SIZES)
    assert published.indices.shape == (7, -(-numel // 10))
    assert all(len(set(row.tolist())) == published.kept for row in published.indices)
    assert published.indices.min() >= 0
    assert published.indices.max() < numel
    assert (published.indices.diff(dim=1) < 0).any()
    assert published.values.std() == pytest.approx(1e-2, rel=0.1)
    before = flat(param for group in published.param_groups for param in group["params"])
    published.step()
    assert published.pushed == 8
    assert torch.equal(before, flat(param for group in published.param_groups for param in group["params"]))


def test_the_published_window_shrinks_to_the_memory_there_is_and_its_time_grows_back(recipe):
    cases, steps = recipe.bench_cases, recipe.bench_steps
    model = module()
    numel = sum(param.numel() for param in model.parameters())
    row, temporaries = 12 * -(-numel // 10), 24 * numel
    case = cases.parse_case("published num_grads=64,density=0.1")
    small = cases.build(case, model, 0, lambda: int((temporaries + 8 * row + row // 2) / 0.8))
    assert small.num_grads == 8
    assert cases.build(case, model, 0, plenty).num_grads == 64
    with pytest.raises(MemoryError, match="no room for a single row"):
        cases.build(case, model, 0, lambda: temporaries)
    report = steps.measure_steps([case], {case.label: small}, model, {}, repeats=3, published_repeats=2)
    (result,) = report.results
    assert result.extrapolated_from == 8
    assert len(result.repeats) == 2
    parts = result.parts
    assert result.seconds == pytest.approx(sum(parts.values()), rel=0.2)
    measured = parts["compress"] + parts["solve"] + parts["rest"] + (parts["products"] + parts["update"]) / 8
    assert sum(result.repeats) / 2 == pytest.approx(measured, rel=1e-6)
    assert "memory had room for 8 rows" in "\n".join(report._extrapolations())


@pytest.mark.parametrize(
    "text",
    [
        "sparse_mfac num_grads=9,density=0.05,block_size=64,metric=none",
        "sparse_mfac num_grads=9,density=0.3,block_size=500,value_dtype=float32",
        "sparse_mfac num_grads=9,exclude=^1$,metric=none",
        "sparse_ggt num_grads=9,density=0.05,metric=none",
        "microadam num_grads=9,density=0.05",
        "sparse_adagrad",
        "lowrank_mfac num_grads=9,rank=2",
        "lowrank_mfac num_grads=9,rank=2,metric=factored,precondition=momentum",
        "lowrank_ggt num_grads=9,metric=none",
        "dense_mfac num_grads=9,scope=model",
    ],
)
def test_filled_windows_are_valid(recipe, text):
    case = recipe.bench_cases.parse_case(text)
    model = module()
    before = flat(model.parameters())
    optimizer = recipe.bench_cases.build(case, model, 0, plenty)
    again = create_optimizer(case.optimizer, module(), lr=0.0, **parse_optim_args(case.optimizer, case.options))
    again.load_state_dict(optimizer.state_dict())  # which checks shapes, dtypes and indices
    group = optimizer.param_groups[0]
    capacity = group["num_grads"]
    for param, state in optimizer.state.items():
        if "indices" in state and param.numel() >= 300:
            assert as_indices(state["indices"], group["block_size"]).to(torch.int64).unique().numel() > 1
        if "gram" in state:
            assert torch.linalg.eigvalsh(state["gram"])[0] > 0.5 * state["gram"].diagonal().mean()
        if "pushed" in state:
            assert state["pushed"] == capacity
    for _ in range(capacity + 2):
        optimizer.step()
        for param, state in optimizer.state.items():
            # Nine rows of a few entries, as layers may have, cannot be orthogonal.
            if "gram" in state and (group["scope"] == "model" or param.numel() >= 300):
                # With the least dampening, the solve is a Cholesky decomposition.
                damped = state["gram"] + 1e-5 * capacity * torch.eye(capacity, dtype=torch.float64)
                assert torch.linalg.cholesky_ex(damped)[1] == 0
    assert torch.equal(before, flat(model.parameters()))


def test_rows_are_ascending_and_as_long_as_the_first(recipe):
    model = torch.nn.ParameterList([torch.zeros(50, 100)])
    model[0].grad = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    case = recipe.bench_cases.parse_case("sparse_mfac num_grads=6,density=0.1,block_size=1000,metric=none")
    optimizer = recipe.bench_cases.build(case, model, 0, plenty)
    state = optimizer.state[model[0]]
    indices = as_indices(state["indices"], 1000).to(torch.int64).view(5, 6, 100)
    assert (indices.diff(dim=2) > 0).all()
    assert indices.max() >= 985
    assert indices.max() < 1000
    kept = model[0].grad.view(5, 1000).abs().topk(100).values
    lengths = state["values"].float().view(5, 6, 100).square().sum(dim=(0, 2)).sqrt()
    assert torch.allclose(lengths, kept.norm().expand(6), rtol=0.15)
    assert state["gram"].diagonal().mean() == pytest.approx(kept.norm().item() ** 2, rel=0.1)


def test_levels_and_their_scales_are_filled(recipe):
    """The state of a window in 8 bits, whatever optimizer it belongs to."""
    state = {
        "indices": torch.zeros(4 * 32 * 3, dtype=torch.uint8),
        "values": torch.zeros(4 * 32 * 3, dtype=torch.int8),
        "scales": torch.zeros(4 * 2, dtype=torch.bfloat16),
        "error": torch.full((8,), 5, dtype=torch.int8),
        "error_scale": torch.full((1,), 2.0),
    }
    state["values"][:96] = 100
    state["scales"][::4] = 0.5
    optimizer = SimpleNamespace(
        param_groups=[{"num_grads": 4, "block_size": 256, "density": 0.01}], state={torch.zeros(32 * 256): state}
    )
    recipe.bench_cases.fill_window(optimizer, seed=0)
    assert state["values"].unique().numel() > 100
    assert state["values"].min() >= -127
    assert state["values"].max() <= 127
    assert (state["scales"] >= 0.24).all()
    assert (state["scales"] <= 0.76).all()
    assert state["scales"].unique().numel() > 1
    indices = state["indices"].to(torch.int64).view(32, 4, 3)
    assert (indices.diff(dim=2) > 0).all()
    assert (state["error"] == 5).all()
    assert state["error_scale"].item() == 2.0
    assert recipe.bench_cases.WINDOW == ("indices", "values", "scales", "left", "right")
