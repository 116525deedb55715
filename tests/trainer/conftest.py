"""Fixtures of several files of this folder."""

from __future__ import annotations

import shutil

import pytest
from resume_cases import SETTINGS
from tiny import arguments, tiny_bert, toy_rows

from hf_efcp import EFCPTrainer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A run's folder with checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    args = arguments(folder, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, **SETTINGS)
    EFCPTrainer(model=tiny_bert(), args=args, train_dataset=toy_rows(32)).train()
    return folder


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(checkpoints, tmp_path / "run")
