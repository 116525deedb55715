"""What the recipes share: loading a model and text, and one run of training with its numbers."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from arguments import PACKAGED, ModelArguments, model_source
from data import NO_HUB
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainerCallback,
)

import hf_efcp
from hf_efcp import EFCPTrainer, EFCPTrainingArguments
from hf_efcp.factory import EXCLUDE_LR, parse_optim_args
from hf_efcp.family import AnyOptimizer
from hf_efcp.glue import GlueTask, compute_metrics


class Measured(Protocol):
    """What `train` must know of a task."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def headline(self) -> str:
        """The metric that stands for the task in one line."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported."""

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """The splits to evaluate on."""


class InOrder(EFCPTrainer):
    """Evaluates and predicts in the order of the data; `train_sampling_strategy` would change that order as well."""

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, in order."""
        return self._in_order(super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, in order."""
        return self._in_order(super().get_test_dataloader, *args, **kwargs)

    def _in_order(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return make(*args, **kwargs)
        finally:
            self.args.train_sampling_strategy = strategy


class StepTimer(TrainerCallback):
    """Measure the time that training takes without evaluation, and add it to the log history as `seconds`."""

    def __init__(self) -> None:
        self.durations: list[float] = []
        self.resumed_from = 0  # the step, or 0

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """See where training begins: a checkpoint has been loaded by now."""
        self.resumed_from = state.global_step

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
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not task.regression:
        head = {"problem_type": "single_label_classification", "id2label": dict(enumerate(task.labels))}
        head["label2id"] = {label: number for number, label in enumerate(task.labels)}
    return load_pretrained(arguments, AutoModelForSequenceClassification, head)


def load_pretrained(arguments: ModelArguments, auto_model: Any, head: dict[str, Any]) -> tuple[Any, Any]:
    """Load a tokenizer and a model with a head, in float32.

    Args:
        arguments: which model, and how many of its layers.
        auto_model: the class that makes the model, such as AutoModelForSequenceClassification.
        head: what the model's configuration must say of the head.

    Returns:
        The tokenizer and the model.

    Raises:
        FileNotFoundError: if the model is a path that does not exist.
        OSError: if the model is neither a folder here nor found on the Hub.
        ValueError: if the model does not have so many layers, or its weights are not of the sizes that its
            configuration says.
    """
    name = arguments.model_name_or_path
    source = model_source(name)
    try:
        config = AutoConfig.from_pretrained(source, **head)
        layers = arguments.num_hidden_layers
        if layers is not None:
            if not 1 <= layers <= config.num_hidden_layers:
                raise ValueError(f"--num_hidden_layers must be in 1..{config.num_hidden_layers} for {name}: {layers}")
            config.num_hidden_layers = layers
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, loaded = auto_model.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except OSError as error:
        raise OSError(
            f"could not load {name}: it is no folder with a model here, and the Hub did not give it ({error}). "
            f"{NO_HUB}: --model_name_or_path FOLDER, or {PACKAGED}"
        ) from error
    others = [entry[0] for entry in loaded["mismatched_keys"]]
    if wrong := [key for key in others if key.startswith(f"{model.base_model_prefix}.")]:
        raise ValueError(f"{name} has weights of other sizes than its configuration says: {', '.join(wrong[:3])}")
    if others:
        print(f"the head of {name} is that of another task: it starts anew")
    return tokenizer, model


def tokenize(task: GlueTask, tokenizer: Any, splits: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Turn the text of every split into tokens; padding is left to the collator.

    Args:
        task: the task.
        tokenizer: the model's tokenizer.
        splits: the datasets that `load_splits` returned.
        max_length: longer texts are cut.

    Returns:
        The datasets, with the model's inputs only, and `labels` but in the task's test splits.

    Raises:
        ValueError: if the model cannot take so many tokens.
    """
    if not 1 <= max_length <= tokenizer.model_max_length:
        raise ValueError(f"--max_seq_length must be in 1..{tokenizer.model_max_length} for this model: {max_length}")

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {**tokenizer(*(batch[column] for column in task.text_columns), truncation=True, max_length=max_length)}

    def encode_labelled(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {**encode(batch), "labels": batch["label"]}

    return {
        name: split.map(
            encode if name in task.test_splits else encode_labelled,
            batched=True,
            remove_columns=split.column_names,
            desc=f"tokenize {name}",
        )
        for name, split in splits.items()
    }


def build_trainer(
    task: GlueTask, model: Any, tokenizer: Any, splits: dict[str, Any], args: EFCPTrainingArguments
) -> EFCPTrainer:
    """Put together what `train` trains.

    Args:
        task: the task.
        model: the model; it is trained in place.
        tokenizer: the model's tokenizer.
        splits: the tokenized datasets.
        args: the training arguments.

    Returns:
        A trainer that watches the task's metrics on its first validation split.
    """

    def metrics(output: EvalPrediction) -> dict[str, float]:
        return compute_metrics(task, decide(task, first_output(output.predictions)), output.label_ids)

    return InOrder(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits[task.validation_splits[0]],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )


def first_output(outputs: Any) -> Any:
    """Pick the logits from what Trainer collects of a model.

    Args:
        outputs: the logits, or a tuple that begins with them.

    Returns:
        The logits.
    """
    return outputs[0] if isinstance(outputs, tuple) else outputs


def decide(task: GlueTask, logits: Any) -> Any:
    """Turn logits into predictions.

    Args:
        task: the task.
        logits: an array with a row for each example.

    Returns:
        A class number for each row, or in regression a value.
    """
    return logits[:, 0] if task.regression else logits.argmax(-1)


def train(
    trainer: EFCPTrainer, task: Measured, splits: dict[str, Any], resume: bool | str = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, and evaluate on every validation split.

    Args:
        trainer: what `build_trainer` returned.
        task: the task.
        splits: the tokenized datasets.
        resume: the checkpoint to resume from, or True for the newest one, or False.

    Returns:
        The numbers of the run, and Trainer's log history. `seconds` are those of the steps after `resumed_from_step`.
    """
    timer = StepTimer()
    trainer.add_callback(timer)
    result = trainer.train(resume_from_checkpoint=resume)
    final: dict[str, float] = {}
    for split in task.validation_splits:  # eval_accuracy, and for the second set of mnli eval_mismatched_accuracy
        prefix = "eval" if split == task.validation_splits[0] else f"eval_{split.removeprefix('validation_')}"
        values = trainer.evaluate(splits[split], metric_key_prefix=prefix)
        final |= {f"{prefix}_{name}": values[f"{prefix}_{name}"] for name in (*task.metrics, "loss")}
    args: Any = trainer.args
    model: Any = trainer.model
    optimizer: torch.optim.Optimizer = trainer.optimizer.optimizer  # type: ignore[union-attr]  # in Accelerate's wrapper
    record = {
        "task": task.name,
        "headline": task.headline,
        "metrics": {key.removeprefix("eval_"): value for key, value in final.items()},
        "optimizer": args.optim.value if isinstance(args.optim, Enum) else args.optim,
        **(_settings(args, optimizer) if timer.resumed_from == 0 else _settings_of_checkpoint(args, optimizer)),
        "optimizer_memory": _memory(optimizer),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "resumed_from_step": timer.resumed_from,
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


def _settings(args: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "learning_rate": args.learning_rate,
        "optim_args": args.optim_args,
        "optimizer_arguments": {**optimizer.defaults, "weight_decay": args.weight_decay},
    }


def _settings_of_checkpoint(args: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings in the groups, which a checkpoint brings; `optim_args` is None if they are not what it says."""
    groups = sorted(optimizer.param_groups, key=lambda group: not group.get("preconditioned", True))
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]  # before the schedule
    own = {key: groups[0].get(key, value) for key, value in optimizer.defaults.items()}
    same = all(own[key] == value for key, value in optimizer.defaults.items() if key not in ("lr", "weight_decay"))
    own |= {"lr": rates[0], "weight_decay": max(group.get("weight_decay", 0.0) for group in groups)}
    if not groups[-1].get("preconditioned", True):
        own["exclude_lr"] = rates[-1]
        same = same and rates[-1] == parse_optim_args(args.optim, args.optim_args).get("exclude_lr", EXCLUDE_LR)
    return {
        "learning_rate": rates[0],
        "optim_args": args.optim_args if same else None,
        "optimizer_arguments": own,
    }


def _memory(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    if isinstance(optimizer, AnyOptimizer):
        return optimizer.memory()
    return {"total": state_bytes(optimizer)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state of any optimizer; a tensor that parameters share counts once.

    Args:
        optimizer: the optimizer.

    Returns:
        The bytes.
    """
    found = {id(tensor): tensor.nbytes for state in optimizer.state.values() for tensor in _tensors(state)}
    return sum(found.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    # Also those in lists and in objects such as GaLore's projectors, and those that a quantized tensor is made of.
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def write_json(path: Path, content: Any) -> None:
    """Write JSON that every reader accepts.

    Args:
        path: the file.
        content: what `to_json` takes.
    """
    path.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def to_json(content: Any, indent: int | None = None) -> str:
    """Spell content as JSON that every reader accepts.

    Args:
        content: dicts and lists; numbers that are not finite become null, what JSON does not know its `str`.
        indent: as in `json.dumps`; None makes one line.

    Returns:
        The text.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent, default=str, allow_nan=False)
