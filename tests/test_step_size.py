"""Lengths of updates, tensor by tensor, against `naive.py`; and what does not change them."""

import dataclasses
import inspect
import math

import pytest
import torch
from naive import NaiveGGT, NaiveMFAC
from problems import Regression, distance, flat, set_gradients
from test_numbers import rows

from hf_efcp import (
    EFCP,
    DenseGGT,
    DenseMFAC,
    LowRankGGT,
    LowRankMFAC,
    MicroAdam,
    SparseAdaGrad,
    SparseGGT,
    SparseMFAC,
    estimate_memory,
    moving,
    preconditioners,
    step_size,
)
from hf_efcp.compressors import GlobalTopK, TopK
from hf_efcp.kernels import cpu, reference
from hf_efcp.preconditioners import MFAC, Combination

BACKENDS = ["reference", "numba"]
EVERY = [SparseMFAC, DenseMFAC, LowRankMFAC, SparseGGT, MicroAdam, SparseAdaGrad]


def compare(optimizer, naive, problem, params, steps=40):
    """Both see the gradients of our trajectory; the third parameter now and then has none."""
    for step in range(steps):
        gradients = problem.gradients(params, step)
        if step % 4 == 1:
            gradients[2] = None
        set_gradients(params, gradients)
        optimizer.step()
        naive.step(gradients)
    return distance(params, naive.parameters(), problem.start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damping", [dict(damp=1e-2), dict(relative_damp=0.1)], ids=["absolute", "relative"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}], ids=["plain", "momentum"])
def test_mfac_equals_brute_force(backend, damping, options):
    problem = Regression(seed=50, width=15)
    settings = dict(lr=0.05, num_grads=7, density=0.2, block_size=16, value_dtype=torch.bfloat16, **options, **damping)
    params = problem.parameters()
    error, moved = compare(
        SparseMFAC(params, update_rms=0.7, backend=backend, **settings),
        NaiveMFAC(problem.start, rms=0.7, **settings),
        problem,
        params,
    )
    assert moved > 0.05
    assert error < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damping", [dict(eps=1e-2), dict(relative_eps=0.1)], ids=["absolute", "relative"])
def test_ggt_and_global_top_k_equal_brute_force(backend, damping):
    problem = Regression(seed=51, width=15)
    settings = dict(lr=0.05, num_grads=7, density=0.1, value_dtype=torch.bfloat16, beta1=0.5, beta2=0.9, **damping)
    params = problem.parameters()
    naive = NaiveGGT(problem.start, rms=1.0, block_size=None, **settings)
    optimizer = SparseGGT(params, selection="global", backend=backend, **settings)
    error, moved = compare(optimizer, naive, problem, params)
    assert moved > 0.05
    assert error < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}, {"value_dtype": torch.int8}], ids=str)
def test_whole_tensors_and_ranges_and_slabs_move_alike(options, scale, backend, monkeypatch):
    """One kernel moves whole tensors, and ranges of large ones whose length is known; slabs take several."""
    kernels = {"reference": reference, "numba": cpu}[backend]
    counts, move = [], kernels.move
    monkeypatch.setattr(kernels, "move", lambda moves, c: counts.append(len(moves)) or move(moves, c))
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((301, 32), (9001,), (7, 3))]
    ends = []
    for whole, known, moves in ((1 << 20, False, 3), (5000, True, 3 + 3 + 1), (0, False, 0), (0, True, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(moving, "_WHOLE", whole)
            patch.setattr(moving, "_RANGE", 1)
            patch.setattr(step_size, "knows_length", lambda shape, known=known: known)
            params = [torch.nn.Parameter(one.clone()) for one in start]
            optimizer = SparseMFAC(
                params,
                lr=0.05 if scale == "tensor" else 50.0,
                update_scale=scale,
                density=0.1,
                block_size=100,
                num_grads=4,
                backend=backend,
                **options,
            )
            for step in range(6):
                generator = torch.Generator().manual_seed(step)
                set_gradients(params, [torch.randn(one.shape, generator=generator) for one in start])
                if step == 3:
                    params[1].grad = None
                optimizer.step()
        absent = {3: 2, 7: 4, 0: 0}[moves]
        assert counts == ([moves] * 3 + [absent] + [moves] * 2 if moves else [])
        counts.clear()
        ends.append(params)
    for other in ends[1:]:
        error, moved = distance(other, ends[0], start)
        assert moved > 0.01
        assert error < 1e-5


@pytest.mark.parametrize("compressor", [TopK(1.0), GlobalTopK(1.0)], ids=["block", "global"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_single_matrix_has_rows_with_a_limit(scope, compressor):
    """Also where it is all of a joint vector."""
    param = torch.nn.Parameter(torch.zeros(100, 20))
    optimizer = EFCP(
        [param], 1.0, compressor=compressor, preconditioner=MFAC(relative_damp=0.1), num_grads=2, scope=scope,
        update_scale="tensor",
    )  # fmt: skip
    gradient = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    gradient[3] *= 1000.0
    set_gradients([param], [gradient])
    optimizer.step()
    assert param.detach().square().mean(dim=1).sqrt().max().item() == pytest.approx(3.0, rel=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_without_entries_is_in_nobodys_way(backend):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((0, 5), (4, 3))]
    optimizer = EFCP(
        params, 0.5, compressor=TopK(1.0), preconditioner=MFAC(), num_grads=2, scope="layer", backend=backend,
        update_scale="tensor",
    )  # fmt: skip
    set_gradients(params, [torch.ones(0, 5), torch.ones(4, 3)])
    optimizer.step()
    assert bool((params[1] < 1.0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_of_parameters_that_cannot_be_moved_in_place_are_few(dtype, backend, monkeypatch):
    """bfloat16 parameters and transposed ones are moved as float32 copies, batch by batch."""
    monkeypatch.setattr(moving, "_COPIED", 500)
    kernels = {"reference": reference, "numba": cpu}[backend]
    counts, move = [], kernels.move
    monkeypatch.setattr(kernels, "move", lambda moves, c: counts.append(len(moves)) or move(moves, c))
    start = [torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(5)]
    ends = []
    for strange in (True, False):
        params = [
            torch.nn.Parameter(one.t().contiguous().t() if strange else one.to(torch.float32, copy=True))
            for one in start
        ]
        assert params[0].is_contiguous() != strange
        optimizer = SparseMFAC(params, lr=0.1, density=0.2, num_grads=4, backend=backend)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            set_gradients(params, [torch.randn(one.shape, generator=generator).to(dtype) for one in start])
            optimizer.step()
        assert counts == [1] * 15 if strange else [5] * 3
        counts.clear()
        ends.append(params)
    error, moved = distance(*ends, start)
    assert moved > 0.1
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-6)


@pytest.fixture
def large(monkeypatch):
    """Every parameter counts as too large to keep its update."""
    monkeypatch.setattr(step_size, "_HELD", 0)
    monkeypatch.setattr(step_size, "knows_length", lambda shape: True)


@pytest.mark.parametrize("lengths", ["measured", "known"])
def test_relative_dampening_of_a_dense_gradient_equals_brute_force(lengths, request):
    """Also where the length comes from the Gram matrix."""
    if lengths == "known":
        request.getfixturevalue("large")
    problem = Regression(seed=52, width=15)
    settings = dict(lr=0.05, num_grads=7, density=0.3, block_size=16, relative_damp=1.0)
    params = problem.parameters()
    optimizer = SparseMFAC(params, precondition="gradient", **settings)
    naive = NaiveMFAC(problem.start, rms=1.0, dense_gradient=True, value_dtype=torch.bfloat16, **settings)
    error, moved = compare(optimizer, naive, problem, params)
    assert moved > 0.05
    assert error < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}], ids=["plain", "momentum"])
@pytest.mark.usefixtures("large")
def test_lengths_from_the_gram_matrix_of_a_large_parameter_equal_brute_force(backend, options):
    problem = Regression(seed=50, width=15)
    settings = dict(lr=0.05, num_grads=7, density=0.2, block_size=16, value_dtype=torch.bfloat16, **options)
    for cls, naive_cls, own in (
        (SparseMFAC, NaiveMFAC, dict(damp=1e-2)),
        (SparseMFAC, NaiveMFAC, dict(relative_damp=0.1)),
        (SparseGGT, NaiveGGT, dict(relative_eps=0.1, beta1=0.5, beta2=0.9)),
    ):
        params = problem.parameters()
        optimizer = cls(params, update_rms=0.7, backend=backend, **settings, **own)
        error, moved = compare(optimizer, naive_cls(problem.start, rms=0.7, **settings, **own), problem, params)
        assert moved > 0.05
        assert error < 1e-4
        gram = sum(optimizer.state[param]["gram_part"] for param in params)
        torch.testing.assert_close(gram, optimizer.state[params[0]]["gram"], rtol=1e-12, atol=1e-15)
        assert optimizer.memory()["gram"] == (len(params) + 1) * 8 * 7**2


def trajectory(problem, steps=12, **options):
    params = problem.parameters()
    optimizer = SparseMFAC(params, lr=0.05, num_grads=5, density=0.3, **options)
    for step in range(steps):
        set_gradients(params, problem.gradients(problem.start, step % 3))  # rows that nearly repeat
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("reliable", [True, False])
def test_lengths_that_cancel_are_measured(reliable, monkeypatch):
    problem = Regression(seed=58, width=20)
    asked = []
    square = Combination.square
    monkeypatch.setattr(Combination, "square", lambda *given: asked.append(square(*given)) or asked[-1])
    ends = [trajectory(problem)[0]]
    assert not asked
    monkeypatch.setattr(step_size, "knows_length", lambda shape: True)
    monkeypatch.setattr(preconditioners, "_CANCELLED", 1e-8 if reliable else 2.0)
    ends.append(trajectory(problem)[0])
    error, moved = distance(*ends, problem.start)
    assert moved > 0.1
    assert error < 1e-4
    assert len(asked) == 12 * len(ends[0])
    assert [square is None for square in asked] == [not reliable] * len(asked)


@dataclasses.dataclass(frozen=True)
class Signs(MFAC):
    """What somebody makes of an update is not the combination whose length the Gram matrix tells."""

    def updates(self, *arguments):
        return ((span, update.sign_()) for span, update in super().updates(*arguments))


@pytest.mark.usefixtures("large")
def test_updates_of_ones_own_are_measured():
    param = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = EFCP(
        [param], 1.0, compressor=TopK(1.0), preconditioner=Signs(relative_damp=0.1), num_grads=4, update_scale="tensor"
    )
    set_gradients([param], [torch.randn(20, 30, generator=torch.Generator().manual_seed(0))])
    optimizer.step()
    assert param.detach().square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)


def test_a_square_that_rounding_has_spoilt_is_none():
    gram = torch.ones(2, 2, dtype=torch.float64)
    for coefficients, expected in (((3.0, -1.0), 4.0), ((1e5, 1.0 - 1e5), None), ((0.0, 0.0), 0.0), ((1e200, 0), None)):
        combination = Combination(torch.tensor(coefficients, dtype=torch.float64))
        assert combination.square(gram) == expected
    outside = torch.tensor([2.0, 2.0, 9.0], dtype=torch.float64)
    assert Combination(torch.tensor([1.0, 0.0], dtype=torch.float64), 0.5).square(gram, outside) == 1 + 2 + 0.25 * 9


def test_a_gram_matrix_for_each_layer_is_the_part(monkeypatch):
    problem = Regression(seed=60, width=20)
    ends = []
    for _ in range(2):
        params = problem.parameters()
        optimizer = LowRankGGT(params, lr=0.05, num_grads=5, scope="layer")
        for step in range(8):
            set_gradients(params, problem.gradients(problem.start, step))
            optimizer.step()
        assert optimizer.memory()["gram"] == len(params) * 8 * 5**2
        ends.append(params)
        monkeypatch.setattr(step_size, "knows_length", lambda shape: True)
        monkeypatch.setattr(step_size, "measure", None)  # not called
    error, moved = distance(*ends, problem.start)
    assert moved > 0.1
    assert error < 1e-5


@pytest.mark.usefixtures("large")
def test_a_checkpoint_without_parts_of_the_gram_matrix_goes_on():
    """Lengths are measured then, for the parts of rows that were pushed before are not known."""
    problem = Regression(seed=59, width=20)
    params, optimizer = trajectory(problem)
    saved = optimizer.state_dict()
    ends = []
    for keep in (True, False):
        copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = SparseMFAC(copies, lr=0.05, num_grads=5, density=0.3)
        state = {k: {n: v for n, v in s.items() if keep or n != "gram_part"} for k, s in saved["state"].items()}
        resumed.load_state_dict({**saved, "state": state})
        for step in range(4):
            set_gradients(copies, problem.gradients(problem.start, step))
            resumed.step()
        assert all(("gram_part" in resumed.state[copy]) == keep for copy in copies)
        ends.append(copies)
    error, moved = distance(*ends, params)
    assert moved > 0.05
    assert error < 1e-4


def test_only_large_parameters_that_are_whole_keep_their_part_of_the_gram_matrix():
    class Large(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Parameter(torch.empty(11_000, 384, device="meta"))
            self.other = torch.nn.Parameter(torch.empty(10_000, 384, device="meta"))

    one = 8 * 16**2
    for options, expected in (({}, 2 * one), ({"update_scale": "none"}, one), ({"selection": "global"}, one)):
        assert estimate_memory(Large(), SparseMFAC, num_grads=16, **options)["gram"] == expected
    assert estimate_memory(Large(), MicroAdam, num_grads=16)["gram"] == 0
    assert not step_size.knows_length(torch.Size([2, step_size._HELD + 1]))  # its rows are long
    assert step_size.knows_length(torch.Size([step_size._HELD + 1]))


@pytest.mark.parametrize("cls", EVERY)
def test_the_first_update_has_the_wanted_root_mean_square(cls):
    problem = Regression(seed=53, width=20)
    params = problem.parameters()
    whole = {} if cls is DenseMFAC else {"value_dtype": torch.float32}
    whole |= {"rank": 100} if cls is LowRankMFAC else {} if cls is DenseMFAC else {"density": 1.0}
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "update_rms": 3.0}], lr=0.05, **whole)
    set_gradients(params, problem.gradients(params, 0))
    optimizer.step()
    for position, (param, start) in enumerate(zip(params, problem.start, strict=True)):
        rms = (param.detach() - start).square().mean().sqrt().item()
        assert rms == pytest.approx(0.05 if position < 2 else 0.15, rel=1e-4)


@pytest.mark.parametrize("precondition", ["row", "gradient"])
@pytest.mark.parametrize(
    ("cls", "options"), [*((cls, {}) for cls in EVERY), (DenseGGT, {"beta1": 0.9}), (LowRankGGT, {"beta1": 0.5})]
)
def test_a_step_is_as_long_as_what_is_preconditioned(cls, options, precondition):
    """A vector s times as long as gradients were makes a step s times as long, by the memory of their squares."""
    if precondition == "gradient" and (options or "precondition" not in inspect.signature(cls).parameters):
        pytest.skip("momentum, diagonal rules and dense rows have no choice")
    param = torch.nn.Parameter(torch.zeros(40))
    optimizer = cls([param], lr=1.0, **({"precondition": "gradient"} if precondition == "gradient" else {}), **options)
    beta1 = optimizer.defaults.get("beta1", 0.0) if precondition == "row" else 0.0
    generator = torch.Generator().manual_seed(0)
    squares = []
    for step, size in enumerate((1.0, 3.0, 0.5)):
        gradient = torch.randn(40, generator=generator)
        gradient *= size / gradient.norm()
        squares.append(size**2)
        before = param.detach().clone()
        set_gradients([param], [gradient])
        optimizer.step()
        weights = [0.999**age for age in reversed(range(len(squares)))]
        mean = sum(w * q for w, q in zip(weights, squares, strict=True)) / sum(weights)
        bias = 1.0 - beta1 ** (step + 1) if cls is MicroAdam else 1.0
        if precondition == "row" and cls is not SparseAdaGrad:  # whose window has one row
            x = sum((1.0 - beta1) / bias * beta1**age * rows(optimizer, step - age)[0] for age in range(step + 1))
        else:
            x = gradient if precondition == "gradient" else rows(optimizer, 0)[0]
        length = x.norm().item()
        moved = (param.detach() - before).norm().item()
        assert moved == pytest.approx(math.sqrt(40) * length / math.sqrt(mean), rel=1e-3)


def test_what_error_feedback_saves_up_moves_the_parameters():
    """Gradients that agree: with 2 % kept, every entry has moved as far in fifty steps as with all of it kept."""
    moved = []
    for density in (1.0, 0.02):
        param = torch.nn.Parameter(torch.zeros(1000))
        optimizer = MicroAdam([param], lr=1.0, density=density, num_grads=1, beta1=0.0, beta2=0.0, block_size=50)
        for _ in range(400):
            set_gradients([param], [torch.ones(1000)])
            optimizer.step()
        moved.append(param.detach().abs().mean().item())
    assert moved[0] == pytest.approx(400.0, rel=1e-3)
    assert moved[1] == pytest.approx(400.0, rel=0.15)  # what is still in the error has not moved anything


def test_a_row_from_the_error_alone_moves_and_none_is_longer_than_the_limit():
    """Without a gradient the error still comes out; a gradient a million times shorter than the error makes no jump."""
    for last, expected in ((0.0, None), (1e-9, step_size.LONGEST)):
        param = torch.nn.Parameter(torch.zeros(100))
        optimizer = SparseMFAC([param], lr=1.0)
        set_gradients([param], [torch.linspace(1.0, 2.0, 100)])
        optimizer.step()
        if expected:
            optimizer.state[param]["squares"][0] *= 1e-12
        before = param.detach().clone()
        set_gradients([param], [torch.full((100,), last)])
        optimizer.step()
        rms = (param.detach() - before).square().mean().sqrt().item()
        assert rms > 0.05
        if expected:
            assert rms == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("cls", [SparseMFAC, DenseMFAC, LowRankMFAC, SparseGGT])
def test_the_scale_of_gradients_changes_nothing(cls, scale):
    """Loss scaling: with the default, relative dampening, the same trajectory to rounding."""
    problem = Regression(seed=54, width=20)
    small = dict(value_dtype=torch.float32) if cls is not DenseMFAC else {}
    small |= dict(density=0.3) if cls in (SparseMFAC, SparseGGT) else {}
    ends = []
    for factor in (1.0, scale):
        params = problem.parameters()
        optimizer = cls(params, lr=0.05, num_grads=6, **small)
        for step in range(15):
            set_gradients(params, [factor * g for g in problem.gradients(problem.start, step)])
            optimizer.step()
        ends.append(params)
    error, moved = distance(*ends, problem.start)
    assert moved > 0.1
    assert error < 1e-3


def test_absolute_dampening_turns_with_the_scale_but_steps_stay_as_long():
    """Why the default is relative."""
    problem = Regression(seed=55, width=20)
    lengths, directions = [], []
    for factor in (1.0, 1e-3):
        params = problem.parameters()
        optimizer = SparseMFAC(params, lr=0.05, num_grads=6, density=0.3, damp=1e-3, value_dtype=torch.float32)
        lengths.append([])
        for step in range(10):
            before = flat(params)
            set_gradients(params, [factor * g for g in problem.gradients(problem.start, step)])
            optimizer.step()
            lengths[-1].append((flat(params) - before).norm().item())
        directions.append(flat(params) - flat(problem.start))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    assert torch.cosine_similarity(*directions, dim=0) < 0.999


def test_none_is_the_papers_rule():
    """`u = g / (lambda + |g|^2 / m)` for one row; no memory of lengths, no bytes."""
    gradient = torch.tensor([3.0, 4.0])
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = SparseMFAC([param], lr=1.0, num_grads=8, damp=0.5, density=1.0, update_scale="none")
    set_gradients([param], [gradient])
    optimizer.step()
    torch.testing.assert_close(-param.detach(), gradient / (0.5 + 25 / 8))
    assert "squares" not in optimizer.state[param]
    assert optimizer.memory()["momentum"] == 0


def test_a_group_keeps_the_papers_rule_beside_others():
    """The direction is one for all, whatever the lengths of others."""
    problem = Regression(seed=56, width=20)
    ends = []
    for mixed in (False, True):
        params = problem.parameters()
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        if mixed:
            groups[1]["update_scale"] = "tensor"
        optimizer = SparseMFAC(groups, lr=0.05, num_grads=6, density=0.3, damp=1e-3, update_scale="none")
        for step in range(12):
            set_gradients(params, problem.gradients(problem.start, step))
            optimizer.step()
        ends.append(params)
    assert torch.equal(flat(ends[0][:2]), flat(ends[1][:2]))
    assert not torch.equal(flat(ends[0][2:]), flat(ends[1][2:]))


def test_the_rule_may_change_between_steps_and_survives_saving():
    problem = Regression(seed=57, width=20)
    params = problem.parameters()
    optimizer = SparseMFAC(params, lr=0.05, num_grads=4, update_scale="none")
    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["update_scale"] = "tensor"
        set_gradients(params, problem.gradients(params, step))
        optimizer.step()
    assert all(optimizer.state[param]["squares"].dtype == torch.float64 for param in params)
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = SparseMFAC(copies, lr=0.05, num_grads=4, update_scale="none")
    resumed.load_state_dict(optimizer.state_dict())
    for targets, current in ((params, optimizer), (copies, resumed)):
        set_gradients(targets, problem.gradients(problem.start, 6))
        current.step()
    assert torch.equal(flat(params), flat(copies))


def test_zero_gradients_and_zero_updates_do_not_move():
    """What they would say about the lengths of gradients is nothing, and is not remembered."""
    param = torch.nn.Parameter(torch.ones(6))
    optimizer = SparseMFAC([param], lr=1.0, density=1.0)
    set_gradients([param], [torch.zeros(6)])
    optimizer.step()
    assert param.tolist() == [1.0] * 6
    assert optimizer.state[param]["squares"].tolist() == [0.0, 0.0]
    set_gradients([param], [torch.full((6,), 1e-30)])
    optimizer.step()
    assert (param.detach() - 1).square().mean().sqrt().item() == pytest.approx(1.0, rel=3e-3)


def test_no_row_is_more_than_three_times_as_long_as_its_share():
    """One row of a hundred has all of the gradient: ten times the root mean square, and gets three."""
    for gradient, expected in ((1.0, 3.0), (0.0, 0.0)):
        param = torch.nn.Parameter(torch.zeros(100, 8))
        optimizer = SparseMFAC([param], lr=1.0, density=1.0)
        grad = torch.zeros(100, 8)
        grad[17] = gradient
        set_gradients([param], [grad])
        optimizer.step()
        lengths = param.detach().square().mean(dim=1).sqrt()
        assert lengths[17].item() == pytest.approx(expected, rel=1e-4)
        assert not lengths[torch.arange(100) != 17].any()


SLAB, HELD = 1 << 20, step_size._HELD
SHAPES = [(1,), (SLAB + 3,), (7, 5), (1, 9), (300, 7000), (HELD // 384 + 2731, 384), (2, HELD), (HELD + 5, 1)]


def long_last_row(shape):
    """An update whose last row is too long, what computes it slab by slab, and where that was asked to start."""
    values, starts = torch.randn(shape, generator=torch.Generator().manual_seed(0)), []
    values[-1] *= 100.0

    def updates(start):
        starts.append(start)
        for first in range(start, values.numel(), SLAB):
            span = slice(first, min(first + SLAB, values.numel()))
            yield span, values.view(-1)[span].clone()

    return values, updates, starts


def check_given_out(sized, values, square, kernels):
    """Every entry once, times 0.5 over the root mean square, but rows no longer than three times that."""
    theta = torch.ones(values.numel())
    whole = torch.full((values.numel(),), torch.nan)
    for span, slab in sized.slabs:
        kernels.apply(theta[span], slab, span.start, sized.columns, sized.factors, lr=1.0, keep=0.0)
        assert whole[span].isnan().all()
        whole[span] = -theta[span]
    rows = values.view(len(values), -1) if values.ndim > 1 else values.view(1, -1)
    expected = rows * 0.5 * (values.numel() / square) ** 0.5
    lengths = expected.square().mean(dim=1, keepdim=True).sqrt()
    expected = expected * (1.5 / lengths).clamp(max=1.0)
    torch.testing.assert_close(whole.view(rows.shape), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernels", [reference, cpu], ids=BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_is_measured_row_by_row_and_given_out_whole(shape, kernels):
    """Whatever rows slabs begin and end in; beyond what is held, the update is computed again, from there on."""
    values, updates, starts = long_last_row(shape)
    update = step_size.measure(updates, values.shape, values.device, kernels)
    square = values.double().square().sum().item()
    rows = values.view(shape[0], -1) if len(shape) > 1 else values.view(1, -1)
    assert update.square == pytest.approx(square, rel=1e-12)
    torch.testing.assert_close(update.rows, rows.double().square().sum(dim=1), rtol=1e-12, atol=0)
    check_given_out(update.sized(0.5, square, values.numel()), values, square, kernels)
    assert starts == ([0] if values.numel() <= HELD else [0, HELD])


@pytest.mark.parametrize("kernels", [reference, cpu], ids=BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_of_known_length_is_computed_once(shape, kernels):
    values, updates, starts = long_last_row(shape)
    square = values.double().square().sum().item()
    sized = step_size.in_one_pass(updates, values.shape, values.device, kernels, rms=0.5, square=square)
    check_given_out(sized, values, square, kernels)
    assert starts == [0]


@pytest.mark.parametrize("kernels", [reference, cpu], ids=BACKENDS)
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1.0, 1e25])
def test_sums_of_squares_neither_vanish_nor_overflow(size, kernels):
    vector = torch.full((1000,), size)
    assert kernels.squares([vector])[0] == pytest.approx(1000 * vector[0].double().item() ** 2, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("selection", ["block", "global"])
@pytest.mark.parametrize("shapes", [[(4, 3), (0,), (7,)], [(5, 0), (2,)], [(0, 5), (2,)], [(), (3, 2)]], ids=str)
def test_parameters_without_entries_are_in_nobodys_way(shapes, selection, scale, backend):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = SparseMFAC(params, lr=0.5, selection=selection, update_scale=scale, backend=backend, density=1.0)
    set_gradients(params, [torch.ones(shape) for shape in shapes])
    optimizer.step()
    assert all(bool((param < 1.0).all()) for param in params)
    assert sum(param.numel() for param in params) > 0


def test_a_vector_has_no_limit_and_a_part_of_one_neither():
    """A shard that has all of a vector's update takes all of its length."""
    kernels = cpu
    whole = torch.zeros(1600)
    whole[:100] = torch.randn(100, generator=torch.Generator().manual_seed(0))
    square = whole.double().square().sum().item()
    for shard in (whole, whole[:100]):
        flat = shard.clone()
        update = step_size.measure(lambda start, f=flat: [(slice(0, len(f)), f)], flat.shape, flat.device, kernels)
        factor = update.sized(1.0, square, 1600).factors
        assert factor.item() == pytest.approx(40.0 / math.sqrt(square), rel=1e-5)


def test_a_default_device_changes_nothing():
    """torch.set_default_device is for models; the Gram matrix and what belongs to it stay on the CPU."""
    for cls in (SparseMFAC, SparseGGT, MicroAdam, SparseAdaGrad, LowRankMFAC):
        ends = []
        for device in ("cpu", "meta"):
            param = torch.nn.Parameter(torch.ones(20, 30))
            optimizer = cls([param], lr=0.1)
            param.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
            torch.set_default_device(device)
            try:
                optimizer.step()
            finally:
                torch.set_default_device(None)
            ends.append(param.detach())
        assert torch.equal(*ends)
        assert not torch.equal(ends[0], torch.ones(20, 30))


def test_wrong_values_are_refused():
    param = torch.nn.Parameter(torch.zeros(3))
    for options, message in (
        ({"update_scale": "layer"}, "update_scale must be one of 'tensor', 'none', got 'layer'"),
        ({"update_rms": 0.0}, "update_rms must be a finite positive number, got 0.0"),
        ({"update_rms": float("nan")}, "update_rms must be a finite positive number, got nan"),
        ({"relative_damp": -1.0}, "relative_damp must be a finite number of at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseMFAC([param], **options)
    with pytest.raises(ValueError, match="relative_eps must be a finite number of at least 0, got -1.0"):
        SparseGGT([param], relative_eps=-1.0)
