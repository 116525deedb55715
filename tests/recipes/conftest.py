"""Fixtures of several files of this folder."""

import copy

import pytest
import yaml
from compare_cases import OPTIONS, write_reviews
from glue_cases import sentences, write_csv
from qa_cases import word_tokenizer
from tiny import save_tiny_bert


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data_dir(tmp_path):
    write_csv(tmp_path / "data" / "train.csv", sentences(256, seed=0))
    write_csv(tmp_path / "data" / "validation.csv", sentences(64, seed=1))
    return tmp_path / "data"


@pytest.fixture
def files(recipe, tmp_path):
    """Arguments for files of one's own with these columns; those of validation are the same unless they are given."""

    def make(train, validation=None, **options):
        for name, columns in (("train", train), ("validation", validation or train)):
            write_csv(tmp_path / f"{name}.csv", columns)
            options.setdefault(f"{name}_file", str(tmp_path / f"{name}.csv"))
        return recipe.own_data.FileArguments(**options)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def write_config(tiny_model, reviews, tmp_path):
    """Write the YAML of a small comparison, with changes."""

    def write(**changes):
        config = {
            "tasks": ["sst2"],
            "data_dir": str(reviews),
            "model_name_or_path": str(tiny_model),
            "output_dir": str(tmp_path / "out"),
            "search_seed": 3,
            "seeds": [3, 4],
            "max_seq_length": 16,
            "max_steps": 40,
            "per_device_train_batch_size": 16,
            "logging_steps": 4,
            "dataloader_pin_memory": False,
            "use_cpu": True,
            "optimizers": copy.deepcopy(OPTIONS),
            **changes,
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def reviews(tmp_path):
    """Sentences that a comparison of 40 steps learns to tell apart."""
    return write_reviews(tmp_path / "data")
