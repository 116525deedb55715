"""Bytes of an optimizer's state, by part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .shards import local

# By the first word of a tensor's name; all else is part of a window.
_PART = {
    "indices": "indices",
    "error": "error",
    "momentum": "momentum",
    "exp": "momentum",
    "step": "momentum",
    "sum": "momentum",
    "first": "momentum",
    "second": "metric",
    "gram": "gram",
}


def count_bytes(states: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the tensors in some states, by part."""
    parts = dict.fromkeys(("indices", "values", "error", "momentum", "metric", "gram"), 0)
    for state in states:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                parts[_PART.get(name.partition("_")[0], "values")] += local(value).nbytes
    return {**parts, "total": sum(parts.values())}
