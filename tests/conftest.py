"""Settings of the test run, and fixtures of several files."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# On a developer's machine hypothesis looks for new failures; the gate gives the same answer for the same code.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


class Recipes:
    """The modules of recipes/ and its benchmarks/, which are folders of programs and no packages, by their names."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return importlib.import_module(name)


@pytest.fixture
def recipe(monkeypatch):
    for folder in ("recipes", "recipes/benchmarks"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / folder))
    return Recipes()


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """What datasets keeps of a test stays with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def sharded():
    """A parameter as FSDP2 makes them, of a process alone."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def own_precision():
    """Transformers 4 writes bf16 and fp16 into the environment, for whatever is trained after them."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
