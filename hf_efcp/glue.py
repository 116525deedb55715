"""The task table of the GLUE recipes: text columns, labels, metrics and splits of each task.

Columns, splits and label order are those of `nyu-mll/glue` on the Hub; `rotten_tomatoes` is the quickstart's corpus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GlueTask:
    """What a recipe must know about one task.

    Args:
        name: the task's name, as on the Hub.
        text_columns: the one or two columns that hold the text.
        labels: the names of the classes, in the order of their numbers; empty for regression.
        metrics: what is reported; the first one is the headline.
        test_files: what GLUE's server calls the predictions for each of `test_splits`; empty if there are none.
        validation_splits: the labelled splits to evaluate on; training is watched on the first one.
        test_splits: the splits without labels.
        submits_names: whether the server takes the names of the classes instead of their numbers.
        bounds: the smallest and the largest label in regression.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    test_files: tuple[str, ...]
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    submits_names: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def regression(self) -> bool:
        """Whether the label is a number to predict instead of a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """The number of outputs of the model's head."""
        return len(self.labels) or 1

    @property
    def headline(self) -> str:
        """The metric that stands for the task in one line."""
        return self.metrics[0]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), ("CoLA.tsv",)),
        GlueTask("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), ("SST-2.tsv",)),
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"), ("MRPC.tsv",)),
        GlueTask("stsb", _PAIR, (), ("spearmanr", "pearson"), ("STS-B.tsv",), bounds=(0.0, 5.0)),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"), ("QQP.tsv",)),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("MNLI-m.tsv", "MNLI-mm.tsv"),
            ("validation_matched", "validation_mismatched"),
            ("test_matched", "test_mismatched"),
            submits_names=True,
        ),
        GlueTask("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), ("QNLI.tsv",), submits_names=True),
        GlueTask("rte", _PAIR, _ENTAILMENT, ("accuracy",), ("RTE.tsv",), submits_names=True),
        GlueTask("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), ("WNLI.tsv",)),
        GlueTask("rotten_tomatoes", ("text",), ("negative", "positive"), ("accuracy",), (), test_splits=()),
    )
}


def get_task(name: str) -> GlueTask:
    """Look up a task.

    Args:
        name: a key of `TASKS`.

    Returns:
        The task.

    Raises:
        ValueError: if there is no task of that name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def compute_metrics(task: GlueTask, predictions: Any, labels: Any) -> dict[str, float]:
    """Compare predictions with labels by the metrics of a task.

    Args:
        task: the task; its `metrics` are computed.
        predictions: predicted class numbers, or predicted values in regression, one per example.
        labels: the true class numbers or values, one per example.

    Returns:
        The value of each metric, the headline first. Correlations of constant values are NaN.

    Raises:
        ValueError: if the two are not non-empty, one-dimensional and of the same length.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape or not labels.size:
        raise ValueError(
            f"expected one prediction per label, as two non-empty vectors; got shapes {predictions.shape} and "
            f"{labels.shape}: turn logits into classes with argmax first"
        )
    return {name: _metric(name, predictions, labels) for name in task.metrics}


def _metric(name: str, predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    # Imported here: the table is useful, and hf_efcp installs, without scikit-learn and scipy.
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if name == "accuracy":
        return float(accuracy_score(labels, predictions))
    if name == "f1":
        return float(f1_score(labels, predictions, zero_division=0.0))  # of class 1, the paraphrases
    if name == "f1_macro":
        return float(f1_score(labels, predictions, average="macro", zero_division=0.0))
    if name == "matthews_correlation":
        return float(matthews_corrcoef(labels, predictions))
    return float({"pearson": pearsonr, "spearmanr": spearmanr}[name](predictions, labels).statistic)
