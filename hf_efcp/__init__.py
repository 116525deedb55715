"""Compressed full-matrix preconditioners with error feedback (EFCP) for PyTorch and Hugging Face Transformers.

Nothing here imports transformers or numba until it is used: the names that need them are resolved on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import projected, variants
from .memory import MemoryPlan, estimate_memory, largest_window
from .optimizer import EFCP
from .projected import *  # noqa: F403  # what the package has a name for
from .variants import *  # noqa: F403

if TYPE_CHECKING:
    from .factory import OPTIMIZERS, create_optimizer
    from .trainer.any_trainer import for_trainer
    from .trainer.callbacks import EFCPCallback
    from .trainer.trainer import EFCPTrainer
    from .trainer.training_args import EFCPTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "EFCP",
    "OPTIMIZERS",
    "EFCPCallback",
    "EFCPTrainer",
    "EFCPTrainingArguments",
    "MemoryPlan",
    "create_optimizer",
    "estimate_memory",
    "for_trainer",
    "largest_window",
]
__all__ += projected.__all__
__all__ += variants.__all__

_LAZY = {
    "OPTIMIZERS": "factory",
    "create_optimizer": "factory",
    "for_trainer": "trainer.any_trainer",
    "EFCPCallback": "trainer.callbacks",
    "EFCPTrainer": "trainer.trainer",
    "EFCPTrainingArguments": "trainer.training_args",
}


def __getattr__(name: str) -> Any:
    """Import a name that needs transformers when it is first asked for (PEP 562).

    Args:
        name: The name.

    Returns:
        What it names.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
