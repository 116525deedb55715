"""Fine-tune a model on a GLUE task, on Rotten Tomatoes, or on files of one's own, with an EFCP optimizer.

    python recipes/run_glue.py recipes/configs/quickstart.yaml
    python recipes/run_glue.py recipes/configs/quickstart.yaml --baseline adamw_torch --seed 1
    python recipes/run_glue.py --task_name sst2 --data_dir my_folder --model_name_or_path google-bert/bert-base-uncased
    python recipes/run_glue.py --train_file train.csv --validation_file validation.csv --optim lowrank_mfac

Files of one's own have one or two columns of text, and a column of labels: text or integers are classes, however many,
and floats a regression.

The folder `output_dir` then holds the model with its tokenizer, `metrics.json`, `history.json` and `training.png`, and
with `--do_predict true` the predictions for the test splits in `predictions/`, as GLUE's server takes them. The recipe
always trains and evaluates, whatever `do_train` and `do_eval` say.
Three defaults are not Trainer's: `optim` is lowrank_mfac, `warmup_steps` is 0.1 (of all steps; the window of gradients
starts empty), and `logging_nan_inf_filter` is off, for it would show a diverged loss as 0.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import DEFAULTS, BaselineArguments, ModelArguments, TextArguments, runs_of
from cli import explained, given, parse_arguments, require
from data import load_splits
from own_data import FileArguments, check_file, columns_taken, load_files

from hf_efcp.glue import GlueTask, get_task

if TYPE_CHECKING:
    from hf_efcp import EFCPTrainer, EFCPTrainingArguments


@dataclasses.dataclass(kw_only=True)
class DataArguments(FileArguments, TextArguments):
    """What to train on."""

    task_name: str | None = dataclasses.field(
        default=None, metadata={"help": "a GLUE task such as sst2, or rotten_tomatoes"}
    )


def load(data: DataArguments, predict: bool) -> tuple[GlueTask, dict[str, Any]]:
    """Load what the command line says.

    Args:
        data: a task, or files of one's own.
        predict: whether the test splits are to be predicted.

    Returns:
        The task and its splits.

    Raises:
        ValueError: if there is neither, or both, or a flag that is of no use to it.
    """
    task = _source(vars(data))
    return load_files(data, predict) if task is None else (task, load_splits(task, data.data_dir, predict))


def _source(found: Mapping[str, Any]) -> GlueTask | None:
    """The task that is named, or None for files; neither and both are refused, and flags that would do nothing."""
    task_name, train_file, data_dir = (found.get(name) for name in ("task_name", "train_file", "data_dir"))
    if task_name is not None and train_file is not None:
        raise ValueError(f"give --task_name {task_name} or --train_file {train_file}, not both")
    if task_name is None and train_file is None:
        raise ValueError("give --task_name with a task of GLUE, or --train_file and --validation_file")
    if task_name is None:
        if data_dir is not None:
            raise ValueError(
                f"--data_dir {data_dir} is of use with --task_name only, and not with --train_file: leave it out"
            )
        return None
    task = get_task(task_name)
    names = ("validation_file", "test_file", "text_column", "label_column")
    if useless := [f"--{name}" for name in names if found.get(name) not in (None, getattr(FileArguments, name))]:
        raise ValueError(
            f"{', '.join(useless)} may be given with --train_file only; --task_name {task_name} has columns of its "
            "own, and its files are in --data_dir"
        )
    return task


def _first_look(argv: list[str]) -> None:
    """Tell what is wrong with the task or the files before the arguments of transformers are imported: seconds."""
    if {"-h", "--help"} & set(argv):
        return
    found = given(argv, [field.name for field in dataclasses.fields(DataArguments)])
    if {"task_name", "train_file", "validation_file"} & set(found) and _source(found) is None:
        for name in ("train", "validation"):
            check_file(name, found.get(f"{name}_file"))


def main(argv: list[str]) -> None:
    """Run the recipe.

    Args:
        argv: the command line without the program's name.
    """
    require("recipes", "datasets", "matplotlib", "scipy", "sklearn", "yaml")
    _first_look(argv)
    from hf_efcp import EFCPTrainingArguments

    data_arguments, model_arguments, baseline, args = parse_arguments(
        (DataArguments, ModelArguments, BaselineArguments, EFCPTrainingArguments), argv, DEFAULTS
    )
    runs = runs_of(args, baseline)
    task, loaded = load(data_arguments, args.do_predict)
    if data_arguments.train_file and args.process_index == 0:
        print(columns_taken(task, data_arguments.label_column))

    # These take seconds to import: what is wrong with the command line and the data has been told before.
    from fine_tuning import fine_tune
    from submission import write_predictions
    from training import build_trainer, load_model, tokenize
    from transformers import set_seed

    set_seed(args.seed)  # the new head's weights
    tokenizer, model = load_model(model_arguments, task)
    with args.main_process_first():
        splits = tokenize(task, tokenizer, loaded, data_arguments.max_seq_length)

    def build(model: Any, run: EFCPTrainingArguments) -> EFCPTrainer:
        return build_trainer(task, model, tokenizer, splits, run)

    def write(trainer: EFCPTrainer, folder: Path) -> list[str]:
        if args.do_predict:
            write_predictions(trainer, task, splits, folder / "predictions")
            print(f"{' and '.join(task.test_files)}: in {folder / 'predictions'}")
        return []

    fine_tune(runs, task, splits, model, model_arguments, build, write, {})


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
