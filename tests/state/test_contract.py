"""What every optimizer of the package promises as a `torch.optim.Optimizer`, whatever it computes."""

import copy
import io
import pickle

import pytest
import torch
from problems import Regression, flat, set_gradients
from states import assert_same, snapshot, train, trained
from variants import build, exact, names, papers_names, taken

from hf_efcp.kernels import numba

pytestmark = pytest.mark.parametrize("name", names())


def test_learns(name):
    problem = Regression(seed=11, width=30, scale=0.3)
    params = problem.parameters()
    train(params, build(name, params, lr=0.01), problem, 200)
    before = sum(problem.loss(problem.start, step).item() for step in range(64))
    after = sum(problem.loss(params, step).item() for step in range(64))
    assert after < 0.5 * before
    for param, start in zip(params, problem.start, strict=True):
        assert (param != start).float().mean() > 0.9


QUADRATIC_RATES = {"mfac": 0.1, "ggt": 1.0, "microadam": 0.03, "adagrad": 1.0}


def test_a_badly_conditioned_quadratic_beats_gradient_descent(name):
    """Condition number 1e4, 300 steps: lower than gradient descent at the best of its rates, 2 / (h_max + h_min)."""
    if name not in papers_names():
        pytest.skip("its steps are as long as the gradient is, however flat the direction")
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(0, -4, 64)[torch.randperm(64, generator=generator)].view(8, 8)
    start = torch.randn(8, 8, generator=generator)

    def descend(make, rate, decay):
        param = torch.nn.Parameter(start.clone())
        optimizer = make([param])
        for step in range(300):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 300) if decay else rate
            set_gradients([param], [curvature * param])
            optimizer.step()
        return 0.5 * (curvature * param.detach() ** 2).sum().item()

    rates = [0.5, 1.0, 1.9, 2 / (1 + 1e-4)]
    best = min(descend(torch.optim.SGD, rate, decay) for rate in rates for decay in (False, True))
    rate = next(value for kind, value in QUADRATIC_RATES.items() if kind in name)
    changes = taken(name, num_grads=40, damp=1e-2, rank=3, beta1=0.0, beta2=1.0) if "microadam" not in name else {}
    assert descend(lambda params: build(name, params, **changes), rate, True) < 0.7 * best


def test_closure(name):
    problem = Regression()
    params = problem.parameters()
    optimizer = build(name, params)
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = problem.loss(params, 0)
        loss.backward()
        evaluations.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert first.item() == evaluations[0]
    assert len(evaluations) == 1
    assert closure().item() < evaluations[0]
    assert optimizer.step() is None


def test_gradients_are_left_alone(name):
    problem, params, optimizer = trained(name)
    set_gradients(params, problem.gradients(params, 3))
    kept = [param.grad for param in params]
    values = [grad.clone() for grad in kept]
    optimizer.step()
    for param, grad, value in zip(params, kept, values, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)


def test_without_gradients_nothing_happens(name):
    _, params, optimizer = trained(name)
    optimizer.zero_grad()
    before = snapshot(params, optimizer)
    assert optimizer.step() is None
    assert_same(before, snapshot(params, optimizer))


def test_a_parameter_without_a_gradient_keeps_value_and_error(name):
    problem, params, optimizer = trained(name, weight_decay=0.1)
    set_gradients(params, [None, *problem.gradients(params, 9)[1:]])
    value, state = params[0].detach().clone(), optimizer.state[params[0]]
    errors = {key: tensor.clone() for key, tensor in state.items() if key.startswith("error")}
    other = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], value)
    assert_same(errors, {key: state[key] for key in errors})
    assert not torch.equal(params[1], other)


def test_frozen_parameters_cost_nothing_and_may_thaw(name):
    """Thawed later, or added later, is as if the parameter had been there without a gradient."""
    problem = Regression(seed=12)

    def run(late, **changes):
        params = problem.parameters()
        if late == "thawed":
            params[0].requires_grad_(False)
        optimizer = build(name, params[1:] if late == "added" else params, **changes)
        for step in range(20):
            if step == 7 and late == "thawed":
                assert params[0] not in optimizer.state
                params[0].requires_grad_(True)
            if step == 7 and late == "added":
                optimizer.add_param_group({"params": params[:1]})
            gradients = problem.gradients(params, step)
            set_gradients(params, [None if step < 7 else gradients[0], *gradients[1:]])
            optimizer.step()
        return flat(params)

    assert torch.equal(run("thawed"), run("present"))
    present = run("present", **exact(name))
    moved = (present - flat(problem.start)).norm()
    # "added" comes last in the sums of the Gram column
    assert (run("added", **exact(name)) - present).norm() < 1e-4 * moved


def test_learning_rate_and_decay_are_per_group(name):
    problem = Regression(seed=13)
    params = problem.parameters()
    groups = [{"params": params[:1], "lr": 0.0}, {"params": []}, {"params": params[1:2], "weight_decay": 0.5},
              {"params": params[2:]}]  # fmt: skip
    optimizer = build(name, groups)
    together = problem.parameters()
    plain = build(name, together)
    for step_params, step_optimizer in ((params, optimizer), (together, plain)):
        set_gradients(step_params, problem.gradients(problem.start, 0))
        step_optimizer.step()
    assert torch.equal(params[0], problem.start[0])
    assert torch.equal(params[2], together[2])
    lr = plain.param_groups[0]["lr"]
    decayed = together[1].detach() - lr * 0.5 * problem.start[1]
    torch.testing.assert_close(params[1].detach(), decayed)
    assert (params[1] - together[1]).abs().max() > 1e-3 * lr


def test_schedulers_drive_the_groups(name):
    problem, params, optimizer = trained(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    set_gradients(params, problem.gradients(params, 8))
    optimizer.step()
    scheduler.step()
    before = flat(params)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert torch.equal(flat(params), before)


def test_odd_shapes_and_strides(name):
    """Scalars, empty and non-contiguous parameters step as their contiguous copies do."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    channels_last = random(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    starts = [random(6, 10).T, random(4, 6, 5)[:, ::2], random(), random(0, 3), channels_last]
    odd = [torch.nn.Parameter(start) for start in starts]
    assert [param.is_contiguous() for param in odd] == [False, False, True, True, False]
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
    assert [(new != old).any().item() for new, old in zip(odd, before, strict=True)] == [True, True, True, False, True]


def test_bits_do_not_depend_on_the_number_of_threads(name, monkeypatch):
    for module in (numba.dense, numba.moments):  # several ranges of what is light, too
        monkeypatch.setattr(module, "LIGHT", 1 << 15)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(700, 300, generator=generator)
    gradients = [torch.randn(700, 300, generator=generator) for _ in range(7)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param = torch.nn.Parameter(start.clone())
            optimizer = build(name, [param], **taken(name, num_grads=40))
            for gradient in gradients:
                set_gradients([param], [gradient])
                optimizer.step()
            assert torch.get_num_threads() == count
            results.append(snapshot([param], optimizer))
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(results[0][0][0], start)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_copies_and_pickles_go_on_alike(name):
    problem, params, optimizer = trained(name)

    def through_a_file(pair):
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for duplicate in (copy.deepcopy, through_a_file, lambda pair: pickle.loads(pickle.dumps(pair))):
        other_params, other = duplicate((params, optimizer))
        other.param_groups[0]["params"] = other_params
        original_params, original = copy.deepcopy((params, optimizer))
        original.param_groups[0]["params"] = original_params
        train(other_params, other, problem, 3, start=20)
        train(original_params, original, problem, 3, start=20)
        assert torch.equal(flat(other_params), flat(original_params))
        assert not torch.equal(flat(other_params), flat(params))
