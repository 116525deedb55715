"""The GLUE recipe: whole runs with a tiny model."""

import json
import math
import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from glue_cases import ROOT, sentences, write_csv
from safetensors.torch import load_file

from hf_efcp.glue import TASKS, get_task

GLUE_DIR = Path(os.environ.get("HF_EFCP_GLUE_DIR", ROOT.parent / "shared" / "glue"))


pytestmark = pytest.mark.usefixtures("private_cache")


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
    recipe.run_glue.main([*argv, "--resume_from_checkpoint", "False"])
    assert json.loads((output / "metrics.json").read_text())["resumed_from_step"] == 0


@pytest.mark.parametrize("optim", ["sparse_mfac", "sgd"])
def test_what_is_recorded_after_a_resume_is_what_trained(
    recipe, tiny_model, data_dir, tmp_path, monkeypatch, capsys, optim
):
    output, asked = tmp_path / "out", {}
    monkeypatch.setattr("plots.plot_training", lambda path, title, metric, runs: asked.update(legend=runs[0][0]))

    def record(text, *flags):
        texts = {"sparse_mfac": f"num_grads=4,exclude=classifier,{text}", "sgd": f"momentum={text.split('=')[-1]}"}
        flags = ["--optim_args", texts[optim], "--max_steps", 6, *flags]
        flags += ["--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3]
        recipe.run_glue.main(small_run(tiny_model, data_dir, output, "--optim", optim, *flags))
        return json.loads((output / "metrics.json").read_text()), texts[optim]

    first, text = record("exclude_lr=1e-4,trust_lr=1e-2", "--weight_decay", 0.25)
    assert (first["learning_rate"], first["optim_args"], first["resumed_from_step"]) == (1e-2, text, 0)
    own = first["optimizer_arguments"]
    assert (own["lr"], own["weight_decay"]) == (1e-2, 0.25)
    checkpoint = ["--resume_from_checkpoint", output / "checkpoint-2"]

    # Only what decides shapes must be equal; of the others the checkpoint's win.
    second, _ = record("exclude_lr=3e-4,trust_lr=.5", *checkpoint, "--learning_rate", 3e-3, "--weight_decay", 0.5)
    assert (second["learning_rate"], second["optim_args"]) == (1e-2, None)
    excluded = {"exclude_lr": 1e-4} if optim == "sparse_mfac" else {}
    assert second["optimizer_arguments"] == {**own, **excluded}
    assert asked["legend"] == f"{optim}, lr 0.01"
    assert (second["steps"], second["resumed_from_step"]) == (6, 2)
    assert re.search(rf"\({optim}, 6 steps, 4 of them in these \d+ s\)", capsys.readouterr().out)

    third, text = record("exclude_lr=1e-4,trust_lr=1e-2", *checkpoint, "--weight_decay", 0.25)
    assert (third["optim_args"], third["optimizer_arguments"]) == (text, {**own, **excluded})


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
