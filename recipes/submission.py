"""Predictions for GLUE's test splits, in the files that its server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from training import decide, first_output

from hf_efcp import EFCPTrainer
from hf_efcp.glue import GlueTask


def write_predictions(trainer: EFCPTrainer, task: GlueTask, splits: dict[str, Any], folder: Path) -> None:
    """Predict the test splits of a task, and write a file for each.

    Args:
        trainer: a trained trainer.
        task: the task.
        splits: the tokenized datasets, with the test splits.
        folder: where the files go; it is made if it is not there.

    Raises:
        ValueError: if the model puts out NaN or infinity.
    """
    for split, file in zip(task.test_splits, task.test_files, strict=True):
        logits = first_output(trainer.predict(splits[split]).predictions)
        if not np.isfinite(logits).all():
            raise ValueError(
                f"the model's outputs for the {split} split of {task.name} are not finite, so {file} is not written: "
                "the training has diverged, try a smaller learning_rate"
            )
        if trainer.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(submission(task, decide(task, logits)), encoding="utf-8")


def submission(task: GlueTask, predictions: Any) -> str:
    """Spell predictions as GLUE's server reads them.

    Args:
        task: the task.
        predictions: class numbers, or in regression values, in the order of the test split.

    Returns:
        Lines of row number, tab and prediction, below a heading. Values are within the task's bounds.
    """
    if task.regression:
        cells = [f"{value:.3f}" for value in np.clip(predictions, *task.bounds)]
    else:
        cells = [task.labels[number] if task.submits_names else str(number) for number in predictions]
    return "".join(f"{row}\n" for row in ("index\tprediction", *(f"{i}\t{cell}" for i, cell in enumerate(cells))))
