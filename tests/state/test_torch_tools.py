"""What torch's own tools do to an optimizer: schedulers that cycle momentum, compiler, hooks, checkpoints of others."""

import copy
import warnings

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


# Checkpoints


def stepped(make):
    params = Regression().parameters()
    optimizer = make(params)
    steps(params, optimizer, 2)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "writer"),
    [
        # The groups of both are the same in torch 2.6.
        (torch.optim.Adam, r"torch\.optim\.Adam( or torch\.optim\.AdamW)?"),
        (torch.optim.AdamW, r"(torch\.optim\.Adam or )?torch\.optim\.AdamW"),
        (torch.optim.SGD, r"torch\.optim\.SGD"),
        (torch.optim.RMSprop, r"torch\.optim\.RMSprop"),
        (lambda params: torch.optim.Optimizer(params, {"lr": 1.0, "own": 2}), "an optimizer with the settings lr, own"),
        (
            lambda params: build("sparse_mfac", params),
            "another optimizer of hf_efcp, one with block_size, density and without rank, seed",
        ),
    ],
    ids=["Adam", "AdamW", "SGD", "RMSprop", "unknown", "ours"],
)
def test_who_wrote_a_checkpoint_and_who_reads_it_is_said(make, writer):
    reader = build("lowrank_mfac", Regression().parameters())
    state = make(Regression().parameters()).state_dict()
    words = f"^the checkpoint was written by {writer}, and this optimizer is LowRankMFAC, .* Resume with the optimizer"
    with pytest.raises(ValueError, match=words):
        reader.load_state_dict(state)


@pytest.mark.parametrize("name", names())
def test_settings_that_a_checkpoint_replaces_are_warned_of(name):
    saved = stepped(lambda params: build(name, params))
    other = build(name, Regression().parameters(), lr=0.25, weight_decay=0.125, momentum=0.375)
    tunable = other._tunable[0]
    other.param_groups[0][tunable] = 0.0625
    old = saved["param_groups"][0]
    expected = [
        f"lr=0.25 (in the checkpoint {old['lr']})",
        f"momentum=0.375 (in the checkpoint {old['heavy_ball']})",
        "weight_decay=0.125 (in the checkpoint 0.0)",
        f"{tunable}=0.0625 (in the checkpoint {old[tunable]})",
    ]
    with pytest.warns(UserWarning, match="settings of the checkpoint are taken") as caught:
        other.load_state_dict(saved)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert f"given: {', '.join(expected)}. To use yours" in str(caught[0].message)
    assert other.param_groups[0]["lr"] == old["lr"]


def test_what_schedules_do_to_learning_rates_is_no_change_of_settings():
    """Nor a rate set by hand in training, nor one that was set after an earlier resume."""
    makers = {
        "none": lambda optimizer: None,
        "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        "one cycle": lambda optimizer: SCHEDULERS["OneCycleLR"](optimizer, cycle_momentum=False),
        "warm-up": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
    }
    for first in makers.values():
        for second in makers.values():
            params = Regression().parameters()
            optimizer = build("sparse_mfac", params, lr=0.01)
            schedule = first(optimizer)
            steps(params, optimizer, 2)
            if schedule is None:
                optimizer.param_groups[0]["lr"] *= 0.5
            else:
                for loss in (1.0, 2.0):
                    schedule.step(*[loss] * isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau))
            saved = copy.deepcopy(optimizer.state_dict())
            assert saved["param_groups"][0]["lr"] != 0.01
            fresh = build("sparse_mfac", Regression().parameters(), lr=0.01)
            second(fresh)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fresh.load_state_dict(saved)
    fresh.param_groups[0]["lr"] = 0.02
    later = build("sparse_mfac", Regression().parameters(), lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later.load_state_dict(fresh.state_dict())


# Hooks


@pytest.mark.parametrize("name", names())
def test_hooks_of_loading_see_the_state_and_may_change_it(name):
    problem, seen = Regression(), []
    params = problem.parameters()
    optimizer = build(name, params)
    steps(params, optimizer, 2)
    saved = optimizer.state_dict()
    other = build(name, Regression().parameters())
    hooks = [
        other.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(len(state_dict["state"]))),
        other.register_load_state_dict_post_hook(lambda own: seen.append(len(own.state))),
    ]
    other.load_state_dict(saved)
    assert seen == [len(params)] * 2
    for hook in hooks:
        hook.remove()
    other.register_load_state_dict_pre_hook(lambda _, state_dict: {**state_dict, "state": {}})
    other.load_state_dict(saved)
    assert seen == [len(params)] * 2
    assert not other.state
    assert len(saved["state"]) == len(params)
