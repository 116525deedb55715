"""The largest window that a memory budget has room for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

FORMS = '"8B/param" (bytes per trainable parameter), "300MB", "2GiB", or a positive int of bytes'
# Powers of 1000, and with an i of 1024; as everywhere else, a small b would be bits.
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), 1)}
_UNITS |= {f"{prefix}B": 1024**power for power, prefix in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)}


class Default(int):
    """A `num_grads` that nobody asked for: a number in the signature, which gives way to a `memory_budget`."""


def capacity(num_grads: int | None, memory_budget: int | str | None) -> int:
    """The capacity of a window, as it was asked for.

    Args:
        num_grads: The argument; None where there is a budget.
        memory_budget: The argument; None without one.

    Returns:
        `num_grads`; 1 until it is known what there is to fit into a budget.

    Raises:
        ValueError: Both are given, or it is below 1.
        TypeError: `num_grads` is not an int.
    """
    if memory_budget is not None:
        if not isinstance(num_grads, Default | None):
            raise ValueError(
                f"num_grads={num_grads!r} and memory_budget={memory_budget!r} both choose the window: give one"
            )
        return 1
    if not isinstance(num_grads, int) or isinstance(num_grads, bool):
        raise TypeError(f"num_grads must be an int, got {num_grads!r}")
    if num_grads < 1:
        raise ValueError(f"num_grads is the number of gradients in the window, at least 1; got {num_grads}")
    return int(num_grads)


def in_bytes(memory_budget: int | str, parameters: int) -> int:
    """A budget in bytes.

    Args:
        memory_budget: Bytes, or text: a number and one of B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB
            (powers of 1024) or nothing for bytes, and "/param" where it is meant per parameter.
        parameters: How many trainable parameters there are.

    Returns:
        The bytes, rounded down.

    Raises:
        ValueError: It is neither.
    """
    text = str(memory_budget) if type(memory_budget) is int else memory_budget  # a bool is an int, but no budget
    form = r"([0-9]+)(?:\.([0-9]+))? *([A-Za-z]*)(/param)?"
    if isinstance(text, str) and (match := re.fullmatch(form, text.strip())):
        whole, decimals, unit, each = match.group(1), match.group(2) or "", match.group(3), match.group(4)
        number, scale = int(whole + decimals), int(10 ** len(decimals))  # floating point would round
        if number and unit in _UNITS and (unit or not each):
            return number * _UNITS[unit] * (parameters if each else 1) // scale
    raise ValueError(
        f"memory_budget must be {FORMS}, with B, kB, MB, GB, TB for powers of 1000 and KiB, MiB, GiB, TiB for powers "
        f"of 1024; got {memory_budget!r}"
    )


def fit(memory_budget: int | str, parameters: int, plan: Callable[[int], dict[str, int]]) -> int:
    """The largest `num_grads` that fits.

    Nothing is searched: Gram matrices take `num_grads^2` times what they take for one row, and all else is linear in
    `num_grads`, so that two plans tell every other.

    Args:
        memory_budget: The budget, see `in_bytes`.
        parameters: How many trainable parameters there are.
        plan: Bytes of all state by part, with `gram` and `total`, for a `num_grads`.

    Returns:
        It.

    Raises:
        ValueError: The budget cannot be read, is too small for a single row, or nothing depends on it.
    """
    limit = in_bytes(memory_budget, parameters)
    one, two = plan(1), plan(2)
    square = one["gram"]
    # What does not depend on the window, by part, and what a row takes.
    fixed = {part: 2 * size - two[part] for part, size in one.items() if part not in ("gram", "total")}
    always = sum(fixed.values())
    row = one["total"] - square - always
    if not row:
        raise ValueError(
            "memory_budget chooses the window of preconditioned parameters, but none of them requires a gradient: give "
            "num_grads"
        )
    if one["total"] > limit:
        parts = ", ".join(f"{part} {size:,}" for part, size in fixed.items() if size)
        raise ValueError(
            f"memory_budget={memory_budget!r} is {limit:,} bytes for {parameters:,} parameters, but a window of one "
            f"gradient takes {one['total']:,}: {row + square:,} for the row, and {always:,} whatever num_grads is "
            f"({parts or 'nothing'}). Raise the budget, or lower what the optimizer has of these: density or rank, "
            "momentum, error_dtype (torch.int8 or torch.uint4), value_dtype (torch.int8); or keep less of the metric: "
            'metric="factored", metric_dtype (torch.bfloat16 or torch.int8), precondition="row"'
        )
    if not square:
        return (limit - always) // row
    return (math.isqrt(row * row + 4 * square * (limit - always)) - row) // (2 * square)
