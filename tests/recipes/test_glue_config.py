"""The GLUE recipe: configuration and sources of data."""

import json
import math
import re

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from glue_cases import ROOT, sentences, write_csv

from hf_efcp import EFCPTrainingArguments
from hf_efcp.glue import get_task

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def parse(recipe):
    types = (recipe.run_glue.DataArguments, recipe.run_glue.ModelArguments)
    types += (recipe.run_glue.BaselineArguments, EFCPTrainingArguments)
    return lambda *argv: recipe.cli.parse_arguments(types, [str(arg) for arg in argv], recipe.run_glue.DEFAULTS)


def test_the_quickstart_is_the_recipe_that_was_measured(parse):
    data, model, baseline, args = parse(ROOT / "recipes" / "configs" / "quickstart.yaml")
    assert (data.task_name, data.max_seq_length, model.model_name_or_path) == (
        "rotten_tomatoes",
        128,
        "packaged-minilm",
    )
    assert (args.optim, args.optim_args) == ("lowrank_mfac", None)
    assert (args.learning_rate, args.warmup_steps, args.max_grad_norm) == (2e-4, 0.1, 1.0)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.save_strategy) == (1, 32, "no")
    assert baseline.baseline is None


def test_yaml_values_get_their_types_from_the_parser(parse, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("task_name: sst2\nlearning_rate: 2e-5\nsave_strategy: no\nbf16: false\nlabel_names: [a, b]\n")
    data, _, _, args = parse(config)
    assert data.task_name == "sst2"
    assert isinstance(args.learning_rate, float)
    assert args.learning_rate == 2e-5
    assert (args.save_strategy, args.bf16, args.label_names) == ("no", False, ["a", "b"])


def test_flags_win_over_yaml(parse, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("task_name: sst2\nlearning_rate: 2e-5\nmax_steps: 7\n")
    data, _, _, args = parse(config, "--task_name", "rte", "--learning_rate", "3e-5")
    assert (data.task_name, args.learning_rate, args.max_steps) == ("rte", 3e-5, 7)


def test_the_recipes_own_defaults(parse):
    _, _, _, args = parse("--task_name", "sst2")
    assert (args.optim, args.warmup_steps, args.logging_nan_inf_filter) == ("lowrank_mfac", 0.1, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task_name: sst2\nlearning_rat: 1", "unknown key 'learning_rat' in .*did you mean learning_rate"),
        ("task_name: sst2\nseed:", "'seed' in .* must have one value"),
        ("task_name: sst2\nlr_scheduler_kwargs: {a: 1}", "write a mapping as quoted JSON"),
        ("task_name: sst2\nlearning_rate: fast", "invalid float value: 'fast'"),
        ("task_name: sst2\noptim: sparse_mfak", "sparse_mfak"),
        ("task_name: sst2\noptim_args: num_grad=3", "num_grad"),
        ("task_name: [", "is not valid YAML"),
        ("sst2", "must hold lines of 'key: value'"),
    ],
)
def test_a_wrong_config_ends_with_a_message(parse, tmp_path, capsys, text, message):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit):
        parse(config)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task_name", "sst2", "--base_line", "sgd"], "unknown arguments --base_line sgd; did you mean baseline"),
        (["--task", "sst2"], "task_name"),  # no abbreviations: a new flag could change what they mean
        (["absent.yaml"], "absent.yaml is neither a file nor"),
    ],
)
def test_wrong_flags_end_with_a_message(parse, capsys, argv, message):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("folder", [".", "sst2"])
def test_local_files_of_every_format(recipe, tmp_path, suffix, folder):
    columns = {"sentence": ["good film", 'null, "quoted"', "NA"], "label": [1, 0, 1], "idx": [0, 1, 2]}
    for split in ("train", "validation"):
        path = tmp_path / folder / f"{split}.{suffix}"
        if suffix == "csv":
            write_csv(path, columns)
        path.parent.mkdir(exist_ok=True)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if suffix == "json":
            path.write_text(json.dumps(rows))
        if suffix == "jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows))
        if suffix == "parquet":
            Dataset.from_dict(columns).to_parquet(path)
    splits = recipe.data.load_splits(get_task("sst2"), str(tmp_path))
    assert list(splits) == ["train", "validation"]
    assert {name: split.to_dict() for name, split in splits.items()} == {"train": columns, "validation": columns}


def test_a_changed_file_is_read_again(recipe, data_dir):
    before = recipe.data.load_splits(get_task("sst2"), str(data_dir))["train"].to_dict()
    write_csv(data_dir / "train.csv", sentences(256, seed=5))
    after = recipe.data.load_splits(get_task("sst2"), str(data_dir))["train"].to_dict()
    assert before == sentences(256, seed=0)
    assert after == sentences(256, seed=5)


def test_an_absent_file_is_an_error_that_lists_the_folder(recipe, data_dir):
    (data_dir / "validation.csv").rename(data_dir / "dev.csv")
    with pytest.raises(FileNotFoundError, match=r"expected one of validation.parquet, .* it holds dev.csv, train.csv"):
        recipe.data.load_splits(get_task("sst2"), str(data_dir))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        recipe.data.load_splits(get_task("sst2"), str(data_dir / "nowhere"))


def test_two_files_for_one_split_are_an_error(recipe, data_dir):
    (data_dir / "train.jsonl").write_text('{"sentence": "a", "label": 1}')
    with pytest.raises(FileNotFoundError, match=r"expected one of train\.parquet"):
        recipe.data.load_splits(get_task("sst2"), str(data_dir))


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("sst2", {"text": ["a"], "label": [0]}, "no column sentence: expected sentence, label, got text, label"),
        ("sst2", {"sentence": ["a"]}, "no column label: expected sentence, label, got sentence"),
        ("sst2", {"sentence": ["a", "b"], "label": [-1, -1]}, r"is not labelled \(its labels are \{-1\}\)"),
        ("sst2", {"sentence": ["a", "b"], "label": [0, 2]}, "must be integers, 0 = negative, 1 = positive; got 0, 2"),
        ("sst2", {"sentence": ["a"], "label": ["positive"]}, "must be integers, .* got 'positive'"),
        ("sst2", {"sentence": ["a"], "label": [0.5]}, r"must be integers, .* got 0.5 \(float64\)"),
        ("sst2", {"sentence": [3], "label": [0]}, "column sentence of .* must hold text in every row; got int64"),
        ("sst2", {"sentence": ["a", None], "label": [0, 1]}, "must hold text in every row; got 1 empty rows"),
        ("sst2", {"sentence": [], "label": []}, "could not read a table with rows from .*train.parquet"),
        (
            "stsb",
            {"sentence1": ["a"], "sentence2": ["b"], "label": [3]},
            r"stsb is a regression task: .* floats from 0.0 to 5.0, in a text file with a point; got 3 \(int64\)",
        ),
        ("stsb", {"sentence1": ["a"], "sentence2": ["b"], "label": [5.5]}, r"floats from 0.0 to 5.0.*got 5.5 "),
        ("stsb", {"sentence1": ["a"], "sentence2": ["b"], "label": [math.nan]}, r"floats from 0.0 .*got nan "),
        ("stsb", {"sentence1": ["a"], "sentence2": ["b"], "label": ["similar"]}, r"floats .*got 'similar' \(string\)"),
        ("stsb", {"sentence1": ["a"], "sentence2": ["b"], "label": [-1.0]}, r"is not labelled .*use a split that is"),
        ("sst2", {"sentence": ["a", "b"], "label": [1, None]}, "must be integers, .* got .*None"),
        ("sst2", {"sentence": ["a"], "label": [[1]]}, r"must be integers, .* got '\[1\]' \(List\)"),
        ("sst2", {"sentence": [["a"]], "label": [1]}, "column sentence of .* must hold text in every row; got List"),
        ("rte", {"sentence1": ["a"], "label": [1]}, "no column sentence2"),
    ],
)
def test_data_that_does_not_fit_the_task_is_refused(recipe, tmp_path, task, columns, message):
    for split in ("train", "validation"):
        Dataset.from_dict(columns).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=message):
        recipe.data.load_splits(get_task(task), str(tmp_path))


def test_a_folder_of_other_tasks_leaves_rotten_tomatoes_to_its_package(recipe, tmp_path, monkeypatch):
    packaged = {split: Dataset.from_dict({"text": ["a"], "label": [1]}) for split in ("train", "validation")}
    monkeypatch.setattr(recipe.data, "rotten_tomatoes", lambda: packaged)
    task = get_task("rotten_tomatoes")
    with pytest.raises(FileNotFoundError, match="expected one of train.parquet"):
        recipe.data.load_splits(task, str(tmp_path))  # an empty folder is a mistake
    (tmp_path / "sst2").mkdir()
    assert recipe.data.load_splits(task, str(tmp_path)) is packaged
    for split in ("train", "validation"):
        write_csv(tmp_path / "rotten_tomatoes" / f"{split}.csv", {"text": ["b", "c"], "label": [0, 1]})
    assert recipe.data.load_splits(task, str(tmp_path))["train"]["text"] == ["b", "c"]


def test_a_head_of_another_task_starts_anew_and_other_sizes_are_refused(recipe, tiny_model, tmp_path, capsys):
    arguments = recipe.run_glue.ModelArguments(str(tiny_model))
    tokenizer, model = recipe.training.load_model(arguments, get_task("mnli"))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "mnli")
    _, loaded = recipe.training.load_model(recipe.run_glue.ModelArguments(str(tmp_path / "mnli")), get_task("rte"))
    assert loaded.classifier.weight.shape[0] == 2
    assert torch.equal(loaded.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert "that of another task: it starts anew" in capsys.readouterr().out
    config = json.loads((tmp_path / "mnli" / "config.json").read_text())
    (tmp_path / "mnli" / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ValueError, match=r"weights of other sizes than its configuration says: bert\."):
        recipe.training.load_model(recipe.run_glue.ModelArguments(str(tmp_path / "mnli")), get_task("rte"))


@pytest.mark.parametrize("names", [["positive", "negative"], ["negative", "positive"], ["neg", "pos"]])
def test_classes_in_another_order_are_refused(recipe, tmp_path, names):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
    for split in ("train", "validation"):
        columns = {"sentence": ["a", "b"], "label": [0, 1]}
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    if names[0] == "positive":
        with pytest.raises(ValueError, match=r"in the order 0 = negative, 1 = positive; the file has positive, neg"):
            recipe.data.load_splits(get_task("sst2"), str(tmp_path))
    else:  # other names for the classes say nothing of their order
        assert recipe.data.load_splits(get_task("sst2"), str(tmp_path))["train"]["label"] == [0, 1]


@pytest.mark.parametrize("name", ["train.csv", "train.json", "train.parquet"])
@pytest.mark.parametrize("content", ["", '{"sentence": "a", '])
def test_a_broken_file_is_named(recipe, data_dir, name, content):
    (data_dir / "train.csv").unlink()
    (data_dir / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}"):
        recipe.data.load_splits(get_task("sst2"), str(data_dir))
