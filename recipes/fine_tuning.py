"""What the scripts share that train one model: the run and its baseline, and what they leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arguments import ModelArguments
from training import Measured, train, write_json

from hf_efcp import EFCPTrainer, EFCPTrainingArguments


def fine_tune(
    runs: Sequence[Any],
    task: Measured,
    splits: dict[str, Any],
    model: Any,
    source: ModelArguments,
    build: Callable[[Any, EFCPTrainingArguments], EFCPTrainer],
    write: Callable[[EFCPTrainer, Path], Sequence[str]],
    counts: dict[str, Any],
) -> None:
    """Train all runs from the same weights; write, draw and print what comes out.

    Args:
        runs: what `runs_of` returned, `EFCPTrainingArguments`.
        task: the task.
        splits: the tokenized datasets.
        model: the model that every run starts from; left as it is.
        source: where it came from.
        build: makes the trainer of a run.
        write: writes more files into the folder of a run, when its model has been trained, and names them.
        counts: what else belongs into the record of a run.
    """
    from plots import plot_training

    args = runs[0]
    records, curves, files = [], [], ["model", "metrics.json", "history.json", "training.png"]
    for run in runs:
        resume = checkpoint_of(run) if run is args else False
        # Every run starts from the same weights; Trainer seeds dropout and the order of the data.
        trainer = build(copy.deepcopy(model), run)
        record, history = train(trainer, task, splits, resume)
        trainer.save_model()
        layers = getattr(model.config, "num_hidden_layers", None)  # convolutions count in stages
        records.append({"model": source.model_name_or_path, "layers": layers, **record, **counts})
        curves.append((f"{record['optimizer']}, lr {record['learning_rate']:g}", history))
        if args.process_index == 0:
            write_json(Path(run.output_dir, "metrics.json"), records[-1])
            write_json(Path(run.output_dir, "history.json"), history)
        more = write(trainer, Path(run.output_dir))
        files += more if run is args else []
    if args.process_index > 0:
        return

    output_dir, main_run = Path(args.output_dir), records[0]
    write_json(output_dir / "metrics.json", {**main_run, "baseline": records[1] if len(records) > 1 else None})
    layers = f", {main_run['layers']} layers" if main_run["layers"] else ""
    title = f"{task.name}: {main_run['model']}{layers}, batch {main_run['train_batch_size']}"
    plot_training(output_dir / "training.png", title, task.headline, curves)
    if len(records) > 1:
        print(comparison(records))
    print(f"{', '.join(files[:-1])} and {files[-1]} are in {output_dir}")
    steps, before = main_run["steps"], main_run["resumed_from_step"]
    done = f"{steps} steps, {steps - before} of them in these" if before else f"{steps} steps,"
    print(
        f"{task.name} {task.headline}: {main_run['metrics'][task.headline]:.3f} "
        f"({main_run['optimizer']}, {done} {main_run['seconds']:.0f} s)"
    )


def checkpoint_of(args: EFCPTrainingArguments) -> bool | str:
    """Tell what a run resumes from.

    Args:
        args: its arguments; a flag gives the word "true" or "false", or a folder.

    Returns:
        The checkpoint's folder, or True for the newest one, or False.
    """
    word = args.resume_from_checkpoint or "false"
    return {"true": True, "false": False}.get(str(word).lower(), word)


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
