"""What an optimizer will cost, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .optimizer import EFCP
from .variants import SparseMFAC


def estimate_memory(
    model_or_params: torch.nn.Module | Iterable[Any], optimizer: type[EFCP] = SparseMFAC, **arguments: Any
) -> dict[str, int]:
    """Bytes of an optimizer's state, as its `memory()` will report them after the first step.

    Parameters that do not require a gradient cost nothing.

    Args:
        model_or_params: A model, or what would be given to the optimizer: parameters, named parameters or groups.
        optimizer: The optimizer's class.
        **arguments: The optimizer's own arguments.

    Returns:
        Bytes by part: `indices`, `values`, `error`, `momentum`, `gram` and their `total`.
    """
    params = model_or_params.parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    # The constructor completes the dictionaries that it is given.
    copies: Any = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
    return optimizer(copies, **arguments).planned_memory()
