"""What every projected optimizer promises as a `torch.optim.Optimizer`, whatever its subspace is."""

import copy
import pickle

import pytest
import torch
from problems import Regression, flat, set_gradients
from relatives import build, names
from states import assert_same, snapshot, train

from hf_efcp.kernels import numba

pytestmark = pytest.mark.parametrize("name", names())


def trained(name, steps=8, dtype=torch.float32, **changes):
    """A problem, its parameters, and an optimizer that has refreshed its subspaces twice."""
    problem = Regression(seed=11, width=30)
    params = problem.parameters(dtype)
    optimizer = build(name, params, **changes)
    train(params, optimizer, problem, steps)
    assert optimizer.state[params[0]]["refreshes"] > 1
    return problem, params, optimizer


def test_learns(name):
    problem = Regression(seed=11, width=30, scale=0.3)
    params = problem.parameters()
    train(params, build(name, params, lr=0.02), problem, 200)
    before = sum(problem.loss(problem.start, step).item() for step in range(64))
    assert sum(problem.loss(params, step).item() for step in range(64)) < 0.5 * before


def test_closure(name):
    problem = Regression()
    params = problem.parameters()
    optimizer = build(name, params)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = problem.loss(params, 0)
        loss.backward()
        losses.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == losses[0]
    assert len(losses) == 1
    assert closure().item() < losses[0]
    assert optimizer.step() is None


def test_gradients_are_left_alone_and_without_them_nothing_happens(name):
    problem, params, optimizer = trained(name)
    set_gradients(params, problem.gradients(params, 3))
    kept, values = [param.grad for param in params], [param.grad.clone() for param in params]
    optimizer.step()
    for param, grad, value in zip(params, kept, values, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)
    optimizer.zero_grad()
    before = snapshot(params, optimizer)
    assert optimizer.step() is None
    assert_same(before, snapshot(params, optimizer))


def test_a_parameter_without_a_gradient_keeps_value_and_state(name):
    problem, params, optimizer = trained(name, weight_decay=0.1)
    set_gradients(params, [None, *problem.gradients(params, 9)[1:]])
    value, state = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
    other = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], value)
    assert_same(state, dict(optimizer.state[params[0]]))
    assert not torch.equal(params[2], other)


def test_frozen_parameters_cost_nothing_and_may_thaw(name):
    """Thawed or added later is as if the parameter had been there without a gradient; seeds go by positions."""
    problem = Regression(seed=12)

    def run(late):
        params = problem.parameters()
        if late == "thawed":
            params[2].requires_grad_(False)
        optimizer = build(name, params)
        for step in range(12):
            if step == 5 and late == "thawed":
                assert params[2] not in optimizer.state
                params[2].requires_grad_(True)
            gradients = problem.gradients(params, step)
            set_gradients(params, [*gradients[:2], None if step < 5 else gradients[2], gradients[3]])
            optimizer.step()
        return flat(params)

    assert torch.equal(run("thawed"), run("present"))


def test_frozen_parameters_may_have_any_dtype(name):
    params = Regression().parameters()
    frozen = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    optimizer = build(name, [frozen, *params])
    set_gradients(params, [torch.ones_like(param) for param in params])
    optimizer.step()
    assert frozen not in optimizer.state


def test_learning_rate_and_decay_are_per_group(name):
    problem = Regression(seed=13)
    params, together = problem.parameters(), problem.parameters()
    groups = [{"params": params[:1], "lr": 0.0}, {"params": []}, {"params": params[1:3], "weight_decay": 0.5},
              {"params": params[3:]}]  # fmt: skip
    optimizer, plain = build(name, groups), build(name, together)
    for some, one in ((params, optimizer), (together, plain)):
        set_gradients(some, problem.gradients(problem.start, 0))
        one.step()
    assert torch.equal(params[0], problem.start[0])
    decayed = together[2].detach() - plain.param_groups[0]["lr"] * 0.5 * problem.start[2]
    torch.testing.assert_close(params[2].detach(), decayed)
    assert not torch.equal(params[2], together[2])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = flat(params)
    optimizer.step()
    scheduler.step()
    assert torch.equal(flat(params), before)


def test_odd_shapes_and_strides(name):
    """Scalars, empty, one-row and non-contiguous parameters step as their contiguous copies do."""
    source = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=source)

    channels_last = random(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    starts = [random(6, 10).T, random(4, 6, 5)[:, ::2], random(), random(0, 3), random(1, 9), random(9, 1),
              random(5, 0, 4), channels_last]  # fmt: skip
    odd = [torch.nn.Parameter(start) for start in starts]
    plain = [torch.nn.Parameter(start.clone(memory_format=torch.contiguous_format)) for start in starts]
    before = [start.clone() for start in starts]
    optimizers = [build(name, odd), build(name, plain)]
    for _ in range(7):
        gradients = [random(*start.shape) for start in starts]
        for params, optimizer in zip((odd, plain), optimizers, strict=True):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = torch.empty_like(param).copy_(gradient)
            optimizer.step()
    for ours, theirs, start in zip(odd, plain, starts, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == start.stride()
    moved = [(new != old).any().item() for new, old in zip(odd, before, strict=True)]
    assert moved == [True, True, True, False, True, True, False, True]
    assert ["basis" in optimizers[0].state[param] for param in odd] == [True, True, *[False] * 5, True]


def test_half_precision_is_the_float32_step_rounded_once(name):
    """State stays float32: on the same gradients it is that of float32 parameters, to the bit."""
    source = torch.Generator().manual_seed(3)
    start = torch.randn(14, 9, generator=source).to(torch.bfloat16)
    half, single = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizers = [build(name, [param]) for param in (half, single)]
    for _ in range(8):
        gradient = torch.randn(14, 9, generator=source).to(torch.bfloat16)
        expected = half.detach().float()
        for param, optimizer in zip((half, single), optimizers, strict=True):
            before = param.detach().clone()
            set_gradients([param], [gradient])
            optimizer.step()
            if param is single:
                update = before - param.detach()
        assert (half.float() - (expected - update)).abs().max() <= 2**-8 * expected.abs().max()
    assert_same(dict(optimizers[0].state[half]), dict(optimizers[1].state[single]))
    assert not torch.equal(half, start)


def test_bits_do_not_depend_on_the_number_of_threads(name, monkeypatch):
    monkeypatch.setattr(numba.moments, "LIGHT", 1 << 15)
    source = torch.Generator().manual_seed(1)
    starts = [torch.randn(shape, generator=source) for shape in ((300, 200), (150, 260))]
    gradients = [[torch.randn(start.shape, generator=source) for start in starts] for _ in range(5)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            params = [torch.nn.Parameter(start.clone()) for start in starts]
            optimizer = build(name, params)
            for some in gradients:
                set_gradients(params, some)
                optimizer.step()
            assert torch.get_num_threads() == count
            results.append(snapshot(params, optimizer))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert not torch.equal(results[0][0][0], starts[0])


def test_the_global_generator_is_not_touched(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_and_pickles_go_on_alike(name):
    problem, params, optimizer = trained(name)
    ends = []
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), lambda pair: pair):
        other_params, other = duplicate((params, optimizer))
        other.param_groups[0]["params"] = other_params
        train(other_params, other, problem, 4, start=20)
        ends.append(flat(other_params))
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[2])


def test_groups_that_are_not_preconditioned_are_stepped_as_adamw(name):
    problem = Regression(seed=14)
    params, reference = problem.parameters(), problem.parameters()
    groups = [{"params": params[:1], "preconditioned": False, "lr": 1e-3, "weight_decay": 0.1}, {"params": params[1:]}]
    optimizer = build(name, groups, beta1=0.5, eps=1e-3)
    adamw = torch.optim.AdamW(reference[:1], lr=1e-3, weight_decay=0.1)
    for step in range(12):
        gradients = problem.gradients(params, step)
        set_gradients(params, gradients)
        set_gradients(reference, gradients)
        optimizer.step()
        adamw.step()
    assert torch.equal(params[0], reference[0])
    assert (params[0] - problem.start[0]).abs().max() > 5e-3
    optimizer.param_groups[0]["preconditioned"] = True
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match="preconditioned of a group was changed after the first step, and parameter 0"):
        optimizer.step()
    assert_same(before, snapshot(params, optimizer))


def test_long_finite_gradients_keep_all_finite(name):
    """Up to the length that is refused."""
    source = torch.Generator().manual_seed(2)
    param = torch.nn.Parameter(torch.zeros(14, 9))
    optimizer = build(name, [param], lr=1.0)
    for size in (1e16, 1e-30, 8e16, 0.0, 1e-10, 1.0):
        set_gradients([param], [size * torch.randn(14, 9, generator=source)])
        optimizer.step()
    assert torch.isfinite(param).all()
    assert all(v.isfinite().all() for v in optimizer.state[param].values() if torch.is_tensor(v))
    assert (param != 0).all()
