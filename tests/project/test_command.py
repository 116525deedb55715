"""The command `hf-efcp`: what it runs, what it finds, and what it says; and what a wheel has for it."""

import csv
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from tiny import WORDS, save_tiny_bert

import hf_efcp
from hf_efcp import cli

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
BERT_BASE = {
    **{"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 768},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512},
}
pytestmark = pytest.mark.usefixtures("recipe", "private_cache")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder outside the checkout, and a command line that may be renamed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-efcp"])


@pytest.fixture
def bert_base(tmp_path, monkeypatch):
    for name, made in list(hf_efcp.OPTIMIZERS.items()):
        if not made.__module__.startswith("hf_efcp."):  # those of other tests
            monkeypatch.delitem(hf_efcp.OPTIMIZERS, name)
    path = tmp_path / "bert" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(BERT_BASE), encoding="utf-8")
    return path


@pytest.fixture
def started(monkeypatch, recipe):
    """The programs that were started, with their command lines, instead of running them."""
    runs = []
    for name in ("run_glue", "run_qa", "run_image_classification", "compare_optimizers"):
        monkeypatch.setattr(getattr(recipe, name), "main", lambda argv, name=name: runs.append((name, argv)))
    return runs


# Which program runs


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_found_by_name_and_starts_the_program_of_its_head(name, started):
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    program = re.search(r"^# .*python recipes/(?:benchmarks/)?(\w+)\.py", text, re.MULTILINE)[1]
    cli.main(["compare" if "optimizers:" in text else "train", name, "--max_steps", "3"])
    assert started == [(program, [name, "--max_steps", "3"])]


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["--train_file", "a.csv"], "run_glue"),
        (["--doc_stride=3"], "run_qa"),
        (["--max-train-samples", "3"], "run_qa"),
        (["--image_folder", "a"], "run_image_classification"),
        (["mine.yaml"], "run_glue"),
        (["mine.yaml", "--n_best_size", "4"], "run_qa"),
        ([], "run_glue"),
    ],
)
def test_a_file_and_flags_tell_the_program(argv, program, started, tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 1e-4\n", encoding="utf-8")
    cli.main(["train", *argv])
    assert started == [(program, argv)]
    assert sys.argv[0] == "hf-efcp train"


def test_what_tells_a_program_is_its_own_only(recipe):
    types = {
        "run_glue": [recipe.run_glue.DataArguments, recipe.run_glue.ModelArguments, recipe.run_glue.BaselineArguments],
        "run_qa": [recipe.run_qa.DataArguments],
        "run_image_classification": [
            recipe.run_image_classification.ImageArguments,
            recipe.run_image_classification.ImageModelArguments,
            recipe.run_image_classification.StepArguments,
        ],
    }
    fields = {name: {field for cls in each for field in cls.__dataclass_fields__} for name, each in types.items()}
    for program, telling in cli.TELLING.items():
        assert telling <= fields[program]
        others = [of_program for name, of_program in fields.items() if name != program]
        assert not telling & set.union(*others, set(hf_efcp.EFCPTrainingArguments.__dataclass_fields__))


def test_train_on_labels_that_are_words(tmp_path, capsys):
    model = save_tiny_bert(tmp_path / "model")
    for name in ("train", "validation"):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *((f"{word} a", word) for word in WORDS[:5])])
    flags = {"train_file": "train.csv", "validation_file": "validation.csv", "model_name_or_path": str(model)}
    flags |= {"output_dir": "out", "max_steps": "2", "max_seq_length": "16", "use_cpu": "true"}
    cli.main(["train", *(word for flag, value in flags.items() for word in (f"--{flag}", value))])
    record = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["optimizer"], record["task"]) == (2, "lowrank_mfac", "train")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["4"] == sorted(WORDS[:5])[4]
    assert "model, metrics.json" in capsys.readouterr().out


# What it says


def test_help_lists_commands_and_configs(capsys):
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"hf-efcp {command}" in text for command in ("train", "plan", "compare"))
    assert all(name in text for name in NAMES)
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hf_efcp {hf_efcp.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], r"unknown command 'trian'; did you mean train\?"),
        (["train", "quikstart"], r"quikstart is neither a file nor one of .*; did you mean quickstart\?"),
        (["compare", "compare_taks.yaml"], r"did you mean compare_tasks\?"),
        (["train", "compare_tasks"], r"compare_tasks.yaml compares optimizers: hf-efcp compare compare_tasks"),
        (["train", "--dataset_name", "a"], "dataset_name may be of questions or of pictures"),
        (["train"], "give --task_name with a task of GLUE, or --train_file"),
        (["train", "--train_file", "a.csv", "--validation_file", "a.csv"], "--train_file a.csv is not a file"),
        (["train", "quickstart", "--baseline", "adamv"], "unknown optimizer 'adamv'"),
        (["train", "quickstart", "--output_dir", "config.json/out"], "--output_dir .*/config.json is not a folder"),
        (["plan", "./nowhere"], r"the model ./nowhere is not a folder"),
        (["plan", "config.json", "--memory-budget", "8b"], "memory_budget must be"),
        (["plan", "config.json", "--optim_args", "rank=8"], "name it with --optim"),
        (["plan", "config.json", "--optim", "lowrank"], "unknown optimizer 'lowrank'"),
    ],
)
def test_what_is_wrong_is_one_sentence(argv, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BERT_BASE, "num_hidden_layers": 1}), encoding="utf-8")
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert re.match(f"error: .*{message}", raised.value.code)
    assert "\n" not in raised.value.code


def test_a_folder_that_is_not_this_users_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(SystemExit, match=f"^error: --output_dir new/out is no place .*: {tmp_path} cannot be written"):
        cli.main(["train", "quickstart", "--output_dir", "new/out"])


@pytest.mark.parametrize("flags", [["--learning_rat", "1"], ["--help"]])
def test_the_command_is_named_in_usage(flags, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "quickstart", *flags])
    assert "usage: hf-efcp train [CONFIG]" in "".join(capsys.readouterr())


def test_a_missing_extra_is_named(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "yaml" else find(name, *rest))
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", "quickstart"])
    assert raised.value.code == 'error: this needs yaml: pip install "hf_efcp[recipes]"'


def run(code, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["quickstart", "--task_name", "sst3"], "unknown task 'sst3'"),
        (["quickstart", "--train-file=a.csv"], "give --task_name rotten_tomatoes or --train_file a.csv, not both"),
        (["--train_file", "a.csv", "--seed", "3"], "--train_file a.csv is not a file"),
    ],
)
def test_wrong_data_are_told_before_what_is_slow_is_imported(flags, error, tmp_path):
    code = f"""import sys, hf_efcp.cli
try: hf_efcp.cli.main(["train", *{flags!r}])
except SystemExit as end: print(end.code)
print("transformers" in sys.modules, "numba" in sys.modules, "datasets" in sys.modules)"""
    told, loaded = run(code, tmp_path).stdout.splitlines()
    assert told.startswith(f"error: {error}")
    assert loaded == "False False False"


def test_the_programs_that_train_need_no_module_of_benchmarks(tmp_path):
    modules = "fine_tuning, plots, run_glue, run_qa, submission, training, memory_plan"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'recipes')!r}); import {modules}"
    assert run(code, tmp_path).returncode == 0


# plan


def rows(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line}


def test_plan_counts_what_the_optimizers_count(bert_base, capsys):
    import torch
    from transformers import BertConfig, BertForMaskedLM

    cli.main(["plan", str(bert_base), "--memory-budget", "4B/param"])
    text = capsys.readouterr().out
    assert text.startswith(f"{bert_base}: BertForMaskedLM, 109,514,298 parameters\n")
    table = rows(text)
    assert set(hf_efcp.OPTIMIZERS) | {"AdamW"} < set(table)
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**{key: BERT_BASE[key] for key in BERT_BASE if key != "architectures"}))
    for name in ("lowrank_mfac", "microadam"):
        plan = hf_efcp.estimate_memory(model, name)
        fit = hf_efcp.estimate_memory(model, name, memory_budget="4B/param")
        assert table[name][1:3] == [str(plan.num_grads), f"{plan['total']:,}"]
        assert table[name][4:6] == [str(fit.num_grads), f"{fit['total']:,}"]
        assert fit["total"] <= 4 * 109514298
    assert table["AdamW"][1:] == [f"{plan.adamw:,}", "8.00"]
    assert table["dense_mfac"][4:] == ["does", "not", "fit"]


def test_the_page_of_the_command_has_the_numbers_of_today(bert_base, capsys):
    cli.main(["plan", str(bert_base), "--memory_budget", "8B/param"])
    table = rows(capsys.readouterr().out)
    page = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d*) ?\| ([\d.]+) \| ([^|]*)\|$", page, re.MULTILINE)
    shown = {name: numbers for names, *numbers in found for name in re.findall(r"\w+", names)}
    assert set(shown) == set(hf_efcp.OPTIMIZERS)
    for name, (num_grads, each, largest) in shown.items():
        expected = table[name][1:2] + table[name][3:] if num_grads else table[name][2:]
        found = [*num_grads.split(), each, *largest.split()]
        assert found == expected[: len(found)]
        assert len(expected) - len(found) == (2 if largest.strip().isdigit() else 0)  # its bytes, and those a parameter


def test_plan_shows_one_optimizer_by_part(bert_base, capsys):
    options = ["--optim", "lowrank_mfac", "--optim_args", "rank=8,exclude=embeddings"]
    cli.main(["plan", str(bert_base.parent), *options])
    table = rows(capsys.readouterr().out)
    assert table["LowRankMFAC:"][1].startswith("num_grads=16")
    embeddings = (30522 + 512 + 2 + 2) * 768  # with moments of AdamW
    assert int(table["momentum"][1].replace(",", "")) == pytest.approx(8 * embeddings, rel=1e-4)


def test_plan_takes_a_model_without_a_class_of_its_own(tmp_path, capsys):
    config = {key: BERT_BASE[key] for key in BERT_BASE if key != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    cli.main(["plan", "config.json"])
    assert "BertModel, 109,482,240 parameters" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^error: could not read the configuration of config.json \("):
        cli.main(["plan", "config.json"])


# The wheel


def of_setup():
    names = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text(encoding="utf-8"), names)
    return names


def test_the_wheel_has_every_folder_of_modules_and_configs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hf_efcp").rglob("*.py")}
    folders |= {Path("hf_efcp", path.parent.relative_to(ROOT)) for path in CONFIGS.rglob("*.yaml")}
    folders |= {Path("hf_efcp/recipes"), Path("hf_efcp/recipes/benchmarks")}
    assert {Path(name.replace(".", "/")) for name in of_setup()["packages"]()} == folders
    assert project["tool"]["setuptools"]["package-dir"] == {"hf_efcp.recipes": "recipes"}
    assert project["project"]["scripts"] == {"hf-efcp": "hf_efcp.cli:main"}
    assert all(yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.rglob("*.yaml"))


def test_the_readme_of_a_package_has_no_relative_link():
    names = of_setup()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = re.compile(r"\]\((?!https?://|#)")
    assert relative.search(text)
    assert not relative.search(names["readme"](text))
    some = "![a](b/c.png) [d](e.md#f) [g](https://h.example/i) [j](#k)"
    assert names["readme"](some) == "*(picture: a)* d [g](https://h.example/i) [j](#k)"
    assert names["readme"](some, "https://h.example/r/", "v1") == (
        "![a](https://h.example/r/raw/v1/b/c.png) [d](https://h.example/r/blob/v1/e.md#f) "
        "[g](https://h.example/i) [j](#k)"
    )
