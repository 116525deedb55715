"""Hyperparameters that may change during training: a number, or a function of the number of steps so far."""

from __future__ import annotations

from collections.abc import Callable

Schedule = float | Callable[[int], float]


def split(**values: Schedule) -> tuple[dict[str, float], dict[str, Callable[[int], float]]]:
    """Tell numbers and functions apart.

    Args:
        **values: Numbers or functions, by name.

    Returns:
        Every value at step 0, and the functions.
    """
    schedules = {name: value for name, value in values.items() if callable(value)}
    numbers = {name: float(value(0)) if callable(value) else value for name, value in values.items()}
    return numbers, schedules
