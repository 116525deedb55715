"""One task of a comparison of optimizers: single runs on it, and the settings that decide their results."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import load_splits
from peers import PEERS, PeerFactory
from plan import ComparisonArguments, Contender, Plan
from training import build_trainer, load_model, tokenize, train
from transformers import PrinterCallback, set_seed

from hf_efcp import OPTIMIZERS, EFCPTrainingArguments
from hf_efcp.checks import HEAVY_BALL
from hf_efcp.factory import efcp_name, parse_optim_args
from hf_efcp.family import AnyOptimizer
from hf_efcp.glue import GlueTask

# What a run's result does not depend on; all other training arguments that are not at their default are in its key.
# Evaluation on the way is there too: it draws from the random numbers that dropout draws from.
NOT_IN_KEY = {
    *("optim", "optim_args", "learning_rate", "seed", "output_dir", "report_to", "disable_tqdm", "run_name"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
    *("save_strategy", "save_total_limit", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory"),
}
HOLDOUT = "selection"
# What parameter groups hold beside an optimizer's own settings.
_OF_GROUPS = {"params", "lr", "weight_decay", "preconditioned", "skipped_steps", "efcp_format", "projected", "given_lr"}


class Bench:
    """One task: its data, and the weights that the runs with a seed start from.

    Args:
        plan: the plan.
        task: the task.
    """

    def __init__(self, plan: Plan, task: GlueTask) -> None:
        self.plan, self.task = plan, task
        self._splits = load_splits(task, _data_dir(plan.comparison, task))
        if plan.comparison.holdout:
            self._splits |= hold_out(self._splits["train"], plan.comparison.holdout, plan.comparison.holdout_max)
        self._digest = _digest(task, self._splits)
        self._tokenized: dict[str, Any] | None = None
        self._seed: int | None = None
        self._keys: dict[tuple[str, float, int], dict[str, Any]] = {}

    def key(self, contender: Contender, learning_rate: float, seed: int) -> dict[str, Any]:
        """Collect what decides the result of a run.

        Args:
            contender: the optimizer.
            learning_rate: its learning rate.
            seed: the seed.

        Returns:
            The settings by name; paths of data are not among them, but a digest of the data is, and one of the files
            of a model in a local folder.
        """
        place = (contender.label, learning_rate, seed)
        if place not in self._keys:
            files = self.plan.model_digest
            self._keys[place] = {
                "task": self.task.name,
                "data": self._digest,
                "max_seq_length": self.plan.comparison.max_seq_length,
                "model": self.plan.model.model_name_or_path,
                **({} if files is None else {"model_files": files}),
                "layers": self.plan.model.num_hidden_layers,
                **_optimizer_settings(contender),
                "learning_rate": learning_rate,
                "seed": seed,
                "arguments": _other_settings(contender.args),
            }
        return self._keys[place]

    def run(self, contender: Contender, learning_rate: float, seed: int) -> dict[str, Any]:
        """Train once.

        Args:
            contender: the optimizer.
            learning_rate: its learning rate.
            seed: the seed.

        Returns:
            What is kept of the run, or the message in `failed`.
        """
        start = time.perf_counter()
        self._prepare(seed)
        run: dict[str, Any] = {"key": self.key(contender, learning_rate, seed), "label": contender.label}
        args = dataclasses.replace(contender.args, learning_rate=learning_rate, seed=seed)
        try:
            trainer = build_trainer(self.task, copy.deepcopy(self._model), self._tokenizer, self._tokenized or {}, args)
            if contender.peer:
                own = {"lr": learning_rate, "weight_decay": args.weight_decay, **contender.options}
                factory: Any = PeerFactory  # the annotation knows of classes only
                trainer.optimizer_cls_and_kwargs = factory, {"name": contender.peer, **own}
            trainer.remove_callback(PrinterCallback)  # what Trainer has in the place of its bars
            record, history = train(trainer, self.task, self._tokenized or {})
            if self.plan.comparison.holdout:
                held_out = trainer.evaluate((self._tokenized or {})[HOLDOUT], metric_key_prefix=HOLDOUT)
                record["selection_loss"] = held_out[f"{HOLDOUT}_loss"]
                record["selection_metric"] = held_out[f"{HOLDOUT}_{self.task.headline}"]
            # Evaluation and preparation included: for the estimate of the remaining time.
            run |= {"model": self.plan.model.model_name_or_path, "layers": self._model.config.num_hidden_layers}
            if contender.peer:
                text = ",".join(f"{key}={value}" for key, value in contender.options.items())
                record |= {"optimizer": contender.peer, "optim_args": text or None}
            run |= {**record, "history": _compact(history), "all_seconds": time.perf_counter() - start}
        except Exception as error:  # whatever it is, the others can go on
            run["failed"] = f"{type(error).__name__}: {error}"
        gc.collect()  # a Trainer is part of a cycle, and keeps the optimizer's window alive
        return run

    def _prepare(self, seed: int) -> None:
        if seed == self._seed:
            return
        set_seed(seed)  # the new head's weights
        self._tokenizer, self._model = load_model(self.plan.model, self.task)
        self._seed = seed
        if self._tokenized is None:
            length = self.plan.comparison.max_seq_length
            self._tokenized = tokenize(self.task, self._tokenizer, self._splits, length)


def hold_out(train: Any, part: float, most: int) -> dict[str, Any]:
    """Divide a training split: by one permutation, whatever the seed, so that all runs train on the same examples.

    Args:
        train: the dataset.
        part: of it that is kept out of training, rounded up.
        most: but no more examples than these.

    Returns:
        `train`, what is left of it in its own order, and `HOLDOUT`.

    Raises:
        ValueError: if nothing is left to train on.
    """
    count = min(math.ceil(part * len(train)), most)
    if count >= len(train):
        raise ValueError(f"a holdout of {part:g} leaves none of {len(train)} examples to train on: take less of them")
    order = list(range(len(train)))
    random.Random(0).shuffle(order)
    return {"train": train.select(sorted(order[count:])), HOLDOUT: train.select(sorted(order[:count]))}


def _data_dir(arguments: ComparisonArguments, task: GlueTask) -> str | None:
    if arguments.data_dir is None or len(arguments.tasks) == 1:
        return arguments.data_dir
    folder = Path(arguments.data_dir, task.name)
    if folder.is_dir():
        return str(folder)
    if task.name == "rotten_tomatoes":  # comes with the demo extra
        return None
    raise FileNotFoundError(f"with several tasks, --data_dir must have a folder for each: there is no {folder}")


def _digest(task: GlueTask, splits: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        for column in (*task.text_columns, "label"):
            digest.update(json.dumps([name, column, list(split[column])]).encode())
    return digest.hexdigest()[:16]


def _optimizer_settings(contender: Contender) -> dict[str, Any]:
    if contender.peer:
        return {"optimizer": contender.peer, "options": {**PEERS[contender.peer].defaults, **contender.options}}
    args = contender.args
    name = efcp_name(args.optim)
    if name is None:
        options = dict(option.strip().split("=") for option in (args.optim_args or "").split(",") if option.strip())
        return {"optimizer": args.optim, "options": options}
    options = parse_optim_args(name, args.optim_args)
    options.pop("backend", None)  # changes no more than the time
    # As an optimizer spells them out, with defaults that hang on other options and may be others in another version.
    make: Callable[..., AnyOptimizer] = OPTIMIZERS[name]
    of_the_model = ("exclude", "exclude_lr", "memory_budget")
    own = {key: value for key, value in options.items() if key not in of_the_model}
    (group,) = make([torch.nn.Parameter(torch.zeros(1))], **own).param_groups
    named = {"momentum" if key == HEAVY_BALL else key: value for key, value in group.items()}
    options |= {key: value for key, value in named.items() if key not in _OF_GROUPS}
    if "memory_budget" in options:  # which chooses the window
        del options["num_grads"]
    return {"optimizer": name, "options": options}


def _other_settings(args: EFCPTrainingArguments) -> dict[str, Any]:
    untyped: list[Any] = [args, EFCPTrainingArguments(output_dir=args.output_dir)]
    given, defaults = (arguments.to_dict() for arguments in untyped)
    return {key: value for key, value in given.items() if value != defaults[key] and key not in NOT_IN_KEY}


def _compact(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in history:
        kept = {key: value for key, value in row.items() if key in ("step", "seconds", "loss", "grad_norm")}
        kept |= {key: value for key, value in row.items() if key.startswith("eval_") and not key.endswith("_second")}
        kept.pop("eval_runtime", None)
        rows.append({key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in kept.items()})
    return [row for row in rows if len(row) > 2]  # the last one is Trainer's summary
