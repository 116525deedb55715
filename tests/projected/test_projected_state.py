"""State of the projected optimizers: resumed to the bit, refused when it does not fit, of the size announced."""

import copy
import io
import warnings

import pytest
import torch
from problems import Regression, flat, set_gradients
from relatives import RELATIVES, build, names
from states import ALONE, assert_same, train
from torch import nn

from hf_efcp import LowRankMFAC, NaturalGaLore, estimate_memory


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(name, steps=8):
    problem = Regression(seed=11, width=30)
    params = problem.parameters()
    optimizer = build(name, params)
    train(params, optimizer, problem, steps)
    return problem, params, optimizer


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 2, 13])
def test_resuming_is_bit_equal(name, dtype, at):
    """Before the first step, in the first subspace, and after several."""
    problem = Regression(seed=20, width=60)

    def start():
        params = problem.parameters(dtype)
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:3]},
                  {"params": params[3:], "preconditioned": False}]  # fmt: skip
        return params, build(name, groups)

    params, optimizer = start()
    train(params, optimizer, problem, at)
    saved = through_a_file(optimizer.state_dict())
    middle = copy.deepcopy([param.detach() for param in params])
    train(params, optimizer, problem, 9, start=at)

    resumed, other = start()
    for param, value in zip(resumed, middle, strict=True):
        param.data.copy_(value)
    other.load_state_dict(saved)
    assert_same(saved, other.state_dict())
    train(resumed, other, problem, 9, start=at)
    assert torch.equal(flat(resumed), flat(params))
    assert_same(other.state_dict(), optimizer.state_dict())
    assert not torch.equal(flat(resumed), flat(middle))


@pytest.mark.parametrize("name", names())
def test_loading_copies(name):
    problem, params, optimizer = trained(name)
    other_params = copy.deepcopy(params)
    other = build(name, other_params)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    train(other_params, other, problem, 3)
    assert_same(before, optimizer.state_dict())
    assert not torch.equal(flat(params), flat(other_params))


@pytest.mark.parametrize("name", names())
def test_hyperparameters_come_from_the_checkpoint(name):
    _, params, optimizer = trained(name)
    for group in optimizer.param_groups:
        group.update(lr=0.5, scale=0.75)
    other = build(name, copy.deepcopy(params))
    with pytest.warns(UserWarning, match=r"those that were given: scale=1.0 \(in the checkpoint 0.75\)"):
        other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["scale"]) == (0.5, 0.75)
    other.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert other.param_groups[1]["scale"] == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(name, copy.deepcopy(params)).load_state_dict(build(name, copy.deepcopy(params)).state_dict())


def refuse(optimizer, state_dict, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same(before, optimizer.state_dict())


def test_what_does_not_fit_is_refused_and_named():
    problem, params, optimizer = trained("galore")
    good, fresh = optimizer.state_dict(), problem.parameters
    refuse(build("galore", fresh(), rank=1), good, "made with rank=2, this optimizer has rank=1")
    refuse(build("galore", fresh(), proj_type="left"), good, "made with proj_type=std, this optimizer has")
    refuse(build("galore", params[:2]), good, r"groups of \[4\] parameters, this optimizer of \[2\]")
    wider = Regression(width=31).parameters()
    refuse(
        build("galore", wider), good, r"parameter 0 of group 0 .* does not fit: exp_avg is .*\(2, 30\), expected .*31"
    )
    refuse(build("natural_galore", fresh()), good, "was written by GaLore, and this optimizer is NaturalGaLore")
    history = NaturalGaLore(fresh(), rank=2, history=0).state_dict()
    refuse(build("galore", fresh()), history, "was written by NaturalGaLore, and this optimizer is GaLore")
    refuse(
        build("galore", fresh()), torch.optim.AdamW(fresh()).state_dict(), r"torch\.optim\.AdamW, and this .* GaLore"
    )
    window = LowRankMFAC(fresh()).state_dict()
    refuse(build("galore", fresh()), window, "written by another optimizer of hf_efcp, .* and this optimizer is GaLore")
    refuse(LowRankMFAC(fresh()), good, "written by another optimizer of hf_efcp, .* and this optimizer is LowRankMFAC")
    groups = [{"params": fresh(), "preconditioned": False}]
    refuse(build("galore", groups), good, "made with preconditioned=True")
    newer = copy.deepcopy(good)
    newer["param_groups"][0]["efcp_format"] += 1
    refuse(build("galore", fresh()), newer, "in format 4, this version of hf_efcp reads format 3")
    damaged = copy.deepcopy(good)
    del damaged["state"][0]["basis"]
    refuse(build("galore", fresh()), damaged, "parameter 0 of group 0 .* does not fit: basis is absent")


@pytest.mark.parametrize("name", names())
def test_memory_is_what_was_announced(name):
    cls, settings = RELATIVES[name]
    problem = Regression(width=90)
    params = problem.parameters()
    params[1].requires_grad_(False)
    plan = estimate_memory(params, cls, **settings)
    optimizer = cls(params, **settings)
    assert optimizer.memory()["total"] == 0
    set_gradients(params, [None if i == 1 else torch.ones_like(param) for i, param in enumerate(params)])
    optimizer.step()
    assert optimizer.memory() == plan == optimizer.planned_memory()
    tensors = [v for s in optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
    assert plan["total"] == sum(t.numel() * t.element_size() for t in tensors)
    assert "num_grads" not in str(plan)
    capacity = settings.get("rank", settings.get("max_rank"))
    sides = [(5, 90), (3, 90)]  # the second one has no more rows than a rank of 3
    projected = [pair for pair in sides if min(pair) > capacity]
    projected = [pair[::-1] for pair in projected] if name == "galore_reverse" else projected
    short, long = (sum(pair[i] for pair in projected) for i in (0, 1))
    plain = sum(a * b for a, b in sides if min(a, b) <= capacity) + 1
    adamw = 8 * plain + 4 * (1 + len(sides) - len(projected))
    assert plan["moments"] == 8 * capacity * long + adamw
    extra = capacity * long if name == "lorenza" else 0
    assert plan["subspace"] == 4 * (capacity * short + extra)
    window = len(projected) * 8 * 4**2 + 4 * 4 * capacity * long if name == "natural_galore" else 0
    assert plan["window"] == window


@pytest.mark.parametrize("name", names())
def test_bad_gradients_change_nothing(name):
    problem, params, optimizer = trained(name)
    set_gradients(params, problem.gradients(params, 5))
    good = params[2].grad.clone()
    for grad, error, message in (
        (torch.full_like(good, float("nan")), ValueError, "gradient of parameter 2 of group 0 .*90 entries of 90"),
        (
            torch.full_like(good, 3e38),
            ValueError,
            r"gradient of parameter 2 .* has norm 2.85e\+39, and at most 1e\+18 can",
        ),
        (good.to_sparse(), TypeError, "gradient of parameter 2 .* is sparse"),
    ):
        params[2].grad = grad
        before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
        with pytest.raises(error, match=message):
            optimizer.step()
        assert_same(before, ([p.detach() for p in params], optimizer.state_dict()))
    params[2].grad = good
    optimizer.step()
    assert not torch.equal(params[0], before[0][0])
    skipping = build(name, params, nonfinite="skip")
    before = flat(params)
    for count, value in enumerate((float("inf"), 3e38), start=1):
        params[0].grad = torch.full_like(params[0], value)
        skipping.step()
        assert skipping.skipped_steps == count
    assert torch.equal(flat(params), before)
    assert not skipping.state


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))


def steps(model, optimizer, numbers, backward=torch.Tensor.backward):
    for number in numbers:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(model(x), x[:, :2].sin()))
        optimizer.step()


@pytest.mark.parametrize("name", names())
def test_accelerators_save_state_and_load_state_are_exact(tmp_path, name):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, build(name, model.parameters()))
    steps(model, optimizer, range(8), accelerator.backward)
    accelerator.save_state(tmp_path)
    middle = flat(model.parameters())
    steps(model, optimizer, range(8, 14), accelerator.backward)
    end, state = flat(model.parameters()), copy.deepcopy(optimizer.optimizer.state_dict()["state"])
    accelerator.load_state(tmp_path)
    assert torch.equal(flat(model.parameters()), middle)
    steps(model, optimizer, range(8, 14), accelerator.backward)
    assert torch.equal(flat(model.parameters()), end)
    assert not torch.equal(end, middle)
    assert_same(state, optimizer.optimizer.state_dict()["state"])


@pytest.mark.parametrize(("name", "rho"), [*((name, 0.0) for name in names()), ("lorenza", 0.1)])
def test_distributed_checkpoints_of_one_process_are_exact(tmp_path, name, rho):
    """It has the state made by a step without learning rate and closure, which LORENZA must take as well."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    changes = {"rho": rho} if rho else {}
    model = network()
    optimizer = build(name, model.parameters())
    steps(model, optimizer, range(8))
    for group in optimizer.param_groups:
        group.update(changes)
    middle = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = network()
    other.load_state_dict(middle)
    fresh = build(name, other.parameters(), **changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, **ALONE)
        container = {"optimizer": get_optimizer_state_dict(other, fresh)}
        dcp.load(container, checkpoint_id=tmp_path, **ALONE)
    set_optimizer_state_dict(other, fresh, container["optimizer"])
    assert_same(fresh.state_dict()["state"], optimizer.state_dict()["state"])
    assert torch.equal(flat(other.parameters()), flat(middle.values()))
    for one, made in ((model, optimizer), (other, fresh)):
        for group in made.param_groups:
            group.update({"rho": 0.0} if rho else {})
        steps(one, made, range(8, 14))
    assert torch.equal(flat(other.parameters()), flat(model.parameters()))
    assert not torch.equal(flat(middle.values()), flat(model.parameters()))
