"""What every optimizer of the package refuses, and that nothing changes then."""

import copy

import pytest
import torch
from problems import Regression, flat, set_gradients
from states import assert_same, snapshot, train, trained
from variants import build, exact, names, taken

pytestmark = pytest.mark.parametrize("name", names())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda g: g.fill_(float("nan")), ValueError, r"gradient of parameter 2 of group 0 .*90 entries of 90 .*NaN"),
        (lambda g: g.view(-1)[3:4].fill_(float("-inf")), ValueError, "1 entries of 90 that are NaN or infinite"),
        (lambda g: None, TypeError, "gradient of parameter 2 .* is sparse"),
    ],
    ids=["nan", "inf", "sparse"],
)
def test_bad_gradients_change_nothing(name, spoil, error, message):
    problem, params, optimizer = trained(name)
    set_gradients(params, problem.gradients(params, 5))
    good = params[2].grad.clone()
    spoil(params[2].grad)
    if error is TypeError:
        params[2].grad = good.to_sparse()
    before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same(before, ([p.detach() for p in params], optimizer.state_dict()))
    params[2].grad = good
    optimizer.step()
    assert not torch.equal(params[0], before[0][0])


def test_a_bad_first_gradient_allocates_nothing(name):
    params = Regression().parameters()
    optimizer = build(name, params)
    set_gradients(params, [torch.full_like(param, float("nan")) for param in params])
    with pytest.raises(ValueError, match="NaN or infinite; nothing was changed"):
        optimizer.step()
    assert not optimizer.state


def test_large_finite_gradients_are_not_mistaken_for_infinite_ones(name):
    param = torch.nn.Parameter(torch.zeros(100))
    optimizer = build(name, [param], lr=1.0)
    for _ in range(8):
        set_gradients([param], [torch.full((100,), 3e38)])
        assert not torch.isfinite(param.grad.sum())
        optimizer.step()
    assert torch.isfinite(param).all()
    for value in optimizer.state[param].values():
        assert not torch.is_tensor(value) or not value.is_floating_point() or torch.isfinite(value).all()


def test_parameters_that_cannot_be_stepped_are_refused(name):
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match=rf"must be one of .*parameter 1 of group 0 .* is {dtype}"):
            build(name, [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=dtype))])
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, device="meta"))]
    optimizer = build(name, params)
    for param in params:
        param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        optimizer.step()
    assert not optimizer.state
    converted = torch.nn.Parameter(torch.zeros(3))
    optimizer = build(name, [("weight", converted)])
    converted.data = converted.data.double()
    converted.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="weight is torch.float64"):
        optimizer.step()


def test_bad_settings_are_refused(name):
    params = Regression().parameters()
    for changes, message in [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        (
            {"lr": torch.tensor(0.1, device="meta")},
            "lr is a tensor on meta, and every step would wait to read it",
        ),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(name, [{"params": params, **changes}])
    if taken(name, num_grads=0):
        with pytest.raises(ValueError, match="at least 1; got 0"):
            build(name, params, num_grads=0)
        with pytest.raises(TypeError, match="num_grads must be an int, got 2.5"):
            build(name, params, num_grads=2.5)
    own = build(name, params).param_groups[0]["num_grads"]
    message = f"num_grads belongs to the one preconditioner .* it is {own}, but a group says 7"
    with pytest.raises(ValueError, match=message):
        build(name, [{"params": params[:2]}, {"params": params[2:], "num_grads": 7}])


def test_settings_that_go_wrong_later_are_refused(name):
    problem, params, optimizer = trained(name)
    set_gradients(params, problem.gradients(params, 5))
    for key, value, message in (("lr", float("nan"), "lr must be"), ("num_grads", 9, "num_grads belongs to")):
        good = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        before = snapshot(params, optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_same(before[0], snapshot(params, optimizer)[0])
        optimizer.param_groups[0][key] = good
    before = flat(params)
    optimizer.step()
    assert not torch.equal(before, flat(params))


def test_groups_that_are_not_preconditioned_are_stepped_as_adamw(name):
    problem = Regression(seed=14)
    params, reference = problem.parameters(), problem.parameters()
    optimizer = build(name, [{"params": params[:1], "preconditioned": False, "lr": 1e-3, "weight_decay": 0.1},
                             {"params": params[1:]}], **exact(name))  # fmt: skip
    adamw = torch.optim.AdamW(reference[:1], lr=1e-3, weight_decay=0.1)
    alone = build(name, reference[1:], **exact(name))
    for step in range(12):
        gradients = problem.gradients(params, step)
        for targets in (params, reference):
            set_gradients(targets, gradients)
        optimizer.step()
        adamw.step()
        alone.step()
    assert torch.equal(params[0], reference[0])
    assert (params[0] - problem.start[0]).abs().max() > 5e-3
    assert torch.equal(flat(params[1:]), flat(reference[1:]))
    assert "values" not in optimizer.state[params[0]]


def test_the_kind_of_a_group_cannot_change(name):
    problem = Regression(seed=15)
    params = problem.parameters()
    optimizer = build(name, [{"params": params[:2]}, {"params": params[2:]}])
    train(params, optimizer, problem, 1)
    optimizer.param_groups[1]["preconditioned"] = False
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match="preconditioned of a group was changed after the first step, and parameter 0"):
        optimizer.step()
    assert_same(before, snapshot(params, optimizer))


def test_frozen_parameters_may_have_any_dtype(name):
    params = Regression().parameters()
    frozen = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    optimizer = build(name, [frozen, *params])
    set_gradients(params, [torch.ones_like(param) for param in params])
    optimizer.step()
    assert frozen not in optimizer.state
