"""LORENZA's ascent: against a twin in float64, its evaluations, its random numbers, and that weights come back."""

import copy

import pytest
import torch
from problems import Regression, flat, set_gradients
from ranks import run as run_ranks
from relatives import build
from states import assert_same
from torch import nn
from twins import Sketched

from hf_efcp import LORENZA
from hf_efcp.projected.subspace import generator

SETTINGS = dict(lr=0.02, rank=2, scale=1.0, update_gap=3, rho=0.1, mu=0.05, seed=4)


def closure_of(optimizer, loss, calls=None):
    def closure():
        optimizer.zero_grad()
        value = loss()
        if calls is not None:
            calls.append((torch.is_grad_enabled(), value.item()))
        if value.requires_grad:
            value.backward()
        return value

    return closure


@pytest.mark.parametrize("probes", [1, 3])
def test_it_equals_its_twin(probes):
    """Two matrices share one slope and one norm; the vector is not moved uphill."""
    source = torch.Generator().manual_seed(0)
    starts = [torch.randn(8, 6, generator=source), torch.randn(4, 8, generator=source)]
    x, y = torch.randn(20, 6, generator=source), torch.randn(20, 4, generator=source)

    def loss(first, second):
        return ((torch.tanh(x.to(first.dtype) @ first.T) @ second.T - y.to(first.dtype)) ** 2).mean()

    params = [nn.Parameter(start.clone()) for start in starts]
    optimizer = LORENZA(params, probes=probes, **SETTINGS)
    twins = [
        Sketched(start, lr=0.02, rank=2, scale=1.0, gap=3, left=start.shape[0] < start.shape[1], seed=4, position=place)
        for place, start in enumerate(starts)
    ]
    for step in range(8):
        thetas = [twin.theta for twin in twins]
        moved = thetas
        if step:
            total, directions = [0.0, 0.0], []
            for probe in range(probes):
                directions = []
                for place, twin in enumerate(twins):
                    u = torch.randn(2, generator=generator(4, place, step, 1 + probe)).double()
                    P = twin.P @ torch.diag(u) @ twin.kept
                    directions.append(P if twin.left else P.T)
                up = loss(*[t + 0.05 * P for t, P in zip(thetas, directions, strict=True)])
                down = loss(*[t - 0.05 * P for t, P in zip(thetas, directions, strict=True)])
                d = (up - down) / 0.1
                total = [s + d * P / probes for s, P in zip(total, directions, strict=True)]
            length = flat(total).norm()
            moved = [t + 0.1 * s / length for t, s in zip(thetas, total, strict=True)]
        leaves = [theta.clone().requires_grad_() for theta in moved]
        gradients = torch.autograd.grad(loss(*leaves), leaves)
        optimizer.step(closure_of(optimizer, lambda: loss(*params)))
        for param, gradient, twin in zip(params, gradients, twins, strict=True):
            twin.update(gradient, optimizer.state[param]["basis"])
    for param, start, twin in zip(params, starts, twins, strict=True):
        assert twin.refreshes == 3
        assert (param.double() - twin.theta).norm() < 1e-3 * (twin.theta - start.double()).norm()


def test_rho_of_zero_is_its_own_base_and_needs_no_closure():
    problem = Regression(seed=3, width=20)
    ours, theirs = problem.parameters(), problem.parameters()
    with_closure, without = build("lorenza", ours), build("lorenza", theirs)
    calls = []
    for step in range(8):
        with_closure.step(closure_of(with_closure, lambda step=step: problem.loss(ours, step), calls))
        set_gradients(theirs, problem.gradients(theirs, step))
        without.step()
    assert torch.equal(flat(ours), flat(theirs))
    assert len(calls) == 8
    uphill = problem.parameters()
    other = build("lorenza", uphill, rho=0.1)
    for step in range(8):
        other.step(closure_of(other, lambda step=step: problem.loss(uphill, step)))
    assert (flat(uphill) - flat(ours)).norm() > 1e-3 * (flat(ours) - flat(problem.start)).norm()


@pytest.mark.parametrize("probes", [1, 2])
def test_two_forwards_a_probe_and_one_backward(probes):
    problem = Regression(seed=3, width=20)
    params = problem.parameters()
    optimizer = build("lorenza", params, rho=0.1, probes=probes)
    calls = []
    closure = closure_of(optimizer, lambda: problem.loss(params, 0), calls)
    optimizer.step(closure)
    assert [enabled for enabled, _ in calls] == [True]  # there is no subspace yet
    calls.clear()
    loss = optimizer.step(closure)
    assert [enabled for enabled, _ in calls] == [*[False] * 2 * probes, True]
    assert loss.item() == calls[-1][1]
    up, down = calls[0][1], calls[1][1]
    assert up != down
    assert calls[-1][1] > min(up, down)  # uphill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_to_the_bit_even_after_an_error(dtype):
    problem = Regression(seed=3, width=20)
    params = problem.parameters(dtype)
    # A finite difference must survive the parameters' rounding.
    optimizer = build("lorenza", params, rho=0.1, mu=0.01 if dtype == torch.float32 else 1.0)
    optimizer.step(closure_of(optimizer, lambda: problem.loss(params, 0)))
    before = copy.deepcopy([param.detach() for param in params])
    with optimizer.ascent(lambda: problem.loss(params, 1)):
        assert [torch.equal(*pair) for pair in zip(params, before, strict=True)] == [False, True, False, True]
        moved = (flat(params) - flat(before)).norm()
    assert moved == pytest.approx(0.1, rel=1e-5 if dtype == torch.float32 else 0.1)
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))

    def broken():
        if torch.is_grad_enabled():
            raise ZeroDivisionError
        return problem.loss(params, 1)

    for loss in (broken, lambda: 1 / 0):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(loss)
        assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_every_evaluation_has_the_same_dropout_and_no_more_is_drawn_than_by_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.Dropout(0.5), nn.Linear(10, 3))
    masks = []
    net[1].register_forward_hook(lambda module, inputs, output: masks.append((output == 0).clone()))
    optimizer = build("lorenza", net.parameters(), rho=0.1, probes=2)
    x = torch.ones(4, 12)
    closure = closure_of(optimizer, lambda: net(x).square().mean())
    optimizer.step(closure)
    masks.clear()
    state = torch.get_rng_state()
    optimizer.step(closure)
    assert len(masks) == 5
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    net(x)
    assert torch.equal(torch.get_rng_state(), after)
    optimizer.step(closure)
    assert not torch.equal(masks[-1], masks[0])


def test_without_a_closure_it_is_refused_and_nothing_changes():
    problem = Regression(seed=3, width=20)
    params = problem.parameters()
    optimizer = build("lorenza", params, rho=0.1)
    set_gradients(params, problem.gradients(params, 0))
    with pytest.raises(ValueError, match=r"needs step\(closure\), .*use EFCPTrainer in the place of Trainer"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(flat(params), flat(problem.start))
    with optimizer.ascent(lambda: problem.loss(params, 0)):
        pass
    optimizer.step()
    with pytest.raises(ValueError, match="gradients taken in"):  # once for each ascent
        optimizer.step()


def test_a_closure_that_always_calls_backward_is_told_what_to_do():
    problem = Regression(seed=3, width=20)
    params = problem.parameters()
    optimizer = build("lorenza", params, rho=0.1)

    def closure():
        loss = problem.loss(params, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = flat(params)
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        optimizer.step(closure)
    assert any("only if loss.requires_grad" in note for note in caught.value.__notes__)
    assert torch.equal(flat(params), before)


def test_a_loss_that_is_not_a_number_leads_nowhere():
    problem = Regression(seed=3, width=20)
    params = problem.parameters()
    optimizer = build("lorenza", params, rho=0.1)
    optimizer.step(closure_of(optimizer, lambda: problem.loss(params, 0)))
    before = flat(params)
    with optimizer.ascent(lambda: float("nan")):
        assert torch.equal(flat(params), before)


def _parallel(rank):
    """Two replicas with other batches: equal to the bit, and as one process with the mean of the losses."""
    problem = Regression(seed=3, width=20)
    net = _Net(problem)
    wrapped = nn.parallel.DistributedDataParallel(net)
    optimizer = build("lorenza", net.parameters(), rho=0.1, probes=2)
    for step in range(6):
        optimizer.step(closure_of(optimizer, lambda step=step: wrapped(2 * step + rank)))
    return flat(net.parameters())


class _Net(nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.problem, self.thetas = problem, nn.ParameterList(problem.parameters())

    def forward(self, step):
        return self.problem.loss(list(self.thetas), step)


def test_replicas_move_alike(tmp_path):
    ends = run_ranks(_parallel, 2, tmp_path)
    assert torch.equal(ends[0], ends[1])
    net = _Net(Regression(seed=3, width=20))
    start = flat(net.parameters())
    optimizer = build("lorenza", net.parameters(), rho=0.1, probes=2)
    for step in range(6):
        optimizer.step(closure_of(optimizer, lambda step=step: (net(2 * step) + net(2 * step + 1)) / 2))
    end = flat(net.parameters())
    assert (end - ends[0]).norm() < 1e-3 * (end - start).norm()


def test_a_step_that_gradscaler_skips_leaves_the_weights_as_they_were():
    problem = Regression(seed=3, width=20)
    params = problem.parameters()
    optimizer = build("lorenza", params, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        optimizer.zero_grad()
        before, moments = flat(params), copy.deepcopy(optimizer.state_dict()["state"])
        with optimizer.ascent(lambda step=step: problem.loss(params, step)):
            scaler.scale(problem.loss(params, step)).backward()
        if step == 2:
            params[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(params), before) == (step == 2)
        if step == 2:
            assert_same(moments, optimizer.state_dict()["state"])
    assert scaler.get_scale() == 32.0
