"""`optim_args` as text, names that are nearly right, and kinds of values."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from factory_cases import SETTINGS
from tiny import tiny_bert
from torch import nn

from hf_efcp import (
    EFCP,
    OPTIMIZERS,
    EFCPTrainingArguments,
    SparseMFAC,
    create_optimizer,
    estimate_memory,
    largest_window,
)
from hf_efcp.factory import _settings, default_lr, parse_optim_args


def test_optim_args_are_typed():
    text = "num_grads=64, density=0.5,damp=1e-6,block_size=256,value_dtype=float32,momentum=0.9,backend=reference,"
    parsed = parse_optim_args("sparse-mfac", text + "exclude=emb|norm,exclude_lr=3e-5")
    assert parsed == {
        "num_grads": 64,
        "density": 0.5,
        "damp": 1e-6,
        "block_size": 256,
        "value_dtype": torch.float32,
        "momentum": 0.9,
        "backend": "reference",
        "exclude": "emb|norm",
        "exclude_lr": 3e-5,
    }
    optimizer = create_optimizer("sparse_mfac", tiny_bert(), **(parsed | {"exclude": "emb|Norm"}))
    assert optimizer.param_groups[0]["num_grads"] == 64


@pytest.mark.parametrize("text", [None, "", " ", ","])
def test_no_optim_args(text):
    assert parse_optim_args("sparse_mfac", text) == {}


def test_a_trailing_comma_is_fine():
    assert parse_optim_args("sparse_mfac", "num_grads=8,") == {"num_grads": 8}


@pytest.mark.parametrize("text", ["bfloat16", "torch.bfloat16"])
def test_both_spellings_of_a_dtype(text):
    assert parse_optim_args("sparse_mfac", f"value_dtype={text}") == {"value_dtype": torch.bfloat16}


@pytest.mark.parametrize("pattern", [r"layer\.[0,1]\.", r"a{1,2}", r"(a,b)", r"\(a", r"[\],]x", r"^a=b$"])
def test_a_pattern_may_hold_commas_inside_brackets(pattern):
    assert parse_optim_args("sparse_mfac", f"exclude={pattern},momentum=0.5") == {"exclude": pattern, "momentum": 0.5}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_argument_of_every_optimizer_can_be_given_as_text(name):
    examples = {bool: "true", int: "3", float: "0.5", torch.dtype: "float16", str: "8B/param"}
    text, types = [], {}
    for key, annotation in _settings(name).items():
        kinds = get_args(annotation) or (annotation,)
        # Of a budget, which may also be an int of bytes, the text stays.
        kind = str if str in kinds else next(kind for kind in examples if kind in kinds)
        text.append(f"{key}={examples[kind]}")
        types[key] = kind
    parsed = parse_optim_args(name, ",".join(text))
    assert {key: type(value) for key, value in parsed.items()} == types
    of_windows = {"momentum", "backend"} if issubclass(OPTIMIZERS[name], EFCP) else set()
    assert {"nonfinite", *of_windows} <= set(types)  # of the options that all take


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_grad=3", "unknown key 'num_grad'"),
        ("num_grads=3,num_grads=4", "num_grads is given twice"),
        ("num_grads", "expected key=value, got 'num_grads'"),
        ("exclude=a,b", r"expected key=value, got 'b' \(join regular expressions with \|\)"),
        ("num_grads=1e3", "num_grads must be an integer, got '1e3'"),
        ("density=a lot", "density must be a number, got 'a lot'"),
        ("density=", "density must be a number, got ''"),
        ("exclude=", "exclude must be a regular expression, got ''"),
        ("value_dtype=bf16", "value_dtype must be a torch dtype such as bfloat16, got 'bf16'"),
        ("value_dtype=nn", "value_dtype must be a torch dtype such as bfloat16, got 'nn'"),
        ("exclude=*a", r"exclude must be a regular expression, got '\*a'"),
        ("lr=1e-3", "lr does not belong here, use learning_rate of the training arguments"),
        ("weight_decay=0.1", "weight_decay does not belong here, use weight_decay of the training arguments"),
        ("params=x", "params does not belong here"),
    ],
)
def test_a_mistake_in_optim_args_names_the_valid_keys(text, message):
    valid = re.escape(f"valid keys of optim_args for sparse_mfac: {SETTINGS}") + ".*, exclude, exclude_lr"
    with pytest.raises(ValueError, match=f"{message}.*{valid}"):
        parse_optim_args("sparse_mfac", text)


def test_optim_args_of_the_wrong_kind():
    with pytest.raises(ValueError, match=re.escape("unbalanced brackets in 'exclude=(a,momentum=0.5'")):
        parse_optim_args("sparse_mfac", "num_grads=3,exclude=(a,momentum=0.5")
    with pytest.raises(TypeError, match=r"must be a string such as .*, got \{'num_grads': 3\}"):
        parse_optim_args("sparse_mfac", {"num_grads": 3})
    with pytest.raises(ValueError, match="unknown optimizer 'adamw_torch'"):
        parse_optim_args("adamw_torch", "num_grads=3")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SPARSE_MFAC", "sparse_mfac"),
        ("SparseMFAC", "sparse_mfac"),
        ("lowrank-mfca", "lowrank_mfac"),
        ("micro_adam", "microadam"),
    ],
)
def test_a_name_that_is_nearly_right_is_told(name, meant):
    message = rf"^unknown optimizer '{name}'; expected one of: sparse_mfac, .*, microadam.*; did you mean {meant}\?$"
    model = nn.Linear(2, 2)
    for call in (
        lambda: create_optimizer(name, model),
        lambda: default_lr(name),
        lambda: parse_optim_args(name, ""),
        lambda: estimate_memory(model, name),
        lambda: largest_window(model, name, memory_budget="8B/param"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=rf"unknown optimizer '{name}'; .*adamw_torch.*; did you mean {meant}\?$"):
        EFCPTrainingArguments(optim=name, use_cpu=True)
    with pytest.raises(ValueError, match=r"expected one of: .*, microadam[^;]*$"):
        create_optimizer("xyz", model)


def test_swapped_arguments_are_told():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"named by a string, one of sparse_mfac.*; got Linear\. .* name comes first"):
        create_optimizer(model, "sparse_mfac")
    with pytest.raises(TypeError, match="named by a string, .*; got SparseMFAC"):
        create_optimizer(SparseMFAC, model)
    with pytest.raises(TypeError, match="the model or its parameters come first, .* got 'sparse_mfac'"):
        estimate_memory("sparse_mfac", model)
    with pytest.raises(TypeError, match="named by a string, .*; got AdamW"):
        estimate_memory(model, torch.optim.AdamW)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_is_estimated_by_name_and_by_class(name):
    model, more = nn.Linear(70, 30), {"num_grads": 3} if "num_grads" in _settings(name) else {}
    expected = estimate_memory(model, OPTIMIZERS[name], **more)
    for spelling in (name, name.replace("_", "-")):
        assert estimate_memory(model, spelling, **more) == expected
        assert create_optimizer(spelling, model, **more).planned_memory() == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_text_is_refused_where_a_number_or_a_dtype_is_expected(name):
    """Whatever the argument: they are read off the signatures."""
    examples = {bool: "False", int: "3", float: "1e-5", torch.dtype: "bfloat16"}
    words = {bool: "True or False", int: "an int", float: "a number", torch.dtype: "a torch.dtype such as torch.bf"}
    found = {**_settings(name), "lr": float, "weight_decay": float}
    model, checked = nn.Linear(4, 4), set()
    for key, annotation in found.items():
        kinds = get_args(annotation) or (annotation,)
        kind = next((kind for kind in examples if kind in kinds), None)
        if kind is None or str in kinds or (name.startswith("dense") and key == "error_dtype"):
            continue
        needs = {"ridge": {"eps": 1.0, "metric": "none"}}.get(key, {})
        for make in (
            lambda more: create_optimizer(name, model, **more),
            lambda more: OPTIMIZERS[name](model.parameters(), **more),
        ):
            with pytest.raises(TypeError, match=f"^{key} must be {words[kind]}.*, got '{examples[kind]}'"):
                make({**needs, key: examples[kind]})
            if kind is not bool:
                with pytest.raises(TypeError, match=f"^{key} must be .*, got \\[\\]"):
                    make({**needs, key: []})
        checked.add(key)
    of_windows = {"momentum", "decoupled_weight_decay", "metric_beta2", "momentum_dtype"}
    assert {"lr", *(of_windows if issubclass(OPTIMIZERS[name], EFCP) else ("scale", "beta2"))} <= checked


def test_text_is_refused_in_groups_and_parts():
    param = nn.Parameter(torch.zeros(4))
    for group in ({"lr": "1e-3"}, {"weight_decay": "0.1"}, {"momentum": "0.5"}, {"preconditioned": "no"}):
        (key,) = group
        with pytest.raises(TypeError, match=f"^{key} must be "):
            SparseMFAC([{"params": [param], **group}])
    with pytest.raises(TypeError, match="^exclude_lr must be a number, got '1e-3': text is read in optim_args only"):
        create_optimizer("sparse_mfac", nn.Linear(2, 2), exclude="bias", exclude_lr="1e-3")
    optimizer = SparseMFAC([param], damp=1e-3)
    optimizer.param_groups[0]["damp"] = "1e-3"
    param.grad = torch.ones(4)
    with pytest.raises(TypeError, match="^damp must be a number"):
        optimizer.step()


def test_errors_name_the_parameters_and_others_can_be_added():
    model = tiny_bert()
    optimizer = create_optimizer("sparse_mfac", model, exclude="word_embeddings")
    groups = optimizer.param_groups
    names = {n: p for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)}
    assert names == dict(model.named_parameters())
    late = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer.add_param_group({"params": iter(late)})
    optimizer.add_param_group({"params": [("a name", nn.Parameter(torch.zeros(2)))]})
    for p in names.values():
        p.grad = torch.zeros_like(p)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        names[name].grad[0, 0] = float("nan")
        with pytest.raises(ValueError, match=f"^the gradient of {name} has 1 entries"):
            optimizer.step()
        names[name].grad = None
    late[1].grad = torch.full((2,), float("nan"))
    with pytest.raises(ValueError, match=r"^the gradient of parameter 1 of group 3 has 2 entries"):
        optimizer.step()
    optimizer.param_groups[4]["params"][0].grad = torch.full((2,), float("inf"))
    late[1].grad = None
    with pytest.raises(ValueError, match="^the gradient of a name has 2 entries"):
        optimizer.step()
