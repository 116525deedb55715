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

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

from cli import parse_arguments, require
from data import load_splits
from submission import write_predictions
from training import (
    DEFAULTS,
    ModelArguments,
    TextArguments,
    build_trainer,
    load_model,
    tokenize,
    train,
    write_json,
)
from transformers import set_seed

from hf_efcp import EFCPTrainingArguments
from hf_efcp.glue import get_task


@dataclasses.dataclass(kw_only=True)
class DataArguments(TextArguments):
    """What to train on."""

    task_name: str = dataclasses.field(metadata={"help": "a GLUE task such as sst2, or rotten_tomatoes"})


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


def comparison(records: list[dict[str, Any]]) -> str:
    """Lay out runs as a table.

    Args:
        records: what `train` returned for each run.

    Returns:
        A line of headings and a line for each run.
    """
    headline = records[0]["headline"]
    rows = [("optimizer", "learning rate", headline, "loss", "s/step", "state MB")]
    for record in records:
        metrics = record["metrics"]
        rows.append((
            record["optimizer"],
            f"{record['learning_rate']:g}",
            f"{metrics[headline]:.3f}",
            f"{metrics['loss']:.3f}",
            f"{record['seconds_per_step']:.2f}",
            f"{record['optimizer_memory']['total'] / 1e6:.0f}",
        ))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str]) -> None:
    """Run the recipe.

    Args:
        argv: the command line without the program's name.
    """
    require("recipes", "datasets", "matplotlib", "scipy", "sklearn", "yaml")
    from plots import plot_training

    data_arguments, model_arguments, baseline_arguments, args = parse_arguments(
        (DataArguments, ModelArguments, BaselineArguments, EFCPTrainingArguments), argv, DEFAULTS
    )
    task = get_task(data_arguments.task_name)
    runs = [args]
    if baseline_arguments.baseline:
        runs.append(
            dataclasses.replace(
                args,
                optim=baseline_arguments.baseline,
                optim_args=None,
                learning_rate=baseline_arguments.baseline_learning_rate,
                output_dir=str(Path(args.output_dir, "baseline")),
            )
        )
    splits = load_splits(task, data_arguments.data_dir, args.do_predict)
    set_seed(args.seed)  # the new head's weights
    tokenizer, model = load_model(model_arguments, task)
    with args.main_process_first():
        splits = tokenize(task, tokenizer, splits, data_arguments.max_seq_length)

    records, curves = [], []
    for run in runs:
        resume: bool | str = False
        if run is args and run.resume_from_checkpoint:  # a flag gives the word "true", or a folder
            resume = run.resume_from_checkpoint.lower() == "true" or run.resume_from_checkpoint
        # Every run starts from the same weights; Trainer seeds dropout and the order of the data.
        trainer = build_trainer(task, copy.deepcopy(model), tokenizer, splits, run)
        record, history = train(trainer, task, splits, resume)
        trainer.save_model()
        records.append({
            "model": model_arguments.model_name_or_path,
            "layers": model.config.num_hidden_layers,
            **record,
        })
        curves.append((f"{record['optimizer']}, lr {run.learning_rate:g}", history))
        if args.process_index == 0:
            write_json(Path(run.output_dir, "metrics.json"), records[-1])
            write_json(Path(run.output_dir, "history.json"), history)
        if run.do_predict:
            write_predictions(trainer, task, splits, Path(run.output_dir, "predictions"))
    if args.process_index > 0:
        return

    output_dir, main_run = Path(args.output_dir), records[0]
    write_json(output_dir / "metrics.json", {**main_run, "baseline": records[1] if len(records) > 1 else None})
    title = f"{task.name}: {main_run['model']}, {main_run['layers']} layers, batch {main_run['train_batch_size']}"
    plot_training(output_dir / "training.png", title, task.headline, curves)
    if len(records) > 1:
        print(comparison(records))
    print(f"model, metrics.json, history.json and training.png are in {output_dir}")
    if args.do_predict:
        print(f"{' and '.join(task.test_files)} for GLUE's server: in {output_dir / 'predictions'}")
    print(
        f"{task.name} {task.headline}: {main_run['metrics'][task.headline]:.3f} "
        f"({main_run['optimizer']}, {main_run['steps']} steps, {main_run['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
