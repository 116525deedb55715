"""What is refused of the settings of a projected optimizer, and of checkpoints that others have written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .. import checks
from ..base import FORMAT


def check_group(
    group: Mapping[str, Any],
    shared: Mapping[str, Any],
    kinds: Mapping[str, Any],
    positive: Iterable[str],
    fractions: Iterable[str],
) -> None:
    """Refuse settings of a group that are out of range or that differ where they may not.

    Args:
        group: The group, complete.
        shared: Settings that belong to the optimizer as a whole.
        kinds: What each setting should be: bool, int or float.
        positive: Settings that must be above 0.
        fractions: Settings in [0, 1).

    Raises:
        TypeError: One of them is of another type.
        ValueError: One of them is out of range, or differs; or the learning rate is a tensor on a device.
    """
    checks.check_kinds(group, kinds)
    checks.check_rate(group["lr"])
    for name, kind in kinds.items():
        value = group[name]
        if name in fractions:
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        elif name in positive:
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        elif kind is float and not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        elif kind is int and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    for name, value in shared.items():
        if group[name] != value:
            raise ValueError(
                f"{name} is one value for all parameter groups: it is {value}, but a group says {group[name]}. Give it "
                "to the optimizer, or change it in every group"
            )


def check_writer(saved_groups: list[dict[str, Any]], settings: Iterable[str], reader: str) -> None:
    """Refuse a checkpoint that another optimizer has written.

    Args:
        saved_groups: `param_groups` of the checkpoint.
        settings: The names that every group of this optimizer has.
        reader: Its class.

    Raises:
        ValueError: Another optimizer has written it.
    """
    for saved in saved_groups:
        writer = saved.get("projected", reader)
        if writer != reader:
            raise ValueError(
                f"the checkpoint was written by {writer}, and this optimizer is {reader}, whose state is another. "
                "Resume with the optimizer that wrote it, or load the model alone and start this one afresh (with "
                "Trainer, without resume_from_checkpoint)"
            )
    checks.check_writer(saved_groups, settings, FORMAT, reader)
