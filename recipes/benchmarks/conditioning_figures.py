"""The picture of the ill-conditioned problems."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from conditioning import ROWS, STUDIES, gap_of
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# By what an optimizer is: stock ones in greys, ours by window, and the same hollow and dashed with the matrix off.
_COLOURS = {"sgd": "#999999", "adagrad": "#777777", "adamw": "#222222", "lowrank_mfac": "#D55E00"}
_COLOURS |= {"dense_mfac": "#009E73", "dense_ggt": "#0072B2", "sparse_mfac": "#CC79A7"}
_MARKERS = {"sgd": "v", "adagrad": "P", "adamw": "X", "lowrank_mfac": "s", "dense_mfac": "^", "dense_ggt": "o"}
_MARKERS |= {"sparse_mfac": "D"}
_LEAST = 1e-7  # what is drawn of a gap that rounding has made zero or negative


def plot(path: Path, solved: list[dict[str, Any]]) -> None:
    """Draw what is left of the loss against the axis of each study, mean and range over the seeds.

    Args:
        path: the PNG file to write.
        solved: what `conditioning.solve` returned.
    """
    names = list(dict.fromkeys(one["case"].study for one in solved))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 1.6 + 3.6 * rows), dpi=140, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for name, axes in zip(names, grid.flat, strict=False):
        for label in STUDIES[name].labels:
            own = [one for one in solved if (one["case"].study, one["case"].label) == (name, label)]
            gaps = [[max(gap_of(run), _LEAST) for run in one["runs"]] for one in own]
            points = [one["case"].point for one in own]
            style = _style(label)
            axes.plot(points, [statistics.fmean(values) for values in gaps], linewidth=1.6, markersize=6, **style)
            low, high = [min(values) for values in gaps], [max(values) for values in gaps]
            axes.fill_between(points, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2 if max(STUDIES[name].points) < 1e3 else 10)
        axes.set_yscale("log")
        axes.set_ylim(top=1.5)
        axes.set_title(f"{name}: {STUDIES[name].title}", loc="left", fontsize=10)
        axes.set_xlabel(STUDIES[name].axis)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("part of the loss that is left")
    labels = list(dict.fromkeys(one["case"].label for one in solved))
    handles = [Line2D([], [], label=label, **_style(label)) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    steps, seeds = solved[0]["case"].steps, len(solved[0]["runs"])
    figure.suptitle(
        f"After {steps} steps, each optimizer at its best learning rate: mean of {seeds} seeds, shaded from the least "
        "to the largest",
        fontsize=11,
    )
    figure.savefig(path)


def _style(label: str) -> dict[str, Any]:
    name = ROWS[label][0]
    off, other = "off" in label, "trust_lr" in label
    fill = "none" if off or other else _COLOURS[name]
    line = (0, (1, 1.5)) if off else (0, (6, 2)) if other else "-"
    return {"color": _COLOURS[name], "marker": _MARKERS[name], "markerfacecolor": fill, "linestyle": line}
