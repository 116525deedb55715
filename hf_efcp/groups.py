"""Parameter groups: how settings stand in them, and what parameters are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .checks import HEAVY_BALL
from .leaves import Group


def plain(settings: Mapping[str, Any]) -> Group:
    """Settings as they stand in the parameter groups: torch.distributed.checkpoint takes no dtypes there."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in settings.items()
    }


def renamed(group: Group) -> Group:
    """A group as it was given, with its momentum under the name that it has in `param_groups`.

    Args:
        group: The group.

    Returns:
        The same group, or a copy.

    Raises:
        ValueError: It has both names.
    """
    if "momentum" not in group:
        return group
    if HEAVY_BALL in group:
        raise ValueError(f"a group has both momentum={group['momentum']} and {HEAVY_BALL}: give momentum alone")
    return {HEAVY_BALL if name == "momentum" else name: value for name, value in group.items()}


def with_names(group: Group, others: list[Group]) -> Group:
    """A group with names for its parameters if other groups have names: torch wants all or none.

    Args:
        group: The new group.
        others: The groups before it.

    Returns:
        The same group, or a copy.
    """
    params = group["params"]
    if isinstance(params, torch.Tensor):
        params = [params]
    if isinstance(params, set) or not any("param_names" in other for other in others):
        return group
    params, number = list(params), len(others)
    if any(isinstance(param, tuple) for param in params):
        return {**group, "params": params}
    return {**group, "params": [(f"parameter {place} of group {number}", p) for place, p in enumerate(params)]}


def name_of(param: torch.Tensor, groups: list[Group]) -> str:
    """What to call a parameter.

    Args:
        param: The parameter.
        groups: All groups.

    Returns:
        Its name if it has one, else its place and shape.

    Raises:
        KeyError: It is in none of the groups.
    """
    for number, group in enumerate(groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is param:
                if "param_names" in group:
                    return str(group["param_names"][position])
                return f"parameter {position} of group {number} (shape {tuple(param.shape)})"
    raise KeyError("not a parameter of this optimizer")
