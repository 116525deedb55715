"""The pictures of a comparison of optimizers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from families import FAMILIES, MEMBERS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox
from plots import WIDTH, smooth, wide
from report import Curve, Result

Shown = TypeVar("Shown", Result, Curve)
BACKGROUND = "#C8C8C8"


def plot_losses(path: Path, results: list[Result], against: str) -> None:
    """Draw the training loss of each optimizer in a panel of its own, with all the others in grey behind it.

    Args:
        path: the PNG file to write.
        results: of one task.
        against: "steps" or "seconds".
    """
    shown = [result for result in results if result.runs]
    columns = max(1, min(3, math.ceil(math.sqrt(len(shown)))))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(WIDTH, 1.4 + 2.1 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    curves = [[_loss_curve([run], against) for run in result.runs] for result in shown]
    means = [_loss_curve(list(result.runs), against) for result in shown]
    # The stock optimizer that learned best is what the others are measured by.
    stock = [index for index, result in enumerate(shown) if result.stock and result.mean is not None]
    reference = max(stock, key=lambda index: shown[index].mean or 0.0, default=None)

    for index, (result, axes) in enumerate(zip(shown, grid.flat, strict=False)):
        colour = FAMILIES[result.family][0]
        for other, mean in enumerate(means):
            if other != index:
                axes.plot(*mean, color=BACKGROUND, linewidth=1)
        if reference not in (None, index):
            axes.plot(*means[reference], color=FAMILIES["stock"][0], linewidth=1.3, linestyle=(0, (4, 2)))
        for curve in curves[index]:
            axes.plot(*curve, color=colour, linewidth=0.8, alpha=0.45)
        axes.plot(*means[index], color=colour, linewidth=2.2)
        axes.set_title(f"{result.label}\nlr {result.best:g}, {_mean(result)}", loc="left", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    highs = [max(losses) for _, losses in means if losses]
    if highs:  # a curve that runs away must not flatten the others
        low = min(min(losses) for _, losses in means if losses)
        high = min(max(highs), 1.5 * statistics.median(highs))
        margin = 0.05 * (high - low) or 0.01
        grid[0, 0].set_ylim(low - margin, high + margin)
    quantity = "optimizer steps" if against == "steps" else "seconds, without evaluation"
    for axes in list(grid.flat)[max(0, len(shown) - columns) : len(shown)]:  # the lowest of each column
        axes.set_xlabel(quantity)
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss per example")
    legend = [
        Line2D([], [], color="#666666", linewidth=2.2, label="mean over seeds"),
        Line2D([], [], color="#666666", linewidth=0.8, alpha=0.6, label="each seed"),
        Line2D([], [], color=BACKGROUND, linewidth=1, label="the other optimizers"),
    ]
    if reference is not None:
        label = f"{shown[reference].label} (the best that is none of EFCP's)"
        legend.append(Line2D([], [], color=FAMILIES["stock"][0], linewidth=1.3, linestyle=(0, (4, 2)), label=label))
    title = f"{results[0].task}: training loss, smoothed, at the best learning rate"
    figure.suptitle(f"{title},\nwith the mean {_words(results[0].headline)} after training", fontsize=11)
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def plot_metrics(path: Path, results: list[Result]) -> None:
    """Draw the final metric of each optimizer with its seeds and error bars, a panel for each task.

    Args:
        path: the PNG file to write.
        results: of all tasks.
    """
    results, tasks = _learned(results)
    by_label: dict[str, list[float]] = {}
    for result in results:
        by_label.setdefault(result.label, []).append(-math.inf if result.mean is None else result.mean)
    labels = sorted(by_label, key=lambda label: statistics.fmean(by_label[label]))  # the best on top
    columns = min(2, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(WIDTH, 1.0 + rows * (0.9 + 0.32 * len(labels))), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    for number, (task, axes) in enumerate(zip(tasks, grid.flat, strict=False)):
        for result in results:
            if result.task != task or result.mean is None:
                continue
            height, (colour, marker, _) = labels.index(result.label), FAMILIES[result.family]
            axes.errorbar(result.mean, height, xerr=result.deviation, fmt=marker, color=colour, markersize=7, capsize=4)
            seeds = [height] * len(result.values)
            axes.scatter(result.values, seeds, s=16, facecolors="none", edgecolors=colour, linewidths=0.9, zorder=3)
            where = (result.mean, height)
            axes.annotate(
                f"{result.mean:.3f}", where, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7
            )
        axes.set_yticks(range(len(labels)), labels if number % columns == 0 else [""] * len(labels))
        axes.set_ylim(-0.6, len(labels) - 0.2)
        metric = next(result.headline for result in results if result.task == task)
        axes.set_xlabel(f"{_words(metric)} on the validation split")
        axes.set_title(task, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
        axes.set_xlim(wide(axes.get_xlim()))
    _family_legend(figure, results)
    figure.suptitle("After training: mean, standard deviation (bar), each seed (small circle)", fontsize=12)
    figure.savefig(path)


def plot_rates(path: Path, curves: list[Curve]) -> None:
    """Draw final metric and validation loss against the learning rate, a column for each task and one for their mean.

    Args:
        path: the PNG file to write.
        curves: of all tasks.
    """
    curves, tasks = _learned(curves)
    panels = [*tasks, "mean over tasks"] if len(tasks) > 1 else tasks
    size, upright = (WIDTH, 6.4), len(panels) > 3  # then a row for each panel
    if upright:
        size = (WIDTH, 0.8 + 2.4 * len(panels))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(*((len(panels), 2) if upright else (2, len(panels))), squeeze=False, sharex=True)
    metric, loss = grid.T if upright else grid
    handles = _draw_rates(metric, curves, panels) | _draw_rates(loss, [curve.loss() for curve in curves], panels)
    for axes in metric:
        axes.set_ylim(wide(axes.get_ylim()))
    for axes in grid[-1]:
        axes.set_xlabel("learning rate")
    figure.suptitle("Only the optimizer changes: after training, against the learning rate", fontsize=11)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)


def _draw_rates(row: Sequence[Axes], curves: list[Curve], panels: list[str]) -> dict[str, Line2D]:
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    rates = sorted({rate for curve in curves for rate in curve.points})
    drawn: list[str] = []
    handles = {}
    for number, label in enumerate(dict.fromkeys(curve.label for curve in curves)):
        own = [curve for curve in curves if curve.label == label]
        marker, dashes = MEMBERS[drawn.count(own[0].family) % len(MEMBERS)]
        drawn.append(own[0].family)
        style: dict[str, Any] = {
            "color": FAMILIES[own[0].family][0],
            "marker": marker,
            "linestyle": dashes,
            # Hollow, and each larger than the one before: results that are equal show as one around the other.
            "markerfacecolor": "none",
            "markersize": 5 + 2 * (number % 4),
        }
        means: dict[float, list[float]] = {}
        for curve, axes in zip(own, row, strict=False):
            points = {rate: values for rate, values in curve.points.items() if values}
            for rate, values in points.items():
                means.setdefault(rate, []).append(statistics.fmean(values))
                axes.scatter([rate] * len(values), values, s=10, color=style["color"], alpha=0.35, linewidths=0)
            handles[label] = axes.plot(list(points), [statistics.fmean(v) for v in points.values()], **style)[0]
        complete = {rate: values for rate, values in means.items() if len(values) == len(tasks)}
        if len(tasks) > 1:
            row[-1].plot(list(complete), [statistics.fmean(v) for v in complete.values()], linewidth=2.2, **style)
    for panel, axes in zip(panels, row, strict=True):
        metric = next((curve.headline for curve in curves if curve.task == panel), curves[0].headline)
        axes.set_title(f"{panel}: {_words(metric)}", loc="left", fontsize=9)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45, minor=False, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.1)
    return handles


def _learned(shown: list[Shown]) -> tuple[list[Shown], list[str]]:
    """What is on tasks on which anything was learned, and these tasks: a panel of zeros tells nothing."""
    tasks = list(dict.fromkeys(one.task for one in shown))
    learned = [task for task in tasks if any(any(one.values) for one in shown if one.task == task)] or tasks
    return [one for one in shown if one.task in learned], learned


def plot_memory(path: Path, results: list[Result]) -> None:
    """Draw the final metric against the bytes of the optimizer's state, a panel for each task.

    Args:
        path: the PNG file to write.
        results: of all tasks.
    """
    results, tasks = _learned(results)
    count = max(sum(result.task == task for result in results) for task in tasks)
    height = 0.8 + len(tasks) * max(3.6, 1.0 + 0.3 * count)
    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    for task, axes in zip(tasks, figure.subplots(len(tasks), 1, squeeze=False)[:, 0], strict=True):
        shown = [result for result in results if result.task == task and result.mean is not None]
        for result in shown:
            colour, marker, _ = FAMILIES[result.family]
            x, y = result.bytes_per_parameter, result.mean
            axes.errorbar(x, y, yerr=result.deviation, fmt=marker, color=colour, markersize=7, capsize=3, elinewidth=1)
        # Linear up to one byte: an optimizer without state has a place too.
        axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
        sizes = [result.bytes_per_parameter for result in shown] or [1.0]
        axes.set_xlim(min(sizes) / 1.5 if min(sizes) > 0.25 else -0.2, 2 * max(1.0, *sizes))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(task, loc="left", fontsize=11)
        axes.set_xlabel("state of the optimizer, bytes per parameter (AdamW: 8)")
        metric = next(result.headline for result in results if result.task == task)
        axes.set_ylabel(f"{_words(metric)} on the validation split")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.08)
        axes.set_ylim(wide(axes.get_ylim()))
    _family_legend(figure, results)
    figure.suptitle("What the state costs, and what it brings (mean and standard deviation over seeds)", fontsize=12)
    figure.draw_without_rendering()  # the places of the axes are known only then
    for task, axes in zip(tasks, figure.axes, strict=True):
        _name_points(axes, [result for result in results if result.task == task and result.mean is not None])
    figure.savefig(path)


def _name_points(axes: Axes, results: list[Result]) -> None:
    # Each name takes the nearest place beside its point where it covers neither a point nor another name.
    places = [(result.bytes_per_parameter, result.mean or 0.0) for result in results]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in axes.transData.transform(places)]
    offsets = [(side * 9, height * 4) for height in range(40) for side in (1, -1)]
    offsets = sorted([*offsets, *((x, -y) for x, y in offsets)], key=lambda offset: (abs(offset[1]), -offset[0]))
    for result, place in zip(results, places, strict=True):
        for offset in offsets:
            name = _name(axes, result, place, offset)
            name.get_window_extent()  # moves the text to its place; the answer would include the line
            box = Text.get_window_extent(name)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            name.remove()
        else:
            _name(axes, result, place, offsets[0])


def _name(axes: Axes, result: Result, place: tuple[float, float], offset: tuple[int, int]) -> Annotation:
    colour = FAMILIES[result.family][0]
    name = axes.annotate(
        result.label,
        place,
        xytext=offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "right",
        va="center",
        fontsize=8,
        color=colour,
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
    )
    name.set_in_layout(False)
    return name


def _family_legend(figure: Figure, results: list[Result]) -> None:
    present = {result.family for result in results if result.runs}
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=name)
        for family, (colour, marker, name) in FAMILIES.items()
        if family in present
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _loss_curve(runs: list[dict[str, Any]], against: str) -> tuple[list[float], list[float]]:
    # The mean over runs, where all of them have a number; smoothed.
    rows = [{row["step"]: row for row in run["history"] if row.get("loss") is not None} for run in runs]
    steps = [step for step in rows[0] if all(step in row for row in rows)]
    losses = smooth([statistics.fmean(row[step]["loss"] for row in rows) for step in steps])
    if against == "seconds":
        return [statistics.fmean(row[step]["seconds"] for row in rows) for step in steps], losses
    return [float(step) for step in steps], losses


def _mean(result: Result) -> str:
    return "no metric" if result.mean is None else f"{_words(result.headline)} {result.mean:.3f}"


def _words(metric: str) -> str:
    return metric.replace("_", " ")
