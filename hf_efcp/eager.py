"""What torch.compile is to leave alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def never_compiled(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Have `torch.compile` run a method as it is: it would trace the loops over tensors, and fail at numba's tables."""
    disabled: Callable[[Any], None] | None = None  # made late, for it imports the compiler, which takes seconds

    @wraps(function)
    def inner(self: Any) -> None:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        disabled(self)

    return inner
