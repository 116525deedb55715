"""Low precision, scaled losses, accumulated and clipped gradients: what enters the window, and when it advances."""

import pytest
import torch
from number_cases import errors, pushed, rows
from problems import Regression, distance, flat, step_beside
from states import assert_same, snapshot
from variants import build, exact, names, papers_names, taken

EXACT_ROWS = {"density": 1.0, "value_dtype": torch.float32}


def autocast_loss(problem, params, step, dtype):
    """The problem's loss with its matrix products in low precision; the parameters stay as they are."""
    first, bias, second, scale = params
    x, y = problem.inputs[step % 64], problem.targets[step % 64]
    with torch.autocast("cpu", dtype=dtype):
        hidden = torch.tanh(torch.nn.functional.linear(x, first, bias))
        output = torch.nn.functional.linear(hidden, second)
        assert output.dtype == dtype
        return ((output.float() * scale - y) ** 2).mean()


def mean_loss(problem, thetas):
    with torch.no_grad():
        return sum(problem.loss(thetas, step).item() for step in range(64)) / 64


def backward(params, loss):
    for param in params:
        param.grad = None
    loss.backward()


# Dtypes


@pytest.mark.parametrize("name", names())
def test_bfloat16_autocast_follows_float32(name):
    """Float32 parameters get float32 gradients that were rounded on the way; nothing else changes."""
    problem = Regression(seed=40, width=30, scale=0.3)
    found = []
    for dtype in (None, torch.bfloat16):
        params = problem.parameters()
        optimizer = build(name, params, **exact(name))
        for step in range(4):
            loss = problem.loss(params, step) if dtype is None else autocast_loss(problem, params, step, dtype)
            backward(params, loss)
            assert {param.grad.dtype for param in params} == {torch.float32}
            optimizer.step()
            if step == 0:
                pushed_first = rows(optimizer, 0)[0] + errors(optimizer)
        state = optimizer.state[params[0]]
        dtypes = {key: value.dtype for key, value in state.items() if torch.is_tensor(value)}
        found.append((params, pushed_first, dtypes))
    (params, first, dtypes), (rounded, rounded_first, rounded_dtypes) = found
    assert dtypes == rounded_dtypes
    assert 0 < (rounded_first - first).norm() < 0.02 * first.norm()
    error, moved = distance(rounded, params, problem.start)
    assert moved > 1e-3
    assert 0 < error < 0.5


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac", "dense_ggt", "microadam"])
def test_bfloat16_autocast_learns_as_float32_does(name):
    problem = Regression(seed=40, width=30, scale=0.3)
    losses = []
    for dtype in (None, torch.bfloat16):
        params = problem.parameters()
        optimizer = build(name, params)
        for step in range(50):
            backward(
                params, problem.loss(params, step) if dtype is None else autocast_loss(problem, params, step, dtype)
            )
            optimizer.step()
        losses.append(mean_loss(problem, params))
    start = mean_loss(problem, problem.start)
    assert losses[0] < 0.8 * start
    assert abs(losses[1] - losses[0]) < 0.1 * start


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoupled_weight_decay", [True, False])
def test_parameters_in_low_precision_are_float32_steps_rounded_once(name, dtype, decoupled_weight_decay):
    """The same gradients, on both sides from the same parameters: equal to the bit, state included."""
    problem = Regression(seed=41, width=20)
    decay = dict(weight_decay=0.1, momentum=0.5, decoupled_weight_decay=decoupled_weight_decay)
    params, twins = problem.parameters(dtype), problem.parameters()
    optimizer, twin = (build(name, targets, **taken(name, **decay)) for targets in (params, twins))
    for step in range(12):
        step_beside(params, optimizer, twins, twin, problem.gradients(params, step))
    assert {param.dtype for param in params} == {dtype}
    assert_same(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert all((p != start.to(dtype)).any() for p, start in zip(params, problem.start, strict=True))


# Scaled losses


def scaled_step(scaler, optimizer, params, loss, spoil=None, clip=None):
    backward(params, scaler.scale(loss))
    if spoil is not None:
        params[spoil].grad.view(-1)[0] = float("inf")
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, clip)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", names())
def test_a_scaled_run_is_the_plain_run_without_its_overflows(name):
    """Scales are powers of two, so that nothing is rounded: equal to the bit to a run that never saw the bad steps."""
    problem = Regression(seed=42)
    params, plain = problem.parameters(), problem.parameters()
    optimizer, reference = build(name, params), build(name, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    scales = []
    for step in range(14):
        bad = step in (0, 5, 6, 11)
        before = snapshot(params, optimizer)
        scaled_step(scaler, optimizer, params, problem.loss(params, step), spoil=step % 4 if bad else None)
        scales.append(scaler.get_scale())
        if bad:
            after = snapshot(params, optimizer)
            assert_same(before[0], after[0])
            assert_same(before[2], after[2])  # the window, the error, the Gram matrix, the count, the groups
            continue
        backward(plain, problem.loss(plain, step))
        reference.step()
        assert all(torch.equal(p.grad, other.grad) for p, other in zip(params, plain, strict=True))
    assert pushed(optimizer) == 10
    assert optimizer.skipped_steps == 0  # it is the scaler that counts these
    assert scales[0] == 2.0**11
    assert len(set(scales)) > 2
    assert torch.equal(flat(params), flat(plain))
    assert_same(optimizer.state_dict()["state"], reference.state_dict()["state"])
    assert not torch.equal(flat(params), flat(problem.start))


@pytest.mark.parametrize("name", papers_names())
def test_the_unscaled_gradient_enters_the_window(name):
    problem = Regression(seed=43)
    params = problem.parameters()
    optimizer = build(name, params, **exact(name))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaled_step(scaler, optimizer, params, problem.loss(params, 0))
    gradient = flat(problem.gradients(problem.start, 0))
    assert (rows(optimizer, 0)[0] + errors(optimizer) - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac", "dense_ggt", "microadam"])
def test_float16_autocast_with_a_scaler_learns(name):
    problem = Regression(seed=44, width=30, scale=0.3)
    params = problem.parameters()
    optimizer = build(name, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)  # beyond float16 at first
    moved = 0
    for step in range(60):
        before = flat(params)
        scaled_step(scaler, optimizer, params, autocast_loss(problem, params, step, torch.float16), clip=10.0)
        moved += not torch.equal(flat(params), before)
    assert mean_loss(problem, params) < 0.8 * mean_loss(problem, problem.start)
    assert scaler.get_scale() < 2.0**24
    assert 40 < moved == pushed(optimizer) < 60


# Accumulated and clipped gradients


@pytest.mark.parametrize("name", names())
def test_eight_batches_of_one_are_one_batch_of_eight(name):
    problem = Regression(seed=45)
    ends = []
    for parts in (1, 8):
        params = problem.parameters()
        optimizer = build(name, params, **exact(name))
        for step in range(7):
            for param in params:
                param.grad = None
            for part in range(parts):
                first, bias, second, scale = params
                take = slice(part * 8 // parts, (part + 1) * 8 // parts)
                x, y = problem.inputs[step][take], problem.targets[step][take]
                loss = ((torch.tanh(x @ first.T + bias) @ second.T * scale - y) ** 2).mean() / parts
                loss.backward()
                assert pushed(optimizer) == step if step else not optimizer.state
            optimizer.step()
        assert pushed(optimizer) == 7
        ends.append((params, rows(optimizer), errors(optimizer)))
    (whole, window, error), (eight, other_window, other_error) = ends
    apart, moved = distance(eight, whole, problem.start)
    assert moved > 5e-3
    assert apart < 1e-3
    assert (window - other_window).norm() < 1e-2 * window.norm()  # a row may be rounded to the other bfloat16
    assert (error - other_error).norm() <= 1e-2 * window.norm()


@pytest.mark.parametrize("name", papers_names())
@pytest.mark.parametrize("limit", [None, 1e-2])
def test_the_clipped_gradient_enters_the_window(name, limit):
    """With little dampening, a gradient s times as short makes M-FAC's first update s times as long."""
    problem = Regression(seed=46)
    params = problem.parameters()
    optimizer = build(name, params, **exact(name), **taken(name, damp=1e-12, eps=1e-12, beta1=0.0))
    backward(params, problem.loss(params, 0))
    norm = flat([param.grad for param in params]).norm()
    assert norm > 0.1
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(params, limit)
    gradient = flat([param.grad for param in params])
    optimizer.step()
    assert gradient.norm().item() == pytest.approx(limit or norm.item(), rel=1e-4)
    row = rows(optimizer, 0)[0]
    assert (row + errors(optimizer) - gradient).norm() < 1e-6 * gradient.norm()
    if taken(name, damp=0.0) and optimizer._structure["scope"] == "model":
        group = optimizer.param_groups[0]
        expected = group["lr"] * group["num_grads"] / row.norm()
        assert (flat(params) - flat(problem.start)).norm().item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["sparse_mfac", "dense_mfac"])
def test_clipping_changes_nothing_below_its_limit(name):
    problem = Regression(seed=47)
    ends = []
    for limit in (None, 1e6, 0.5):
        params = problem.parameters()
        optimizer = build(name, params, **taken(name, **EXACT_ROWS))
        for step in range(6):
            backward(params, problem.loss(params, step))
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(params, limit)
            optimizer.step()
        ends.append(flat(params))
        if limit == 0.5:
            assert rows(optimizer).norm(dim=1).max() <= 0.5 * (1 + 1e-5)
    assert torch.equal(ends[0], ends[1])
    assert (ends[0] - ends[2]).norm() > 1e-3
