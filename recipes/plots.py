"""The picture of a training run, and what pictures share."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from families import FAMILIES, MEMBERS, family
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 8.4  # inches: as wide as README.md and the site show a picture, so that its words stay readable
LEAST = 0.1  # of a metric: an axis that shows less would make noise look like a difference


def plot_training(path: Path, title: str, metric: str, runs: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Draw training loss and evaluation metric against steps.

    Args:
        path: the PNG file to write.
        title: the line above both panels.
        metric: the headline metric; it is logged as `eval_<metric>`.
        runs: for each curve, its name in the legend, which begins with that of the optimizer, and its log history.
    """
    # A Figure of its own, without pyplot: no display is needed and no global state is left behind.
    figure = Figure(figsize=(WIDTH, 4.2), dpi=150, layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    shown_metric = metric.replace("_", " ")
    drawn: list[str] = []
    for name, history in runs:
        kind = family(name.partition(",")[0])
        colour, (marker, dashes) = FAMILIES[kind][0], MEMBERS[drawn.count(kind) % len(MEMBERS)]
        drawn.append(kind)
        steps, losses = _series(history, "loss")
        loss_axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
        loss_axes.plot(steps, smooth(losses), color=colour, linewidth=2, linestyle=dashes)
        steps, values = _series(history, f"eval_{metric}")
        label = f"{name}: {shown_metric} {values[-1]:.3f}"
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linestyle": dashes}
        metric_axes.plot(steps, values, linewidth=2, label=label, **style)
    _label(loss_axes, "Training loss (light: as logged)", "loss per example")
    _label(metric_axes, "On the validation split", shown_metric)
    metric_axes.set_ylim(wide(metric_axes.get_ylim()))
    figure.suptitle(title, fontsize=13)
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(path)


def _series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = {row["step"]: row[key] for row in history if key in row}  # a step evaluated twice counts once
    return list(points), list(points.values())


def wide(limits: tuple[float, float]) -> tuple[float, float]:
    """The limits of an axis of a metric, at least `LEAST` apart.

    Args:
        limits: as the values have them.

    Returns:
        The same, or wider ones around the same middle.
    """
    low, high = limits
    more = max(0.0, LEAST - (high - low)) / 2
    return low - more, high + more


def smooth(values: list[float]) -> list[float]:
    """A centred moving average: it does not lag behind, and the ends keep their height.

    Args:
        values: the values.

    Returns:
        As many.
    """
    last, width = len(values) - 1, len(values) // 12
    halves = [min(width, index, last - index) for index in range(len(values))]
    return [statistics.fmean(values[i - half : i + half + 1]) for i, half in enumerate(halves)]


def _label(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
