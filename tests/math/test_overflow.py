"""Updates that no number can hold, Gram matrices in the long run, and infinite gradients."""

import pytest
import torch
from number_cases import MFAC_NAMES, SHAPES, assert_finite, errors, noise, parameters, pushed, rows
from problems import Regression, flat, set_gradients
from states import assert_same, snapshot, through_a_file
from variants import build, exact, papers_names, taken

from hf_efcp.compressors import TopK
from hf_efcp.optimizer import EFCP
from hf_efcp.preconditioners import MFAC
from hf_efcp.step import Step


# Scales of int8 are normal numbers: there a denormal row is zero, and all of it stays in the error.
@pytest.mark.parametrize("name", [name for name in MFAC_NAMES if not name.endswith("int8")])
@pytest.mark.parametrize("lr", [0.0, 0.5])
def test_an_update_beyond_float32_is_refused_before_a_parameter_moves(name, lr):
    """`m row / |row|^2` of a denormal row."""
    params = parameters()
    optimizer = build(name, params, lr=lr, damp=0.0, **exact(name))
    set_gradients(params, noise("denormal", 0))
    message = r"update has length \d.*e\+\d+, .* beyond torch.float32 .*no parameter was moved"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
    assert_finite(params, optimizer)
    # The gradient is in the window and in the error, and the next one is as good as any.
    assert pushed(optimizer) == 1
    given_then = flat(noise("denormal", 0))
    assert (rows(optimizer, 0)[0] + errors(optimizer) - given_then).norm() < 1e-3 * given_then.norm()
    set_gradients(params, noise("normal", 1))
    optimizer.step()
    assert pushed(optimizer) == 2
    assert_finite(params, optimizer)
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64)) == (lr == 0.0)


def test_one_layer_that_cannot_move_keeps_all_from_moving():
    params = parameters()
    optimizer = build("lowrank_mfac_layers", params, damp=0.0)
    gradients = noise("normal", 0)
    gradients[1] = torch.full((7,), 1e-42)
    set_gradients(params, gradients)
    with pytest.raises(ValueError, match=r"in parameter 1 of group 0 .*no parameter was moved"):
        optimizer.step()
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
    assert [optimizer.state[param]["pushed"] for param in params] == [1, 1, 1]


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac"])
def test_a_dense_gradient_over_a_small_damp_is_refused(name):
    params = parameters()
    optimizer = build(name, params, precondition="gradient", damp=1e-3)
    set_gradients(params, noise("huge", 0))
    with pytest.raises(ValueError, match=r"beyond torch.float32 .*a larger damp or eps"):
        optimizer.step()
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
    set_gradients(params, noise("normal", 1))
    optimizer.step()
    assert_finite(params, optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_fits_depends_on_the_parameter_and_the_learning_rate(dtype, momentum):
    """An update of 20,000 at lr 1, 2e5 with the momentum that it will have; float16 ends at 65,504."""
    for lr in (1.0, 10.0, 0.01):
        params = parameters(dtype)
        optimizer = build("dense_mfac", params, lr=lr, damp=0.0, momentum=momentum)
        gradients = [torch.zeros(shape) for shape in SHAPES]
        gradients[1][2] = 5 / 20000
        set_gradients(params, gradients)
        if dtype == torch.float16 and lr * 20000 / (1 - momentum) > 65504:
            with pytest.raises(ValueError, match=r"length 2e\+04, .* beyond torch.float16 \(6.55e\+04\)"):
                optimizer.step()
            assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
        else:
            optimizer.step()
            assert params[1][2].item() == pytest.approx(1 - lr * 20000, rel=1e-2)


@pytest.mark.parametrize("name", [name for name in papers_names() if name not in ("microadam", "sparse_adagrad")])
@pytest.mark.parametrize("precondition", ["row", "gradient"])
def test_the_length_of_an_update_is_known_before_it_exists(name, precondition, monkeypatch):
    params = parameters()
    changes = {"precondition": precondition, **exact(name), **taken(name, beta1=0.0)}
    optimizer = build(name, params, lr=1.0, **changes)
    lengths = []
    check = Step._check_length

    def noted(step, leaves, length):
        lengths.append(length)
        check(step, leaves, length)

    monkeypatch.setattr(Step, "_check_length", noted)
    for step in range(9):
        before, lengths[:] = flat(params), []
        set_gradients(params, noise("normal", step))
        optimizer.step()
        moved = (flat(params) - before).norm().item()
        assert moved > 1e-3
        assert torch.tensor(lengths).norm().item() == pytest.approx(moved, rel=1e-4)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dense_mfac", "lowrank_ggt")]


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac", *SLOW])
def test_the_gram_matrix_is_the_true_one_after_thousands_of_steps(name):
    """3,000 rows through a window of 16, of sizes over six decades; parameters come and go."""
    params = parameters()
    optimizer = build(name, params, num_grads=16)
    generator = torch.Generator().manual_seed(0)
    for step in range(3000):
        size = 10 ** (3 * torch.sin(torch.tensor(step / 5.0)))
        for position, param in enumerate(params):
            absent = step % 7 == position
            param.grad = None if absent else size * torch.randn(param.shape, generator=generator)
        optimizer.step()
    set_gradients(params, noise("normal", 0))  # for rows() to see all parameters
    window = rows(optimizer)
    gram = optimizer._gram_state(optimizer._refs())["gram"]
    assert pushed(optimizer) == 3000
    bound = 1e-6 if name.startswith("lowrank") else 1e-12
    scale = window.norm(dim=1)
    assert (scale > 0).all()
    assert ((gram - window @ window.T).abs() <= bound * scale[:, None] * scale).all()
    assert_finite(params, optimizer)


def lenient(params, **changes):
    settings_ = dict(num_grads=4, nonfinite="skip", momentum=0.5, weight_decay=0.1)
    return EFCP(params, 0.02, compressor=TopK(0.3, 8), preconditioner=MFAC(1e-3), **{**settings_, **changes})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_skipped_steps_change_nothing_are_counted_saved_and_resumed(value):
    problem = Regression(seed=30)

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:3], "preconditioned": False}, {"params": params[3:]}]

    params, good = problem.parameters(), problem.parameters()
    optimizer, strict = lenient(groups(params)), lenient(groups(good), nonfinite="raise")

    def both(step):
        gradients = problem.gradients(good, step)
        set_gradients(good, gradients)
        strict.step()
        set_gradients(params, gradients)
        optimizer.step()

    def bad(position):
        set_gradients(params, problem.gradients(good, 0))
        params[position].grad.view(-1)[0] = value
        before = snapshot(params, optimizer)
        assert optimizer.step() is None
        after = snapshot(params, optimizer)
        for group in (*before[2]["param_groups"], *after[2]["param_groups"]):
            group.pop("skipped_steps")
        assert_same(before[0], after[0])
        assert_same(before[2], after[2])

    bad(0)
    assert not optimizer.state
    for step in range(6):
        both(step)
        bad(step % 4)
    assert optimizer.skipped_steps == 7
    assert strict.skipped_steps == 0
    saved = through_a_file(optimizer.state_dict())
    params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = lenient(groups(params))
    optimizer.load_state_dict(saved)
    assert optimizer.skipped_steps == 7
    bad(3)
    both(6)
    assert optimizer.skipped_steps == 8
    assert torch.equal(flat(params), flat(good))
    assert_same(optimizer.state_dict()["state"], strict.state_dict()["state"])
    assert not torch.equal(flat(params), flat(problem.start))
