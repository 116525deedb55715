"""A memory budget by name, through arguments and Trainer; the plan as a table."""

from __future__ import annotations

import copy
import json
import logging
import time

import pytest
import torch
from tiny import tiny_bert
from torch import nn
from transformers import HfArgumentParser

from hf_efcp import (
    EFCPTrainer,
    EFCPTrainingArguments,
    LowRankMFAC,
    SparseMFAC,
    create_optimizer,
    estimate_memory,
    largest_window,
)
from hf_efcp.factory import parse_optim_args


def test_by_name_and_in_optim_args(caplog):
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 2))
    options = parse_optim_args("sparse_mfac", "memory_budget=20 B/param,density=0.05,exclude=^1")
    assert options == {"memory_budget": "20 B/param", "density": 0.05, "exclude": "^1"}
    with caplog.at_level(logging.INFO, "hf_efcp"):
        optimizer = create_optimizer("sparse_mfac", model, weight_decay=0.1, **options)
    window, total = optimizer.param_groups[0]["num_grads"], optimizer.planned_memory()["total"]
    assert len(optimizer.param_groups) == 4
    assert total <= 20 * 2152 < total + total // window + 8 * (2 * window + 1)
    assert (
        caplog.messages[-1]
        == f"sparse_mfac: memory_budget=20 B/param has room for num_grads={window}: {total:,} bytes of state"
    )
    for text in ("8b/param", "", "0"):
        with pytest.raises(ValueError, match='optim_args: memory_budget must be "8B/param" .*valid keys of optim_args'):
            parse_optim_args("sparse_mfac", f"memory_budget={text}")


@pytest.mark.parametrize("value", ["1B/param", "8B/param", "2GiB", "300000000"])
def test_training_arguments_keep_the_text(value):
    text = f"memory_budget={value},density=0.5"
    flags = ["--output_dir", "out", "--use_cpu", "--optim", "sparse_mfac", "--optim_args", text]
    (args,) = HfArgumentParser(EFCPTrainingArguments).parse_args_into_dataclasses(flags)
    assert args.optim_args == EFCPTrainingArguments(**json.loads(args.to_json_string())).optim_args == text
    # What fits depends on the model, what is a budget does not.
    with pytest.raises(ValueError, match="num_grads=256 and memory_budget=.* both choose the window: give one"):
        EFCPTrainingArguments("out", use_cpu=True, optim="sparse_mfac", optim_args=f"num_grads=256,{text}")
    with pytest.raises(ValueError, match="optim_args: memory_budget must be"):
        EFCPTrainingArguments("out", use_cpu=True, optim="sparse_mfac", optim_args="memory_budget=8b")


def test_trainer_takes_the_same_window(tmp_path):
    args = EFCPTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        optim="sparse_mfac",
        optim_args="memory_budget=200kB,density=0.1,exclude=embeddings",
    )
    optimizer = EFCPTrainer(model=tiny_bert(), args=args).create_optimizer()
    twin = create_optimizer("sparse_mfac", tiny_bert(), memory_budget="200kB", density=0.1, exclude="embeddings")
    assert optimizer.param_groups[0]["num_grads"] == twin.param_groups[0]["num_grads"] > 1
    assert optimizer.planned_memory()["total"] <= 200_000


def test_the_plan_prints_as_a_table():
    params = [nn.Parameter(torch.zeros(1000, 1000))]
    settings = {"memory_budget": "8B/param", "metric_dtype": torch.float32, "precondition": "momentum"}
    plan = estimate_memory(params, SparseMFAC, **settings)
    assert plan.num_grads == largest_window(params, SparseMFAC, **settings) == 23
    assert type(plan["total"]) is int
    del settings["memory_budget"]
    assert plan == SparseMFAC(params, num_grads=23, **settings).planned_memory()
    # 244 blocks keep 41 entries each, the tail of 576 keeps 6: 40,040 bytes a row.
    table = """\
SparseMFAC: num_grads=23, 1,000,000 trainable parameters
                                     bytes  B/param
indices                            460,460     0.46
values                             460,460     0.46
error                            1,062,500     1.06
momentum                         2,000,000     2.00
metric                           4,000,000     4.00
gram                                 4,232     0.00
total, as in checkpoints         7,987,652     7.99
AdamW, for comparison            8,000,004     8.00"""
    assert str(plan) == table
    assert "B/param" in str(copy.deepcopy(plan))
    assert json.loads(json.dumps(plan)) == plan


def test_the_recommended_optimizer_is_the_default():
    params = [nn.Parameter(torch.zeros(768, 3072)), nn.Parameter(torch.zeros(768))]
    plan = estimate_memory(params)
    assert plan == estimate_memory(params, LowRankMFAC) == LowRankMFAC(params).planned_memory()
    assert (plan.title, plan.num_grads) == ("LowRankMFAC", 16)
    assert largest_window(params, memory_budget=plan["total"]) == 16
    assert largest_window(params, memory_budget=plan["total"] - 1) == 15


@pytest.mark.parametrize(
    ("cls", "settings", "least"), [(LowRankMFAC, {}, 50), (SparseMFAC, {}, 20), (SparseMFAC, {"metric": "none"}, 90)]
)
def test_a_bert_takes_no_time(cls, settings, least):
    shapes = [(768, 768), (768,)] * 48 + [(3072, 768), (3072,), (768, 3072), (768,)] * 12 + [(768,)] * 50
    shapes += [(30522, 768), (512, 768)]
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    start = time.perf_counter()
    window = largest_window(params, cls, memory_budget="8B/param", **settings)
    assert time.perf_counter() - start < 1.0
    assert window > least
    most = 8 * sum(param.numel() for param in params)
    totals = [estimate_memory(params, cls, num_grads=m, **settings)["total"] for m in (window, window + 1)]
    assert totals[0] <= most < totals[1]
