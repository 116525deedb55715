"""Settings of the projected optimizers: refused where they are wrong, read from text, and by name."""

import pytest
import torch
from problems import Regression, set_gradients
from relatives import build, names
from torch import nn

from hf_efcp import GaLore, create_optimizer
from hf_efcp.factory import OPTIMIZERS, default_lr, parse_optim_args


@pytest.mark.parametrize("name", names())
def test_bad_settings_are_refused(name):
    params = Regression().parameters()
    capacity = "max_rank" if name == "adarankgrad" else "rank"
    gap = "max_gap" if name == "adarankgrad" else "update_gap"
    for changes, error, message in [
        ({"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": torch.tensor(0.1, device="meta")}, ValueError, "lr is a tensor on meta, and every step would wait to"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"scale": -1.0}, ValueError, "scale must be"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, ValueError, "eps must be a finite number above 0"),
        ({capacity: 0}, ValueError, f"{capacity} must be a finite number above 0, got 0"),
        ({gap: 0}, ValueError, f"{gap} must be a finite number above 0, got 0"),
        ({capacity: 2.5}, TypeError, f"{capacity} must be an int, got 2.5"),
        ({"beta2": "0.9"}, TypeError, "beta2 must be a number, got '0.9': text is read in optim_args only"),
        ({"proj_type": "full"}, ValueError, "proj_type must be one of 'std', 'reverse_std', 'left', 'right'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of 'raise', 'skip'"),
    ]:
        with pytest.raises(error, match=message):
            build(name, params, **changes)
    with pytest.raises(ValueError, match="scale is one value for all parameter groups: it is 1.0, but a group says 7"):
        build(name, [{"params": params[:2]}, {"params": params[2:], "scale": 7.0}])
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match=rf"must be one of .*parameter 1 of group 0 .* is {dtype}"):
            build(name, [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=dtype))])
    optimizer = build(name, params)
    set_gradients(params, [torch.ones_like(param) for param in params])
    optimizer.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match="eps must be"):
        optimizer.step()
    assert not optimizer.state


def test_further_settings_are_refused():
    params = Regression().parameters()
    for name, changes, message in [
        ("adarankgrad", {"min_rank": 4}, "min_rank must be at most max_rank, got min_rank=4, max_rank=3"),
        ("adarankgrad", {"residual": 1.0}, r"residual must be in \[0, 1\)"),
        ("adarankgrad", {"threshold": -0.1}, r"threshold must be in \[0, 1\)"),
        ("lorenza", {"mu": 0.0}, "mu must be"),
        ("lorenza", {"rho": -1.0}, "rho must be"),
        ("lorenza", {"probes": 0}, "probes must be"),
        ("natural_galore", {"damp": 0.0}, "damp must be"),
        ("natural_galore", {"history": -1}, "history must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(name, params, **changes)


def test_sharded_parameters_are_refused(sharded):
    optimizer = GaLore([sharded], rank=1)
    sharded.grad = torch.zeros_like(sharded)
    with pytest.raises(ValueError, match="GaLore projects whole matrices, but parameter 0 of group 0 .* is sharded"):
        optimizer.step()
    assert not optimizer.state


def test_factory_and_optim_args_know_them():
    model = nn.Sequential(nn.Linear(20, 16), nn.LayerNorm(16), nn.Linear(16, 12))
    for name in ("galore", "adarankgrad", "lorenza", "natural_galore"):
        capacity = "max_rank" if name == "adarankgrad" else "rank"
        options = parse_optim_args(name, f"{capacity}=4,scale=4,beta2=0.99,proj_type=left,exclude=^2")
        assert options == {capacity: 4, "scale": 4.0, "beta2": 0.99, "proj_type": "left", "exclude": "^2"}
        optimizer = create_optimizer(name.replace("_", "-"), model, weight_decay=0.1, **options)
        assert type(optimizer) is OPTIMIZERS[name]
        found = [(g["preconditioned"], g["weight_decay"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
        lr = default_lr(name)
        assert found == [(True, 0.1, lr, 1), (True, 0.0, lr, 3), (False, 0.1, 5e-5, 1), (False, 0.0, 5e-5, 1)]
