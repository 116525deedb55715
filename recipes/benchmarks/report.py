"""The results of a comparison of optimizers, and their table."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from families import family
from tables import table as lay_out


@dataclasses.dataclass(frozen=True)
class Result:
    """What one optimizer reached on one task.

    Args:
        task: the task's name.
        headline: the metric that stands for the task.
        label: the optimizer's name in the comparison.
        stock: whether it is none of EFCP's.
        tried: the learning rates that have a result on the search seed.
        best: the best of them, None when there is none.
        seeds: the seeds to train with at the best learning rate.
        runs: the finished runs with them.
        failures: what went wrong, in words.
    """

    task: str
    headline: str
    label: str
    stock: bool
    tried: tuple[float, ...]
    best: float | None
    seeds: tuple[int, ...]
    runs: tuple[dict[str, Any], ...]
    failures: tuple[str, ...]

    @property
    def family(self) -> str:
        """How its gradients are kept; "stock" for an optimizer that is none of EFCP's."""
        return "stock" if self.stock else family(self.runs[0]["optimizer"])

    @property
    def values(self) -> list[float]:
        """The headline metric of the runs in which it is a number."""
        metrics = [run["metrics"][self.headline] for run in self.runs]
        return [float(value) for value in metrics if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean of the headline metric over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float:
        """The sample standard deviation of the headline metric over the seeds; 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def seconds_per_step(self) -> float:
        """The median over the runs of the median step."""
        return statistics.median(float(run["seconds_per_step"]) for run in self.runs)

    @property
    def bytes_per_parameter(self) -> float:
        """The bytes of the optimizer's state per parameter of the model."""
        return float(self.runs[0]["optimizer_memory"]["total"] / self.runs[0]["parameters"])

    @property
    def at_the_edge(self) -> str | None:
        """Which end of several learning rates the best one is, "least" or "largest"; None when it is neither."""
        if self.best is None or len(self.tried) < 2:
            return None
        return {min(self.tried): "least", max(self.tried): "largest"}.get(self.best)

    @property
    def loss(self) -> float | None:
        """The mean over the seeds of the validation loss after training; None when one of them has no number."""
        losses = [run["metrics"]["loss"] for run in self.runs]
        return statistics.fmean(losses) if losses and None not in losses else None

    @property
    def evaluated(self) -> bool:
        """Whether there were evaluations before the end of training."""
        return any(row["step"] < run["steps"] for run in self.runs for row in _evaluations(run))

    def steps_to(self, loss: float) -> tuple[int, ...]:
        """How long it takes to a validation loss.

        Args:
            loss: the loss.

        Returns:
            For each seed that comes there, the step of the first evaluation with this loss or less.
        """
        first = [[row["step"] for row in _evaluations(run) if row["eval_loss"] <= loss] for run in self.runs]
        return tuple(min(steps) for steps in first if steps)

    @property
    def diverged(self) -> int:
        """The number of runs that ended with a loss that is not a number."""
        return sum(run["metrics"]["loss"] is None for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one optimizer reached on one task with each learning rate.

    Args:
        task: the task's name.
        headline: the metric that stands for the task.
        label: the optimizer's name in the comparison.
        family: as that of `Result`.
        points: for each learning rate, ascending, the headline metric of each seed that has a number.
        losses: the same for the validation loss.
    """

    task: str
    headline: str
    label: str
    family: str
    points: dict[float, tuple[float, ...]]
    losses: dict[float, tuple[float, ...]]

    @property
    def values(self) -> list[float]:
        """The headline metric of every seed at every learning rate."""
        return [value for values in self.points.values() for value in values]

    def loss(self) -> Curve:
        """The curve of the validation loss.

        Returns:
            It, with the loss as the headline metric.
        """
        return dataclasses.replace(self, headline="loss", points=self.losses)


def rates_table(curves: list[Curve]) -> str:
    """Lay out metric and validation loss against the learning rate in Markdown.

    Args:
        curves: for each task and optimizer.

    Returns:
        Two tables for each task, and two with the mean over tasks when there are several.
    """
    lines = ["", "## Every learning rate", "", "Mean ± sample standard deviation over the seeds that were trained."]
    return "\n".join([*lines, *_rates(curves), *_rates([curve.loss() for curve in curves])]) + "\n"


def _rates(curves: list[Curve]) -> list[str]:
    lines = []
    rates = sorted({rate for curve in curves for rate in curve.points})
    header = ("optimizer", *(f"{rate:g}" for rate in rates))
    for task in dict.fromkeys(curve.task for curve in curves):
        of_task = [curve for curve in curves if curve.task == task]
        rows = [(curve.label, *(_spread(curve.points.get(rate, ())) for rate in rates)) for curve in of_task]
        lines += ["", f"### {task}, {of_task[0].headline.replace('_', ' ')}", "", *lay_out(header, rows)]
    tasks = len({curve.task for curve in curves})
    if tasks > 1:
        rows = []
        for label in dict.fromkeys(curve.label for curve in curves):
            cells = []
            for rate in rates:
                found = [curve.points.get(rate, ()) for curve in curves if curve.label == label]
                means = [statistics.fmean(values) for values in found if values]
                cells.append(f"{statistics.fmean(means):.3f}" if len(means) == tasks else "-")
            rows.append((label, *cells))
        title = "### Mean over tasks" + (", loss" if curves[0].headline == "loss" else "")
        lines += ["", title, "", *lay_out(header, rows)]
    return lines


def _spread(values: tuple[float, ...]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _evaluations(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in run["history"] if row.get("eval_loss") is not None]


def reference(results: list[Result]) -> Result | None:
    """The result whose loss the others are to reach: that of AdamW.

    Args:
        results: of one task.

    Returns:
        The first of PyTorch's AdamW that was evaluated on the way; None when there is none.
    """
    adamw = [result for result in results if result.stock and result.runs and result.evaluated]
    return next((result for result in adamw if str(result.runs[0]["optimizer"]).startswith("adamw_torch")), None)


def table(results: list[Result], search_seed: int, notes: tuple[str, ...] = (), select_by: str = "metric") -> str:
    """Lay out results in Markdown.

    Args:
        results: for each task and optimizer.
        search_seed: the seed that the learning rates were tried on.
        notes: what else to say.
        select_by: what chose the learning rates, "metric" or "selection_loss".

    Returns:
        A table for each task, and one with the mean over tasks when there are several.
    """
    tasks = list(dict.fromkeys(result.task for result in results))
    seeds = results[0].seeds
    counts = sorted({len(result.tried) for result in results})
    notes += (
        () if len(counts) == 1 else (f"not the same number of learning rates for all: {counts[0]} to {counts[-1]}",)
    )
    lines = [
        f"Every learning rate was tried with seed {search_seed}; the best of them was then trained with the seeds "
        f"{', '.join(map(str, seeds))}. Shown: mean ± sample standard deviation over these seeds, on the validation "
        f"split{_CHOSEN[select_by]}; the median time of a step, without evaluation; the bytes of the "
        "optimizer's state per parameter of the model.",
        "",
        *(f"- {note}" for note in notes),
    ]
    for task in tasks:
        lines += _of_task([result for result in results if result.task == task])
    if len(tasks) > 1:
        lines += _over_tasks(results, tasks)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


_CHOSEN = {
    "metric": " that also chose the learning rate",
    "selection_loss": "; the loss on a part of the training split without training chose the learning rate",
}


def _of_task(results: list[Result]) -> list[str]:
    lines = ["", f"## {results[0].task}", ""]
    run = next((result.runs[0] for result in results if result.runs), None)
    if run is not None:
        lines += [
            f"{run['model']}, {run['layers']} layers, {run['parameters'] / 1e6:.1f} M parameters; {run['steps']} steps "
            f"of {run['train_batch_size']} examples, gradients clipped at {run['max_grad_norm']:g}.",
            "",
        ]
    headline = results[0].headline.replace("_", " ")
    header = ["optimizer", "learning rate", "tried", headline, "s / step", "bytes / parameter"]
    rows = [
        [
            result.label,
            "-" if result.best is None else f"{result.best:g}",
            f"{len(result.tried)}: {', '.join(f'{rate:g}' for rate in result.tried)}" if result.tried else "0",
            _value(result),
            f"{result.seconds_per_step:.3f}" if result.runs else "-",
            f"{result.bytes_per_parameter:.2f}" if result.runs else "-",
        ]
        for result in results
    ]
    best = reference(results)
    if best is not None and best.loss is not None:
        header.append(f"steps to {best.label}'s loss")
        rows = [[*row, _steps(result, best.loss)] for row, result in zip(rows, results, strict=True)]
        lines += [f"{best.label}'s validation loss after training is {best.loss:.4f}, the mean over its seeds.", ""]
    lines += lay_out(header, rows, words=("tried",))
    remarks = [f"- {result.label}: {failure.splitlines()[0]}" for result in results for failure in result.failures]
    remarks += [
        f"- {result.label}: diverged with {result.diverged} of {len(result.runs)} seeds"
        for result in results
        if result.diverged
    ]
    remarks += [
        f"- {result.label}: its best learning rate, {result.best:g}, is the {result.at_the_edge} of those tried; a "
        "better one may lie beyond"
        for result in results
        if result.at_the_edge
    ]
    return [*lines, "", *remarks]


def _over_tasks(results: list[Result], tasks: list[str]) -> list[str]:
    rows = []
    for label in dict.fromkeys(result.label for result in results):
        means = [result.mean for result in results if result.label == label]
        known = [mean for mean in means if mean is not None]
        complete = len(known) == len(tasks)
        rows.append((label, f"{statistics.fmean(known):.3f}" if complete else "-"))
    title = ["", "## Mean over tasks", "", f"Of the metrics above, over {', '.join(tasks)}.", ""]
    return [*title, *lay_out(("optimizer", "mean"), rows), ""]


def _steps(result: Result, loss: float) -> str:
    steps = result.steps_to(loss)
    if not steps:
        return "-"
    text = f"{statistics.fmean(steps):.0f}"
    return text if len(steps) == len(result.seeds) else f"{text} ({len(steps)} of {len(result.seeds)} seeds)"


def _value(result: Result) -> str:
    if result.mean is None:
        return "-"
    text = f"{result.mean:.3f}" + (f" ± {result.deviation:.3f}" if len(result.values) > 1 else "")
    missing = len(result.values) < len(result.seeds)
    return f"{text} ({len(result.values)} of {len(result.seeds)} seeds)" if missing else text
