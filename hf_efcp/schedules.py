"""Dampening: a number, a function of the number of steps so far, or relative to the window."""

from __future__ import annotations

from collections.abc import Callable

Schedule = float | Callable[[int], float]


def dampening(
    name: str, absolute: Schedule | None, relative: float
) -> tuple[dict[str, float], dict[str, Callable[[int], float]]]:
    """The two hyperparameters of a preconditioner that a variant's `damp` or `eps` stands for.

    Args:
        name: "damp" or "eps".
        absolute: In the units of the gradients; None for none.
        relative: To the rows of the window; counts where there is no absolute one.

    Returns:
        The value at step 0 and the relative one, one of them 0, and the function if there is one.
    """
    if absolute is None:
        return {name: 0.0, f"relative_{name}": relative}, {}
    schedules = {name: absolute} if callable(absolute) else {}
    value = float(absolute(0)) if callable(absolute) else absolute
    return {name: value, f"relative_{name}": 0.0}, schedules
