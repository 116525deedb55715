"""`EFCPTrainingArguments`: names, rates, `optim_args`, copies and the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_efcp import EFCPTrainingArguments

OPTIONS = "num_grads=64,density=0.5,value_dtype=float32,exclude=embeddings,exclude_lr=1e-4"


def sparse(**kwargs) -> EFCPTrainingArguments:
    given = {"optim": "sparse_mfac", "optim_args": OPTIONS, "weight_decay": 0.1, "use_cpu": True}
    return EFCPTrainingArguments(**{"output_dir": "out", **given, **kwargs})


def as_tuple(args: EFCPTrainingArguments) -> tuple:
    assert type(args) is EFCPTrainingArguments
    return args.optim, args.learning_rate, args.optim_args, args.weight_decay


@pytest.mark.parametrize("name", ["sparse_mfac", "sparse-mfac"])
def test_our_names(name):
    args = sparse(optim=name)
    assert as_tuple(args) == ("sparse_mfac", 1e-4, OPTIONS, 0.1)
    assert type(args.optim) is str


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_stock_name_by_constructor_and_by_parser(name):
    flags = ["--output_dir", "out", "--use_cpu", "--optim", name]
    (parsed,) = HfArgumentParser(EFCPTrainingArguments).parse_args_into_dataclasses(flags)
    assert parsed.optim is OptimizerNames(name)
    built = EFCPTrainingArguments(output_dir="out", optim=OptimizerNames(name), use_cpu=True)
    assert built.optim is OptimizerNames(name)
    assert parsed.learning_rate == built.learning_rate == 5e-5


def test_the_defaults_are_the_parents():
    ours = EFCPTrainingArguments(output_dir="out", use_cpu=True).to_dict()
    assert ours.pop("efcp_diagnostics_steps") == 0
    assert ours == TrainingArguments(output_dir="out", use_cpu=True).to_dict()


def test_an_unknown_name_is_an_error_that_lists_ours_and_the_stock_ones():
    with pytest.raises(ValueError, match=r"'mfac'; expected one of: sparse_mfac, .*adamw_torch, .*sgd"):
        sparse(optim="mfac")
    with pytest.raises(ValueError, match="unknown optimizer 'mfac'"):
        sparse().set_optimizer("mfac")


@pytest.mark.parametrize(("optim", "expected"), [("sparse_mfac", 1e-4), ("sparse_adagrad", 1e-2), ("sgd", 5e-5)])
def test_a_learning_rate_not_given_is_the_optimizers_and_the_log_says_so(optim, expected, caplog):
    with caplog.at_level(logging.INFO, "hf_efcp"):
        args = EFCPTrainingArguments(output_dir="out", optim=optim, use_cpu=True)
    assert args.learning_rate == expected
    assert f"learning_rate is not given: taking {expected:g}, the default of {args.optim}" in caplog.messages


@pytest.mark.parametrize("given", [5e-5, 5e-4, 0.125, 0.0])
@pytest.mark.parametrize("optim", ["sparse_mfac", "sgd"])
def test_a_learning_rate_that_is_given_stays(optim, given, caplog):
    with caplog.at_level(logging.INFO, "hf_efcp"):
        args = EFCPTrainingArguments(output_dir="out", optim=optim, learning_rate=given, use_cpu=True)
    assert args.learning_rate == given
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("num_grad=3", "unknown key 'num_grad'.*valid keys"),
        ("num_grads=many", "num_grads must be an integer"),
        ("density=2", "density"),
        ("num_grads=0", "num_grads"),
        ("damp=-1", "damp"),
        ("damp=1,relative_damp=1", "damp=1.0 and relative_damp=1.0 all choose the dampening"),
        ("metric=rms", "metric must be one of 'none', 'adam', 'factored', got 'rms'"),
        ("backend=fast", "backend"),
        ("exclude=bias,exclude_lr=-1", "lr must be a finite number"),
        ("exclude_lr=1e-3", "optim_args: exclude_lr=0.001 is the learning rate of excluded parameters"),
        ("value_dtype=int64", "int64"),
    ],
)
def test_a_mistake_in_optim_args_is_found_at_construction(optim_args, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sparse(optim_args=optim_args)
    with pytest.raises((ValueError, TypeError), match=message):
        EFCPTrainingArguments(output_dir="out", use_cpu=True).set_optimizer("sparse_mfac", args=optim_args)


def test_a_bad_learning_rate_is_found_at_construction():
    with pytest.raises(ValueError, match=r"lr must be a finite number of at least 0, got -1.0"):
        sparse(learning_rate=-1.0)


def test_stock_optim_args_are_left_alone():
    assert (
        EFCPTrainingArguments(output_dir="out", optim="ademamix", optim_args="alpha=3", use_cpu=True).optim_args
        == "alpha=3"
    )


def test_adam_settings_that_have_no_effect_are_warned_about(caplog):
    sparse(adam_beta2=0.98)
    assert caplog.messages == ["adam_beta2=0.98 has no effect on the optimizer sparse_mfac"]


COPIES = {
    "to_dict": lambda args: EFCPTrainingArguments(**args.to_dict()),
    "json": lambda args: EFCPTrainingArguments(**json.loads(args.to_json_string())),
    "replace": dataclasses.replace,
    "pickle": lambda args: pickle.loads(pickle.dumps(args)),
    "parse_dict": lambda args: HfArgumentParser(EFCPTrainingArguments).parse_dict(args.to_dict())[0],
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("optim", ["sparse_mfac", "sgd"])
def test_copies_are_equal(copy, optim):
    args = sparse(optim=optim, learning_rate=0.125, optim_args=OPTIONS if optim == "sparse_mfac" else None)
    again = copy(args)
    assert as_tuple(again) == as_tuple(args)
    assert again.to_dict() == args.to_dict()


def test_to_dict_holds_plain_values():
    found = sparse().to_dict()
    assert (found["optim"], found["learning_rate"], found["optim_args"]) == ("sparse_mfac", 1e-4, OPTIONS)
    assert type(found["optim"]) is str
    assert json.loads(sparse().to_json_string())["optim"] == "sparse_mfac"


def test_torch_save_and_load_as_trainer_does():
    buffer = io.BytesIO()
    torch.save(sparse(), buffer)
    buffer.seek(0)
    assert as_tuple(torch.load(buffer, weights_only=False)) == as_tuple(sparse())


def test_replace_can_ask_for_the_new_optimizers_rate():
    args = EFCPTrainingArguments(output_dir="out", use_cpu=True)
    assert dataclasses.replace(args, optim="sparse_mfac").learning_rate == 5e-5
    assert dataclasses.replace(args, optim="sparse_mfac", learning_rate=None).learning_rate == 1e-4


def test_command_line():
    flags = [
        "--output_dir",
        "out",
        "--use_cpu",
        "--optim",
        "sparse-mfac",
        "--optim_args",
        OPTIONS,
        "--weight_decay",
        "0.1",
    ]
    parser = HfArgumentParser(EFCPTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(flags)
    assert as_tuple(args) == ("sparse_mfac", 1e-4, OPTIONS, 0.1)
    (args,) = parser.parse_args_into_dataclasses([*flags, "--learning_rate", "2e-5"])
    assert as_tuple(args) == ("sparse_mfac", 2e-5, OPTIONS, 0.1)
    assert "sparse_mfac" in parser.format_help()


def test_json_file(tmp_path):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"output_dir": "out", "use_cpu": True, "optim": "sparse_mfac", "learning_rate": 2e-5}))
    (args,) = HfArgumentParser(EFCPTrainingArguments).parse_json_file(str(file))
    assert as_tuple(args) == ("sparse_mfac", 2e-5, None, 0.0)


def test_set_optimizer():
    args = EFCPTrainingArguments(output_dir="out", use_cpu=True)
    assert args.set_optimizer("sparse-mfac", weight_decay=0.1, args="num_grads=3") is args
    assert as_tuple(args) == ("sparse_mfac", 1e-4, "num_grads=3", 0.1)
    assert as_tuple(args.set_optimizer("sparse_mfac", 0.25, 0.2)) == ("sparse_mfac", 0.25, None, 0.2)
    args.set_optimizer("adamw_torch", beta1=0.8)
    assert (args.optim, args.learning_rate, args.adam_beta1) == (OptimizerNames.ADAMW_TORCH, 5e-5, 0.8)
    assert as_tuple(EFCPTrainingArguments(**args.to_dict())) == as_tuple(args)


def test_set_training_does_not_bring_adams_rate():
    args = sparse().set_training(batch_size=16)
    assert (args.learning_rate, args.per_device_train_batch_size) == (1e-4, 16)
    assert sparse().set_training(0.25).learning_rate == 0.25
    assert EFCPTrainingArguments(output_dir="out", use_cpu=True).set_training().learning_rate == 5e-5
