"""What a model card says of the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .. import __version__
from ..family import AnyOptimizer
from ..shards import local

_TAG = "hf_efcp"
_PAPER = ("EFCP", "https://arxiv.org/abs/2306.06098")
# Of a group, what is no setting; rates are told as they were before the schedule.
_NO_SETTINGS = {"params", "preconditioned", "skipped_steps", "efcp_format", "projected", "lr", "initial_lr", "given_lr"}


def learning_rate(optimizer: AnyOptimizer) -> float:
    """Return the learning rate of the preconditioned parameters, before any schedule.

    Args:
        optimizer: The optimizer.

    Returns:
        That of the first group, if there are several.
    """
    return _rate(_preconditioned(optimizer)[0])


def add_optimizer(file: Path, optimizer: AnyOptimizer) -> None:
    """Write our tag into a card, and a section on the optimizer before the versions at its end.

    Args:
        file: The card, which has no such section yet.
        optimizer: The optimizer.
    """
    card = ModelCard.load(file)
    tags = card.data.tags or []
    card.data.tags = tags if _TAG in tags else [*tags, _TAG]
    before, versions, after = card.text.partition("\n### Framework versions")
    card.text = f"{before.rstrip()}\n\n### Optimizer\n\n{describe(optimizer)}\n{versions}{after}"
    card.save(file)


def describe(optimizer: AnyOptimizer) -> str:
    """Describe an optimizer in Markdown: its class, settings, bytes and where it comes from.

    Args:
        optimizer: The optimizer.

    Returns:
        A paragraph and a list.
    """
    groups = _preconditioned(optimizer)
    excluded = [group for group in optimizer.param_groups if not group["preconditioned"]]
    bytes_each = optimizer.planned_memory()["total"] / max(1, _numel(optimizer.param_groups))
    title, link = getattr(optimizer, "paper", _PAPER)
    lines = [
        f"`{type(optimizer).__name__}` of hf_efcp {__version__}, an implementation of [{title}]({link}), with "
        f"{bytes_each:.2f} bytes of state per parameter and these settings:",
        "",
        f"- lr: {_values([_rate(group) for group in groups])}",
        *(f"- {key}: {_values([group[key] for group in groups])}" for key in groups[0] if key not in _NO_SETTINGS),
    ]
    if excluded:
        rates = _values([_rate(group) for group in excluded])
        lines.append(f"- not preconditioned: {_numel(excluded):,} parameters, stepped as AdamW would at lr {rates}")
    return "\n".join(lines)


def _preconditioned(optimizer: AnyOptimizer) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group["preconditioned"]] or optimizer.param_groups


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _numel(groups: list[dict[str, Any]]) -> int:
    # Of this process, as are the bytes.
    return sum(local(param).numel() for group in groups for param in group["params"] if param.requires_grad)


def _values(values: list[Any]) -> str:
    # Groups may differ, in weight decay for example.
    return " or ".join(dict.fromkeys(str(value) for value in values))
