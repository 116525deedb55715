"""The benchmark's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_cases import ADAMW
from bench_measure import PARTS
from bench_report import Report
from bench_sweep import Sweep
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import WIDTH

# Okabe and Ito for what a step does, and colours that are none of them for what a state is made of.
_STEP, _GREY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "#999999"
STEP_PARTS = dict(zip((*PARTS, "rest"), (*_STEP, _GREY), strict=True))
MEMORY_PARTS = {
    **{"indices": "#332288", "values": "#88A0DD", "error": "#882255", "momentum": "#DDBB99"},
    **{"metric": "#E69F00", "gram": "#117733"},
}
WHOLE, BACKWARD = "#333333", "#C8C8C8"  # an optimizer's whole step; forward and backward
_FAR = 1.12  # of the axis: where bars that are much longer than the others are cut


def plot_report(path: Path, report: Report) -> None:
    """Draw the step by part, the state by part, and the training step.

    Args:
        path: The PNG file to write.
        report: The numbers.
    """
    labels = [result.label for result in report.results]
    panels = 3 if report.training else 2
    rows = [len(labels), len(labels), len(report.training)][:panels]
    heights = [0.9 + 0.25 * count for count in rows]
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), dpi=150, layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=heights)[:, 0]

    whole = [{"rest": result.seconds, **result.parts} for result in report.results]
    _stacked(axes[0], labels, whole, STEP_PARTS, "{:.2g} s", [result.seconds for result in report.results])
    streams = [result.stream_seconds for result in report.results]
    shown = [(seconds, row) for row, seconds in enumerate(streams) if 0.0 < seconds < axes[0].get_xlim()[1]]
    floor = "#000000"
    axes[0].scatter(*zip(*shown, strict=True) if shown else ([], []), marker="|", s=160, color=floor, zorder=3)
    axes[0].set_title("a step, seconds (black: reading the window twice)", loc="left", fontsize=10)

    states = [{name: result.memory[name] / report.parameters for name in MEMORY_PARTS} for result in report.results]
    _stacked(axes[1], labels, states, MEMORY_PARTS, "{:.3g}", [result.bytes_per_parameter for result in report.results])
    axes[1].set_title("state, bytes per parameter", loc="left", fontsize=10)

    if report.training:
        runs = {"forward_backward": BACKWARD, "optimizer": WHOLE}
        times = [{name: run[name] for name in runs} for run in report.training.values()]
        reference = report.training.get(ADAMW)
        ratios = [
            "" if reference is None else f"{r['whole'] / reference['whole']:.2f} x" for r in report.training.values()
        ]
        steps = [run["whole"] for run in report.training.values()]
        _stacked(axes[2], list(report.training), times, runs, "{:.2f} s", steps, ratios)
        axes[2].set_title("a training step, seconds", loc="left", fontsize=10)
    figure.suptitle(f"{report.parameters / 1e6:.1f} M parameters, {report.machine['cpu']}", fontsize=11)
    figure.savefig(path)


def _stacked(
    axes: Axes,
    labels: Sequence[str],
    rows: list[dict[str, float]],
    colours: dict[str, str],
    words: str,
    measured: Sequence[float],
    notes: Sequence[str] = (),
) -> None:
    """Bars of parts, the first on top, with what was measured of the whole: medians of parts do not add up to it.

    Those that would make all others invisible are cut.
    """
    totals = [sum(row.values()) for row in rows]
    usual = sorted(totals)
    while len(usual) > 2 and usual[-1] > 5 * usual[-2]:
        usual.pop()
    end = usual[-1] or 1.0
    for name, colour in colours.items():
        starts = [sum(row.get(other, 0.0) for other in list(colours)[: list(colours).index(name)]) for row in rows]
        widths = [
            min(row.get(name, 0.0), max(0.0, _FAR * end - start)) for row, start in zip(rows, starts, strict=True)
        ]
        axes.barh(range(len(rows)), widths, left=starts, color=colour, label=name.replace("_", " + "))
    for row, total in enumerate(totals):
        note = f"  {notes[row]}" if notes else ""
        cut = total > _FAR * end
        text = f" {'→ ' if cut else ''}{words.format(measured[row])}{note}"
        axes.annotate(text, (min(total, _FAR * end), row), va="center", fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * end)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 2.6}
    axes.legend(ncols=4, frameon=False, fontsize=7, **below)


def plot_sweeps(path: Path, sweeps: list[Sweep]) -> None:
    """Draw how the parts of a step grow, log-log, with lines of the slopes that they should have.

    Args:
        path: The PNG file to write.
        sweeps: A panel each.
    """
    figure = Figure(figsize=(WIDTH, 4.2), dpi=150, layout="constrained")
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        axes.plot(sweep.sizes, sweep.seconds, color=WHOLE, marker="o", linewidth=2, label="whole step")
        for part in sweep.parts[0]:
            seconds = [parts[part] for parts in sweep.parts]
            axes.plot(sweep.sizes, seconds, color=STEP_PARTS[part], marker=".", label=part)
        # Through the largest size, where fixed costs count least.
        for slope, height in ((1, sweep.seconds[-1]), (1, sweep.parts[-1]["products"]), (3, sweep.parts[-1]["solve"])):
            if slope == 1 or sweep.name == "num_grads":
                ideal = [height * (size / sweep.sizes[-1]) ** slope for size in sweep.sizes]
                axes.plot(sweep.sizes, ideal, color="#999999", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sweep.sizes, [_short(size) for size in sweep.sizes], rotation=45, fontsize=8)
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(1e-5, 0.2 * min(parts["products"] for parts in sweep.parts)))
        axes.set_xlabel(sweep.name)
        axes.set_ylabel("seconds")
        axes.set_title(sweep.fixed, loc="left", fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=(len(names) + 1) // 2, frameon=False, fontsize=8)
    figure.suptitle(
        "How a step of sparse M-FAC grows (dashed: in proportion; the solve with the third power)", fontsize=11
    )
    figure.savefig(path)


def _short(size: float) -> str:
    """A number of parameters in millions, anything else as it is."""
    return f"{size / 1e6:.2g} M" if size >= 1e5 else f"{size:g}"
