"""Every YAML under recipes/configs binds to its script, and every GLUE task's trains and predicts with a tiny model."""

import contextlib
import importlib
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import WORDS, save_tiny_bert
from transformers import Trainer

from hf_efcp import EFCPTrainingArguments, create_optimizer
from hf_efcp.factory import efcp_name, parse_optim_args
from hf_efcp.glue import TASKS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "configs"
CONFIGS = sorted(path for pattern in ("*.yaml", "*.yml") for path in FOLDER.rglob(pattern))
GLUE = [name for name in TASKS if name != "rotten_tomatoes"]


def name_of(path):
    return str(path.relative_to(FOLDER))


def written(path):
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# Binding


def flat(script, *types):
    """How to read the YAML and flags of a script that trains once: what its dataclasses have for fields."""

    def bind(path, *flags):
        module = importlib.import_module(script)
        classes = (*(getattr(module, name) for name in types), EFCPTrainingArguments)
        instances = importlib.import_module("cli").parse_arguments(classes, [str(path), *flags], module.DEFAULTS)
        return [args for args in instances if isinstance(args, EFCPTrainingArguments)]

    return bind


def comparison(path, *flags):
    plan = importlib.import_module("plan").read_plan([str(path), *flags])
    assert len(plan.contenders) + len(plan.skipped) == len(written(path)["optimizers"])
    return [contender.args for contender in plan.contenders]


# The scripts that take a YAML, and how to read one as they do: the training arguments of its optimizers.
SCRIPTS = {
    "run_glue": flat("run_glue", "DataArguments", "ModelArguments", "BaselineArguments"),
    "run_qa": flat("run_qa", "DataArguments", "ModelArguments", "BaselineArguments"),
    "run_image_classification": flat(
        "run_image_classification",
        *("ImageArguments", "ImageModelArguments", "StepArguments", "BaselineArguments"),
    ),
    "compare_optimizers": comparison,
}


class Toy(torch.nn.Module):
    """With the names that `exclude` is written for."""

    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(3, 4)
        self.classifier = torch.nn.Linear(4, 2)

    def forward(self, tokens):
        return self.classifier(self.embeddings(tokens))


def build(args, model):
    """The optimizer that EFCPTrainer makes of the arguments, and the options it was asked for."""
    if name := efcp_name(args.optim):
        options = parse_optim_args(name, args.optim_args)
        return create_optimizer(name, model, lr=args.learning_rate, weight_decay=args.weight_decay, **options), options
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return cls(model.parameters(), **options), {}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_binds_and_states_what_matters(path):
    text, place = path.read_text(encoding="utf-8"), re.escape(str(path.relative_to(ROOT)))
    assert text.startswith("# ")
    scripts = set(re.findall(rf"^# .*python recipes/(?:benchmarks/)?(\w+)\.py {place}\b", text, re.MULTILINE))
    assert len(scripts) == 1, "the head must say how to run it: python recipes/<script>.py <this file>"
    every = SCRIPTS[scripts.pop()](path)
    assert every
    for args in every:
        model = Toy()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer, options = build(args, model)
        assert optimizer.defaults["lr"] == args.learning_rate
        # Groups have dtypes by their names.
        named = {key: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for key, v in options.items()}
        asked = {key: value for key, value in named.items() if key in optimizer.defaults}
        assert {key: optimizer.defaults[key] for key in asked} == asked
        with getattr(optimizer, "ascent", contextlib.nullcontext)(lambda: 0.0):  # LORENZA's
            torch.nn.functional.cross_entropy(model(torch.arange(3)), torch.tensor([0, 1, 1])).backward()
        optimizer.step()
        assert not all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))

        assert args.output_dir.startswith("outputs/")
        assert args.max_grad_norm == float(written(path)["max_grad_norm"])
        assert args.warmup_steps == float(written(path)["warmup_steps"])
        assert (args.logging_nan_inf_filter, written(path)["logging_nan_inf_filter"]) == (False, "false")
        # Checkpoints hold whole windows.
        assert args.save_strategy == "no" or args.save_total_limit == 1
        if "optimizers" not in written(path):
            assert args.learning_rate == float(written(path)["learning_rate"])


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_command_of_the_head_binds(path):
    """Also those with flags of their own, which go together with what the file says."""
    head = re.sub(r"\\\n#", "", path.read_text(encoding="utf-8").split("\n\n")[0])
    commands = re.findall(r"^# .*python recipes/(?:benchmarks/)?(\w+)\.py (.*)$", head, re.MULTILINE)
    assert commands
    for script, rest in commands:
        place, *flags = shlex.split(rest)
        assert ROOT / place == path
        assert SCRIPTS[script](path, *flags)


def test_the_configs_are_found():
    names = {name_of(path) for path in CONFIGS}
    assert {"quickstart.yaml", "compare_variants.yaml", "published/efcp_bert_base.yaml"} <= names
    assert {f"{task}.yaml" for task in GLUE} <= names


# GLUE


@pytest.mark.parametrize("task", GLUE)
def test_the_configs_of_the_tasks_differ_in_what_they_must_only(task):
    config, other = written(FOLDER / f"{task}.yaml"), written(FOLDER / "cola.yaml")
    assert (config["task_name"], config["output_dir"]) == (task, f"outputs/{task}")
    equal = {"model_name_or_path", "optim", "max_seq_length", "lr_scheduler_type", "warmup_steps", "max_grad_norm"}
    equal |= {"weight_decay", "per_device_train_batch_size", "per_device_eval_batch_size", "seed"}
    assert {key: config[key] for key in equal} == {key: other[key] for key in equal}
    # The recommended optimizer as it is.
    assert (config["optim"], config["learning_rate"]) == ("lowrank_mfac", "1e-4")
    assert "optim_args" not in config


@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_published_settings_of_mfac(size):
    config = written(FOLDER / "published" / f"mfac_bert_{size}.yaml")
    assert {"num_grads=1024", "damp=1e-6", "metric=none"} == set(config["optim_args"].split(","))
    assert (config["optim"], config["learning_rate"], config["weight_decay"]) == ("dense_mfac", "1e-4", "0.0")
    assert (config["per_device_train_batch_size"], config["num_train_epochs"]) == ("32", "5")
    shape = {"tiny": "L-2_H-128_A-2", "mini": "L-4_H-256_A-4"}[size]
    assert config["model_name_or_path"] == f"google/bert_uncased_{shape}"


def test_published_settings_of_efcp():
    config = written(FOLDER / "published" / "efcp_bert_base.yaml")
    assert {"num_grads=1024", "density=0.01", "damp=5e-5", "metric=none"} == set(config["optim_args"].split(","))
    assert (config["optim"], config["learning_rate"], config["num_train_epochs"]) == ("sparse_mfac", "2e-5", "3")


@pytest.mark.parametrize(
    ("name", "damp", "decay", "epochs", "batch"),
    [("imagenet_resnet18", "1e-7", 1e-5, "88", 1024), ("cifar10_resnet20", "1e-4", 1e-4, "164", 128)],
)
def test_published_settings_for_images(name, damp, decay, epochs, batch):
    """The decay of the original is not multiplied by the learning rate, and ours is."""
    config = written(FOLDER / "published" / f"{name}.yaml")
    assert {"num_grads=1024", "density=0.01", f"damp={damp}", "metric=none"} == set(config["optim_args"].split(","))
    assert (config["optim"], config["learning_rate"], config["num_train_epochs"]) == ("sparse_mfac", "1e-3", epochs)
    assert float(config["weight_decay"]) * float(config["learning_rate"]) == pytest.approx(decay)
    accumulated = int(config.get("gradient_accumulation_steps", "1"))
    assert int(config["per_device_train_batch_size"]) * accumulated == batch


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"))


def write_data(folder, task):
    """Files for every split of a task, of random words; the test splits are labelled as on the Hub, with -1."""
    rng = random.Random(0)
    for split in ("train", *task.validation_splits, *task.test_splits):
        count = 7 if split in task.test_splits else 24
        columns = {name: [" ".join(rng.choices(WORDS, k=5)) for _ in range(count)] for name in task.text_columns}
        labels = [
            rng.uniform(*task.bounds) if task.regression else rng.randrange(task.num_labels) for _ in range(count)
        ]
        columns["label"] = [-1] * count if split in task.test_splits else labels
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("task", [TASKS[name] for name in GLUE], ids=lambda task: task.name)
def test_every_task_trains_and_predicts(task, tiny_model, tmp_path, monkeypatch, capsys):
    write_data(tmp_path, task)
    monkeypatch.setattr("plots.plot_training", lambda *args: None)  # drawn elsewhere; it is a third of the time
    flags = {
        "model_name_or_path": tiny_model,
        "num_hidden_layers": 1,
        "data_dir": tmp_path,
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "max_seq_length": 16,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "do_predict": "true",
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
        "disable_tqdm": "true",
    }
    argv = [str(FOLDER / f"{task.name}.yaml"), *(f"--{key}={value}" for key, value in flags.items())]
    importlib.import_module("run_glue").main(argv)

    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (record["task"], record["steps"], record["layers"]) == (task.name, 3, 1)
    assert {*task.metrics, "loss"} <= set(record["metrics"])
    assert ("mismatched_accuracy" in record["metrics"]) == (task.name == "mnli")
    assert {path.name for path in (tmp_path / "out" / "predictions").iterdir()} == set(task.test_files)
    for file in task.test_files:
        heading, *lines = (tmp_path / "out" / "predictions" / file).read_text().splitlines()
        assert heading == "index\tprediction"
        rows = [line.split("\t") for line in lines]
        assert [row[0] for row in rows] == [str(number) for number in range(7)]
        for _, prediction in rows:
            if task.regression:
                assert re.fullmatch(r"\d\.\d{3}", prediction)
                assert 0 <= float(prediction) <= 5
            else:
                assert prediction in (task.labels if task.submits_names else ("0", "1"))
    assert f"{' and '.join(task.test_files)}: in {tmp_path}" in capsys.readouterr().out
