"""Optimizers by name: groups, exclusions, arguments and the log."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from factory_cases import SETTINGS
from tiny import tiny_bert
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_efcp import (
    SparseMFAC,
    create_optimizer,
)
from hf_efcp.factory import default_lr


def names_of(model: nn.Module, group: dict) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        optimizer.step()


def test_the_groups_are_those_of_trainer(tmp_path):
    model = tiny_bert()
    args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True)
    stock = Trainer(model=model, args=args).create_optimizer()
    ours = create_optimizer("sparse_mfac", model, weight_decay=0.1)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.1, 0.0]
    assert [names_of(model, g) for g in ours.param_groups] == [names_of(model, g) for g in stock.param_groups]
    assert "bert.embeddings.LayerNorm.weight" in names_of(model, ours.param_groups[1])


def test_arguments_reach_the_optimizer():
    optimizer = create_optimizer("sparse-mfac", tiny_bert(), lr=0.25, num_grads=7, density=0.5, damp=0.125)
    assert type(optimizer) is SparseMFAC
    assert all(
        (g["lr"], g["num_grads"], g["density"], g["damp"]) == (0.25, 7, 0.5, 0.125) for g in optimizer.param_groups
    )


def test_without_lr_the_optimizer_takes_its_own():
    for name, expected in (("sparse_mfac", 1e-4), ("sparse-adagrad", 1e-2)):
        assert default_lr(name) == expected
        assert {g["lr"] for g in create_optimizer(name, tiny_bert()).param_groups} == {expected}


def test_any_module_is_stepped_and_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model[0].weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = create_optimizer("sparse_mfac", model, weight_decay=0.1, num_grads=4, density=0.5)
    assert [names_of(model, g) for g in optimizer.param_groups] == [
        ["2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]
    step(model, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"0.weight"}


@pytest.mark.parametrize("exclude", ["embeddings", ["word_embeddings", r"embeddings\.(position|token|LayerNorm)"]])
def test_excluded_parameters_have_groups_and_a_learning_rate_of_their_own(exclude):
    model = tiny_bert()
    optimizer = create_optimizer("sparse_mfac", model, lr=1e-3, weight_decay=0.1, exclude=exclude, exclude_lr=1e-4)
    found = [(g["preconditioned"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(True, 1e-3, 0.1), (True, 1e-3, 0.0), (False, 1e-4, 0.1), (False, 1e-4, 0.0)]
    outside = [name for g in optimizer.param_groups[2:] for name in names_of(model, g)]
    assert outside == [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.bias",
    ]
    inside = [name for g in optimizer.param_groups[:2] for name in names_of(model, g)]
    assert sorted(inside + outside) == sorted(name for name, _ in model.named_parameters())


def test_excluded_parameters_are_stepped_as_adamw_and_the_others_are_not():
    def updates(make) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, make(model), steps=5)
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    settings = {"lr": 1e-2, "weight_decay": 0.1, "num_grads": 4, "density": 0.5, "scope": "model"}
    ours = updates(lambda m: create_optimizer("sparse_mfac", m, exclude="^1", exclude_lr=1e-3, **settings))
    alone = updates(lambda m: create_optimizer("sparse_mfac", m[0], **settings))

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        decay = {"params": [p for name, p in model.named_parameters() if "bias" not in name], "weight_decay": 0.1}
        rest = {"params": [p for name, p in model.named_parameters() if "bias" in name], "weight_decay": 0.0}
        return torch.optim.AdamW([decay, rest], lr=1e-3)

    twin = updates(adamw)
    for name in ("1.weight", "1.bias"):
        assert twin[name].norm() > 1e-3
        torch.testing.assert_close(ours[name], twin[name], rtol=1e-4, atol=1e-7)
    assert (ours["0.weight"] - twin["0.weight"]).norm() > 0.5 * twin["0.weight"].norm()
    # What is excluded has no part in the preconditioner of the rest.
    assert torch.equal(ours["0.weight"], alone["0.weight"])


def test_the_log_says_what_is_preconditioned_and_at_which_rate(caplog):
    with caplog.at_level(logging.INFO, "hf_efcp"):
        create_optimizer("sparse_mfac", nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 2)), exclude="^1")
    assert caplog.messages == [
        "sparse_mfac: 2,050 parameters preconditioned at lr 0.0001",
        "sparse_mfac: 102 parameters in 2 tensors excluded, stepped as AdamW at lr 5e-05",
    ]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"name": "sparse_mfca"}, ValueError, "unknown optimizer 'sparse_mfca'; expected one of: sparse_mfac"),
        ({"densty": 0.1}, TypeError, f"sparse_mfac has no argument 'densty'; valid ones: {SETTINGS}"),
        ({"params": []}, TypeError, "no argument 'params'"),
        ({"model": [nn.Parameter(torch.zeros(1))]}, TypeError, "must be a torch.nn.Module, got list"),
        ({"model": nn.ReLU()}, ValueError, "ReLU has no parameter with requires_grad"),
        (
            {"exclude": "embed"},
            ValueError,
            "'embed' matches no trainable parameter; they are named 0.weight, 0.bias, 1",
        ),
        ({"exclude": ["^0", "^7"]}, ValueError, re.escape("'^7' matches no trainable parameter")),
        ({"exclude": "(0"}, ValueError, re.escape("'(0' is not a regular expression")),
        ({"exclude": ["^0", "^1"]}, ValueError, "matches every trainable parameter"),
        ({"exclude": "^0", "exclude_lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        (
            {"exclude_lr": 5e-5},
            ValueError,
            "exclude_lr=5e-05 is .* exclude names none: give exclude, .* or leave exclude_lr",
        ),
        ({"density": 2.0}, ValueError, "density"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
    ],
)
def test_what_is_wrong_is_said(kwargs, error, message):
    with pytest.raises(error, match=message):
        create_optimizer(**{"name": "sparse_mfac", "model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **kwargs})


def test_a_pattern_that_finds_only_frozen_parameters_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"matches no trainable parameter; they are named 1\.weight, 1\.bias$"):
        create_optimizer("sparse_mfac", model, exclude="^0")
