"""The optimizers over low-rank rows, against explicit matrices."""

import pytest
import torch
from lowrank_cases import Given, dense_rows, newest, random_window
from naive import NaiveGGT, NaiveMFAC
from papers import DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC
from problems import Regression, distance, flat, set_gradients
from states import assert_same, refuse, train, trained
from variants import build

from hf_efcp import estimate_memory
from hf_efcp.kernels import reference


class GivenMFAC(Given, NaiveMFAC):
    pass


class GivenGGT(Given, NaiveGGT):
    pass


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
