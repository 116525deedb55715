"""The task table and the metrics, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from hf_efcp.glue import TASKS, compute_metrics, get_task

GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
# 2 true positives, 1 false positive, 1 false negative, 1 true negative.
PREDICTIONS, LABELS = [1, 0, 1, 0, 1], [1, 1, 0, 0, 1]


def test_the_nine_glue_tasks_and_the_quickstart_are_there():
    assert set(TASKS) == {*GLUE, "rotten_tomatoes"}
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_is_complete(task):
    assert 1 <= len(task.text_columns) <= 2
    assert len(set(task.labels)) == len(task.labels)
    assert task.headline == task.metrics[0]
    assert task.validation_splits[0].startswith("validation")
    assert (
        len(task.test_files)
        == len(task.test_splits)
        == (0 if task.name == "rotten_tomatoes" else len(task.validation_splits))
    )
    assert task.num_labels == (1 if task.regression else len(task.labels))


def test_the_odd_ones():
    assert [name for name, task in TASKS.items() if task.regression] == ["stsb"]
    assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {"mnli": 3, "stsb": 1}
    assert get_task("mnli").validation_splits == ("validation_matched", "validation_mismatched")
    # The order of the classes differs from task to task on the Hub.
    assert get_task("rte").labels == ("entailment", "not_entailment")
    assert get_task("wnli").labels == ("not_entailment", "entailment")
    assert get_task("mnli").labels == ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sst2", {"accuracy": 3 / 5}),
        ("mrpc", {"f1": 2 / 3, "accuracy": 3 / 5}),
        ("cola", {"matthews_correlation": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)}),
    ],
)
def test_classification_metrics(name, expected):
    got = compute_metrics(get_task(name), np.array(PREDICTIONS), np.array(LABELS))
    assert got == pytest.approx(expected)
    assert next(iter(got)) == get_task(name).headline
    assert all(type(value) is float for value in got.values())


def test_regression_metrics():
    got = compute_metrics(get_task("stsb"), [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0])
    assert got == pytest.approx({"pearson": 5.5 / math.sqrt(5 * 8.75), "spearmanr": 1 - 6 * 2 / (4 * 15)})


def test_a_model_that_knows_one_class_only_scores_zero_without_warnings(recwarn):
    assert compute_metrics(get_task("mrpc"), [0, 0, 0], [1, 0, 1]) == pytest.approx({"f1": 0.0, "accuracy": 1 / 3})
    assert compute_metrics(get_task("cola"), [1, 1, 1], [1, 0, 1]) == {"matthews_correlation": 0.0}
    assert not recwarn.list


def test_an_unknown_task_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"unknown task 'sst-2': expected one of cola, sst2, .*rotten_tomatoes"):
        get_task("sst-2")


@pytest.mark.parametrize(
    ("predictions", "labels"), [([[0.1, 0.9]], [1]), ([1, 0], [1]), ([], [])], ids=["logits", "lengths", "empty"]
)
def test_shapes_that_do_not_fit_are_refused(predictions, labels):
    with pytest.raises(ValueError, match="one prediction per label"):
        compute_metrics(get_task("sst2"), predictions, labels)
