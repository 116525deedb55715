"""Fixtures of several files of this folder."""

import pytest
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


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()
