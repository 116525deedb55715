"""What a comparison of optimizers is asked to do: its YAML and command line, read and checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import ablations  # noqa: F401  # whose optimizers have names then
from arguments import DEFAULTS, PACKAGED, ModelArguments, TextArguments
from cli import parse_arguments, suggestions
from peers import PEERS, parse_options
from transformers import Trainer

from hf_efcp import EFCPTrainingArguments
from hf_efcp.factory import efcp_name
from hf_efcp.glue import get_task

# What an optimizer that is left out where it is not installed needs, by a part of its name.
_NEEDS = {
    "galore": ("galore_torch", "bitsandbytes"),  # which the first imports, whatever is asked of it
    "bnb": ("bitsandbytes",),
    **{name: (peer.module,) for name, peer in PEERS.items()},
}
# What `from_pretrained` makes a model and a tokenizer of.
_MODEL_FILES = (
    *("config.json", "*.safetensors", "pytorch_model*.bin", "*.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
)
COMMON_DEFAULTS = {**DEFAULTS, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
ELSEWHERE = {
    "seed": "search_seed and seeds",
    "learning_rate": "learning_rates under optimizers",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), "it under optimizers"),
    **dict.fromkeys(("save_strategy", "resume_from_checkpoint", "do_predict"), "run_glue.py: no model is stored"),
    "disable_tqdm": "nothing: there is one line per run",
    "efcp_diagnostics_steps": "run_glue.py, which keeps all that is logged",
}


@dataclasses.dataclass(kw_only=True)
class ComparisonArguments(TextArguments):
    """What to compare on."""

    tasks: list[str] = dataclasses.field(metadata={"help": "GLUE tasks such as sst2, or rotten_tomatoes"})
    seeds: list[int] = dataclasses.field(metadata={"help": "the seeds that the results are averaged over"})
    search_seed: int = dataclasses.field(default=42, metadata={"help": "the seed that all learning rates are tried on"})
    every_rate: bool = dataclasses.field(
        default=False, metadata={"help": "train with every learning rate and every seed, not with the best rate only"}
    )
    holdout: float = dataclasses.field(
        default=0.0, metadata={"help": "keep this part of the training split out of training, for selection_loss"}
    )
    holdout_max: int = dataclasses.field(default=2000, metadata={"help": "but at most so many examples"})
    select_by: str = dataclasses.field(
        default="metric",
        metadata={
            "help": "what chooses the learning rate: the validation split's metric, or the loss on the holdout",
            "choices": ["metric", "selection_loss"],
        },
    )


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer of the comparison, with its settings but for learning rate and seed in `args`.

    `peer` is a key of `PEERS`, of which `args.optim` knows nothing; its options are in `options`.
    """

    label: str
    args: EFCPTrainingArguments
    learning_rates: tuple[float, ...]
    peer: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stock(self) -> bool:
        """Whether it is none of EFCP's."""
        return self.peer is not None or efcp_name(self.args.optim) is None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the command line and the YAML ask for; `skipped` says what is left out, and why."""

    comparison: ComparisonArguments
    model: ModelArguments
    output_dir: Path
    contenders: tuple[Contender, ...]
    skipped: tuple[str, ...]

    @functools.cached_property
    def model_digest(self) -> str | None:
        """A digest of the model's files, if it is a local folder, in which others may be put; None if it is not."""
        name = self.model.model_name_or_path
        folder = Path(name).expanduser()
        if name == PACKAGED or not folder.is_dir():
            return None
        digest = hashlib.sha256()
        for file in sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)}):
            with file.open("rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()[:16]


def read_plan(argv: list[str]) -> Plan:
    """Read the command line and the YAML, and check everything that can be checked before the first run.

    Args:
        argv: the command line without the program's name.

    Returns:
        The plan.

    Raises:
        ValueError: if a task, an optimizer or a list of numbers is not valid.
    """
    comparison, model, args, entries = parse_arguments(
        (ComparisonArguments, ModelArguments, EFCPTrainingArguments), argv, COMMON_DEFAULTS, ("optimizers",), ELSEWHERE
    )
    for name, values in (("tasks", comparison.tasks), ("seeds", comparison.seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must have one or more values, each once: {values}")
    for task in comparison.tasks:
        get_task(task)
    _check_selection(comparison)
    contenders, skipped = [], []
    for label, entry in entries.items():
        if missing := _missing(entry):
            skipped.append(f"{label} is left out: {missing} is not installed")
        else:
            contenders.append(_read_contender(label, entry, args))
    if not contenders:
        raise ValueError(f"no optimizer is left to run: {'; '.join(skipped)}")
    return Plan(comparison, model, Path(args.output_dir), tuple(contenders), tuple(skipped))


def _check_selection(comparison: ComparisonArguments) -> None:
    if not 0.0 <= comparison.holdout < 1.0:
        raise ValueError(f"holdout is a part of the training split, at least 0 and below 1: {comparison.holdout}")
    if comparison.holdout_max < 1:
        raise ValueError(f"holdout_max must be at least 1: {comparison.holdout_max}")
    if comparison.select_by == "selection_loss" and comparison.holdout == 0.0:
        raise ValueError("select_by: selection_loss needs a holdout to take the loss of, such as holdout: 0.1")


def _missing(entry: Any) -> str | None:
    optim = str(entry.get("optim")) if isinstance(entry, dict) else ""
    if efcp_name(optim) is not None:
        return None
    needed = [module for name, modules in _NEEDS.items() if name in optim for module in modules]
    return next((module for module in needed if not _installed(module)), None)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _read_contender(label: str, entry: Any, common: EFCPTrainingArguments) -> Contender:
    keys = ["optim", "learning_rates", "optim_args", "optim_target_modules"]
    if not isinstance(entry, dict) or not {"optim", "learning_rates"} <= set(entry):
        raise ValueError(f"optimizer {label!r} must be a mapping with the keys optim and learning_rates, got {entry!r}")
    for key in entry:
        if key not in keys:
            raise ValueError(f"optimizer {label!r} has the unknown key {key!r}; {suggestions(key, keys)}")
    given = {key: value for key, value in entry.items() if key != "learning_rates"}
    try:
        rates = tuple(float(rate) for rate in entry["learning_rates"])
        if not rates or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise ValueError("they must be positive, and each once")
    except (TypeError, ValueError) as error:
        raise ValueError(f"learning_rates of {label!r} must be a list of numbers: {error}") from error
    try:
        if given["optim"] in PEERS:
            return _read_peer(label, given, common, rates)
        args = dataclasses.replace(common, **given, learning_rate=rates[0])
        _refuse_ignored_options(args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {label!r}: {error}") from error
    return Contender(label, args, rates)


def _read_peer(label: str, given: dict[str, Any], common: EFCPTrainingArguments, rates: tuple[float, ...]) -> Contender:
    if "optim_target_modules" in given:
        raise ValueError(f"optim_target_modules has no effect on {given['optim']}")
    options = parse_options(given.get("optim_args", ""))
    PEERS[given["optim"]].check(options)
    args = dataclasses.replace(common, optim="adamw_torch", optim_args=None, learning_rate=rates[0])
    return Contender(label, args, rates, given["optim"], options)


def _refuse_ignored_options(args: EFCPTrainingArguments) -> None:
    # Of a stock optimizer, Trainer passes on the options it knows and drops the others without a word.
    if efcp_name(args.optim) or not args.optim_args or args.optim_target_modules:  # those with targets need a model
        return
    without = Trainer.get_optimizer_cls_and_kwargs(dataclasses.replace(args, optim_args=None))
    for option in args.optim_args.split(","):
        if option.count("=") != 1:
            raise ValueError(f"expected key=value in optim_args, got {option!r}")
        if Trainer.get_optimizer_cls_and_kwargs(dataclasses.replace(args, optim_args=option)) == without:
            raise ValueError(f"{option!r} in optim_args has no effect")
