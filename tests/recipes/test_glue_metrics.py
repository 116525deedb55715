"""The metrics as a module of the evaluate library, loaded from its folder without the Hub."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from hf_efcp.glue import TASKS, compute_metrics

FOLDER = str(Path(__file__).parents[2] / "recipes" / "metrics" / "glue_metrics")


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """The library, which takes seconds to import, and reads where to write from the environment when it is."""
    home = tmp_path_factory.mktemp("hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        module = importlib.import_module("evaluate")
        assert home in Path(module.config.HF_MODULES_CACHE).parents
        assert home in Path(module.config.HF_METRICS_CACHE).parents
        yield module


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_it_computes_what_the_recipes_report(evaluate, task):
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 50) if task.regression else rng.integers(task.num_labels, size=50)
    guesses = labels + rng.normal(size=50) if task.regression else np.roll(labels, 1)
    expected = compute_metrics(task, guesses, labels)
    metric = evaluate.load(FOLDER, task.name)
    assert metric.compute(predictions=guesses, references=labels) == expected
    for start in (0, 20):  # in two parts
        part = slice(start, start + 20 if start == 0 else None)
        metric.add_batch(predictions=guesses[part], references=labels[part])
    assert metric.compute() == expected
    assert all(np.isfinite(value) for value in expected.values())


@pytest.mark.parametrize("names", [("sst-2",), ()], ids=["wrong", "none"])
def test_a_wrong_task_is_refused_with_the_names(evaluate, names):
    with pytest.raises(ValueError, match=r"unknown task '(sst-2|default)': expected one of cola, sst2, .*"):
        evaluate.load(FOLDER, *names)
