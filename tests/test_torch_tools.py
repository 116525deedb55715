"""What torch's own tools do to an optimizer: schedulers that cycle momentum, its compiler."""

import pytest
import torch
from problems import Regression, flat, set_gradients
from variants import VARIANTS, build, names

SCHEDULERS = {
    "OneCycleLR": lambda optimizer, **more: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=20, **more
    ),
    "CyclicLR": lambda optimizer, **more: torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=1e-3, max_lr=1e-2, step_size_up=6, **more
    ),
}


def steps(params, optimizer, count, after=lambda: None, before=lambda step: None):
    problem = Regression()
    for step in range(count):
        before(step)
        set_gradients(params, problem.gradients(params, step))
        optimizer.step()
        after()


# Schedulers


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", names())
def test_schedulers_move_the_learning_rate_and_nothing_else(name, scheduler):
    """Their default, which cycles momentum, is refused by torch; 20 steps are those of the same rates set by hand."""
    sgd = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, rates = SCHEDULERS[scheduler](sgd, cycle_momentum=False), []
    for _ in range(20):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if len(rates) < 20:
            schedule.step()
    assert max(rates) > 4 * min(rates)

    params = Regression().parameters()
    optimizer = build(name, params)
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1 with `cycle_momentum` option"):
        SCHEDULERS[scheduler](optimizer)
    schedule = SCHEDULERS[scheduler](optimizer, cycle_momentum=False)
    counter = iter(range(19))
    steps(params, optimizer, 20, after=lambda: next(counter, None) is not None and schedule.step())

    others = Regression().parameters()
    by_hand = build(name, others)
    steps(others, by_hand, 20, before=lambda step: by_hand.param_groups[0].update(lr=rates[step]))
    assert torch.equal(flat(params), flat(others))
    assert (flat(params) - flat(Regression().start)).norm() > 1e-3
    assert optimizer.memory() == by_hand.memory()
    kept = {key for state in optimizer.state.values() for key in state}
    assert ("momentum" in kept) == ("momentum" in VARIANTS[name][1])


def test_momentum_of_groups_is_kept_under_a_name_that_no_scheduler_knows():
    first, second, third = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    given = [{"params": [first], "momentum": 0.5}, {"params": [second]}]
    optimizer = build("dense_mfac", given, momentum=0.9)
    optimizer.add_param_group({"params": [third], "momentum": 0.25})
    assert [group["heavy_ball"] for group in optimizer.param_groups] == [0.5, 0.9, 0.25]
    assert not {"momentum", "betas"} & {key for group in optimizer.param_groups for key in group}
    assert given[0]["momentum"] == 0.5
    with pytest.raises(ValueError, match=r"both momentum=0.5 and heavy_ball: give momentum alone"):
        optimizer.add_param_group({"params": [torch.ones(1)], "momentum": 0.5, "heavy_ball": 0.5})
    first.grad = torch.ones(3)
    optimizer.param_groups[0]["momentum"] = 0.95
    with pytest.raises(ValueError, match=r"was given momentum=0.95 afterwards, .*Set group\['heavy_ball'\]"):
        optimizer.step()
    del optimizer.param_groups[0]["momentum"]
    optimizer.step()
    assert "momentum" in optimizer.state[first]


# The compiler


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend="eager")  # traced by the compiler, and then run as it is
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("name", ["sparse_mfac", "sparse_mfac_int8", "lowrank_mfac_metric", "dense_ggt", "microadam"])
def test_compiled_steps_are_those_of_the_uncompiled_optimizer(name, backend, compiler):
    ends = []
    for compiled in (False, True):
        params = Regression().parameters()
        groups = [{"params": params[:2]}, {"params": params[2:3], "preconditioned": False}, {"params": params[3:]}]
        optimizer = build(name, groups, backend=backend)
        method = compiler(optimizer.step) if compiled else optimizer.step

        def step(optimizer=optimizer, params=params):
            optimizer.step()
            return params[0] * 2

        function = compiler(step) if compiled else step
        problem = Regression()
        for number in range(4):
            gradients = problem.gradients(params, number)

            def closure(params=params, gradients=gradients):
                set_gradients(params, gradients)
                return 3.5

            if number % 3 == 0:
                assert method(closure) == 3.5
            else:
                closure()
                assert torch.equal(function(), params[0] * 2)
        ends.append(flat(params))
    assert (ends[0] - flat(Regression().start)).norm() > 1e-3
    assert torch.equal(*ends)
