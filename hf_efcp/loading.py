"""Loading what `state_dict()` returned: what does not fit is refused before anything has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import adamw, checks
from .layout import Layout, State
from .leaves import Group, ParamRef


def saved_states(state_dict: dict[str, Any], refs: list[ParamRef]) -> list[tuple[ParamRef, State]]:
    """The states of a checkpoint, with the parameters that they belong to.

    Args:
        state_dict: Of an optimizer with the same groups.
        refs: The parameters, in the order of the groups.

    Returns:
        Each parameter that has a saved state, in the checkpoint's group, with AdamW's moments in float32.
    """
    saved_groups = state_dict["param_groups"]
    keys = [(key, group) for group in saved_groups for key in group["params"]]
    return [
        (ref._replace(group=group), adamw.widened(state_dict["state"][key], ref.param))
        for (key, group), ref in zip(keys, refs, strict=True)
        if state_dict["state"].get(key)
    ]


def check(
    saved: list[tuple[ParamRef, State]], layout: Layout, by_layer: bool, name: Callable[[torch.Tensor], str]
) -> None:
    """Refuse states that do not fit.

    Args:
        saved: From `saved_states`.
        layout: What they should be made of.
        by_layer: Each parameter has a Gram matrix of its own.
        name: What to call a parameter.

    Raises:
        ValueError: One does not fit.
    """
    for ref, state in saved:
        layout.check(state, ref, name(ref.param))
    windows = [state for ref, state in saved if ref.group["preconditioned"]]
    checks.check_gram_states(windows, layout.gram_state("meta"), by_layer)


def warn_of_changes(saved_groups: list[Group], groups: list[Group], tunable: tuple[str, ...]) -> None:
    """Warn of settings that a checkpoint replaces.

    Args:
        saved_groups: The checkpoint's groups.
        groups: The optimizer's.
        tunable: Names of the preconditioner's settings.
    """
    given = (checks.HEAVY_BALL, "weight_decay", "decoupled_weight_decay")
    names = [*(name for name in given if name in groups[0]), *tunable]
    if changed := checks.changed_settings(saved_groups, groups, names):
        warnings.warn(
            "the settings of the checkpoint are taken, as in every torch.optim.Optimizer, and not those that were "
            f"given: {', '.join(changed)}. To use yours, set them in optimizer.param_groups after loading "
            "(momentum is called heavy_ball there)",
            stacklevel=3,
        )


def copied(name: str, value: Any, param: torch.Tensor) -> Any:
    """A copy of a saved value, on the device where it belongs.

    Args:
        name: Its name in the state.
        value: A tensor, or a number, which is returned as it is.
        param: The parameter.

    Returns:
        The copy.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("cpu" if name in ("gram", "step") else param.device, copy=True)
