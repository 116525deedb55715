"""Fine-tune a model on a GLUE task, or on Rotten Tomatoes, with an EFCP optimizer.

    python recipes/run_glue.py recipes/configs/quickstart.yaml
    python recipes/run_glue.py recipes/configs/quickstart.yaml --baseline adamw_torch --seed 1
    python recipes/run_glue.py --task_name sst2 --data_dir my_folder --model_name_or_path google-bert/bert-base-uncased

The folder `output_dir` then holds the model with its tokenizer, `metrics.json`, `history.json` and `training.png`, and
with `--do_predict true` the predictions for GLUE's test splits in `predictions/`, as its server takes them. The recipe
always trains and evaluates, whatever `do_train` and `do_eval` say.
Three defaults are not Trainer's: `optim` is sparse_mfac, `warmup_steps` is 0.1 (of all steps; the window of gradients
starts empty), and `logging_nan_inf_filter` is off, for it would show a diverged loss as 0.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from cli import parse_arguments, require
from data import load_splits
from fine_tuning import BaselineArguments, fine_tune, runs_of
from submission import write_predictions
from training import (
    DEFAULTS,
    ModelArguments,
    TextArguments,
    build_trainer,
    load_model,
    tokenize,
)
from transformers import set_seed

from hf_efcp import EFCPTrainer, EFCPTrainingArguments
from hf_efcp.glue import get_task


@dataclasses.dataclass(kw_only=True)
class DataArguments(TextArguments):
    """What to train on."""

    task_name: str = dataclasses.field(metadata={"help": "a GLUE task such as sst2, or rotten_tomatoes"})


def main(argv: list[str]) -> None:
    """Run the recipe.

    Args:
        argv: the command line without the program's name.
    """
    require("recipes", "datasets", "matplotlib", "scipy", "sklearn", "yaml")
    data_arguments, model_arguments, baseline, args = parse_arguments(
        (DataArguments, ModelArguments, BaselineArguments, EFCPTrainingArguments), argv, DEFAULTS
    )
    task, runs = get_task(data_arguments.task_name), runs_of(args, baseline)
    loaded = load_splits(task, data_arguments.data_dir, args.do_predict)
    set_seed(args.seed)  # the new head's weights
    tokenizer, model = load_model(model_arguments, task)
    with args.main_process_first():
        splits = tokenize(task, tokenizer, loaded, data_arguments.max_seq_length)

    def build(model: Any, run: EFCPTrainingArguments) -> EFCPTrainer:
        return build_trainer(task, model, tokenizer, splits, run)

    def write(trainer: EFCPTrainer, folder: Path) -> list[str]:
        if args.do_predict:
            write_predictions(trainer, task, splits, folder / "predictions")
            print(f"{' and '.join(task.test_files)} for GLUE's server: in {folder / 'predictions'}")
        return []

    fine_tune(runs, task, splits, model, model_arguments, build, write, {})


if __name__ == "__main__":
    main(sys.argv[1:])
