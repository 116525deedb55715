"""The question answering recipe: whole runs with a tiny model."""

import json
import random
import re

import numpy as np
import pytest
import torch
from qa_cases import SAMPLE, row, sample_rows, write_flat
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, BertConfig, BertModel

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tokenizer):
    """A folder with a BERT of two small layers, without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2, **sizes)
    config.num_labels = 1  # some checkpoints say so; the head for answers has two outputs all the same
    BertModel(config).save_pretrained(folder)
    return folder


def small_run(model, data_dir, output_dir, *flags):
    options = {
        "--data_dir": data_dir,
        "--model_name_or_path": model,
        "--output_dir": output_dir,
        "--optim": "sparse_mfac",
        "--optim_args": "num_grads=32,density=0.05,trust_lr=1e-2",
        "--learning_rate": "1e-2",
        "--max_seq_length": 96,
        "--doc_stride": 16,
        "--per_device_train_batch_size": 16,
        "--per_device_eval_batch_size": 16,
        "--logging_steps": 2,
        "--save_strategy": "no",
        "--disable_tqdm": "true",
        "--dataloader_pin_memory": "false",
        "--use_cpu": "true",
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    return [str(part) for option in options.items() for part in option]


def metal_questions(count, seed):
    """Random words, in most texts with one metal, which is the answer."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.choices(["bees", "bell", "boat", "ice", "jar", "goose", "honey", "flood", "gate"], k=6)
        answers = {"text": [], "answer_start": []}
        if number % 4:  # the others cannot be answered
            metal = rng.choice(["cobalt", "copper"])
            words[rng.randrange(6)] = metal
            answers = {"text": [metal], "answer_start": [" ".join(words).index(metal)]}
        rows.append(row(id=str(number), context=" ".join(words), answers=answers))
    return rows


def test_a_run_with_a_baseline(recipe, tiny_model, tmp_path, capsys):
    write_flat(tmp_path / "metals", metal_questions(64, seed=1))
    (tmp_path / "metals" / "train.json").write_text(json.dumps(metal_questions(256, seed=0)))
    output = tmp_path / "out"
    flags = ["--max_steps", 60, "--eval_strategy", "steps", "--eval_steps", 30, "--eval_on_start", "true"]
    flags += ["--baseline", "adamw_torch", "--baseline_learning_rate", "3e-3", "--seed", 3]
    recipe.run_qa.main(small_run(tiny_model, tmp_path / "metals", output, *flags))

    metrics, alone = (json.loads((output / name / "metrics.json").read_text()) for name in (".", "baseline"))
    baseline = metrics["baseline"]
    assert baseline == alone
    assert (metrics["task"], metrics["headline"], metrics["model"]) == ("metals", "f1", str(tiny_model))
    assert (metrics["optimizer"], metrics["learning_rate"], metrics["seed"]) == ("sparse_mfac", 1e-2, 3)
    assert (baseline["optimizer"], baseline["learning_rate"]) == ("adamw_torch", 3e-3)
    names = {f"{prefix}{name}" for prefix in ("", "HasAns_", "NoAns_") for name in ("f1", "exact")}
    histories = [json.loads((folder / "history.json").read_text()) for folder in (output, output / "baseline")]
    answers = {item["id"]: item["answers"]["text"] for item in metal_questions(64, seed=1)}
    for folder, record, history in zip((output, output / "baseline"), (metrics, baseline), histories, strict=True):
        assert set(record["metrics"]) == {*names, "loss"}
        assert (record["steps"], record["train_examples"], record["validation_examples"]) == (60, 256, 64)
        assert record["train_windows"] == 256
        predictions = json.loads((folder / "predictions.json").read_text())
        again = recipe.qa_metrics.squad_metrics(predictions, answers)
        assert again == pytest.approx({name: record["metrics"][name] for name in names})
        # It learned, and not by always saying the same: a quarter has no answer, the rest one of two.
        assert record["metrics"]["HasAns_exact"] >= 0.9
        assert record["metrics"]["NoAns_exact"] >= 0.9
        assert history[0]["eval_f1"] < 0.5
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 30
        assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert histories[0][0]["step"] == 0
    assert histories[0][0]["eval_loss"] == histories[1][0]["eval_loss"]

    assert (output / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"metals f1: [01]\.\d{3} \(sparse_mfac, 60 steps, \d+ s\)", lines[-1])
    assert [line.split()[:2] for line in lines[-4:-2]] == [["sparse_mfac", "0.01"], ["adamw_torch", "0.003"]]
    arguments = recipe.run_qa.ModelArguments(str(output))
    _, model = recipe.training.load_pretrained(arguments, AutoModelForQuestionAnswering, {})
    assert model.qa_outputs.out_features == 2
    assert torch.equal(model.qa_outputs.weight, load_file(output / "model.safetensors")["qa_outputs.weight"])


def test_samples_are_limited_and_the_split_is_the_validation_one(recipe, tiny_model, tmp_path):
    flags = ["--max_steps", 2, "--max_train_samples", 20, "--max_eval_samples", 5]
    recipe.run_qa.main(small_run(tiny_model, SAMPLE, tmp_path / "out", *flags))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["task"], metrics["train_examples"], metrics["validation_examples"]) == ("squad_sample", 20, 5)
    assert metrics["baseline"] is None
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(predictions) == [item["id"] for item in sample_rows("validation")[:5]]


def test_data_without_unanswerable_questions_never_gets_no_answer(recipe, tiny_model, tmp_path):
    rows = [item for item in metal_questions(32, seed=0) if item["answers"]["text"]]
    write_flat(tmp_path / "data", rows)
    flags = ["--max_steps", 2, "--null_score_diff_threshold", -1000]
    recipe.run_qa.main(small_run(tiny_model, tmp_path / "data", tmp_path / "out", *flags))
    assert all(json.loads((tmp_path / "out" / "predictions.json").read_text()).values())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"f1", "exact", "loss"}
    # The same threshold, and one question without an answer.
    write_flat(tmp_path / "data", [*rows, row(id="none", answers={"text": [], "answer_start": []})])
    recipe.run_qa.main(small_run(tiny_model, tmp_path / "data", tmp_path / "out", *flags))
    assert not any(json.loads((tmp_path / "out" / "predictions.json").read_text()).values())


def test_a_run_resumes_from_its_checkpoint(recipe, tiny_model, tmp_path):
    output = tmp_path / "out"
    flags = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2]
    argv = small_run(tiny_model, write_flat(tmp_path / "data", metal_questions(64, seed=0)), output, *flags)
    recipe.run_qa.main(argv)
    whole = load_file(output / "model.safetensors")
    for checkpoint, steps_left in ((str(output / "checkpoint-2"), True), ("true", False)):  # "true" is the newest one
        recipe.run_qa.main([*argv, "--resume_from_checkpoint", checkpoint])
        resumed = load_file(output / "model.safetensors")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        metrics = json.loads((output / "metrics.json").read_text())
        assert (metrics["seconds_per_step"] is not None) == steps_left
    start = load_file(tiny_model / "model.safetensors")
    still = [name for name, tensor in start.items() if torch.equal(tensor, whole.get(f"bert.{name}", tensor))]
    assert all(name.startswith("pooler") for name in still), still


def test_wrong_names_end_a_run_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(recipe.run_qa, "load_questions", lambda *args: pytest.fail("loaded data"))
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'"):
        recipe.run_qa.main(["--baseline", "adamv"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('datasets, matplotlib, yaml: pip install "hf_efcp[recipes]"')):
        recipe.run_qa.main([])
