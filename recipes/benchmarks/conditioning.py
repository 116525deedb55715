"""Where the matrix should win: ill-conditioned problems, with the condition number on the axis.

    python recipes/benchmarks/conditioning.py
    python recipes/benchmarks/conditioning.py --studies rotated --steps 50 --seeds 1 --output_dir outputs/quick

Five studies. `rotated`: logistic regression on whole batches whose features have condition numbers of 1e1 to 1e6 and
are turned, so that no diagonal metric helps. `aligned`: the same without the turn, where one does. `batches`: turned,
on a quarter of the examples in each step. `window`: turned, at 1e4, over windows of 8 to 128 gradients. `depth`: a
network of 16 units a layer without normalisation, 4 to 16 layers deep.

Every optimizer looks for its learning rate on seed 0, by the loss over all examples at the end: by factors of four
until the best is not at the edge, and leaves less than half or twelve have been tried, and then a factor of two to
either side. The other seeds are reported. All take the same number of steps, with a learning rate that falls to 0
linearly.

A run is in `conditioning.jsonl` as soon as it ends: interrupt the program and start it again, and only what is not
there is run. `conditioning.md` and `conditioning.png` are made from it, with `--collect` without running anything:

    python recipes/benchmarks/conditioning.py --output_dir recipes/results --collect
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _recipes  # noqa: F401
import torch
from cli import explained, require
from conditioning_problems import Problem, logistic, network
from runs import RunLog
from tables import table

from hf_efcp import OPTIMIZERS

SEARCH_SEED = 0
REACHED = 0.05  # of the loss that can be taken off: "steps to a loss"
LEARNED = 0.5  # a search goes on while more is left than this
MOST_RATES = 12
OFF = 1e6  # what the dampening is where the matrix is off, and what the learning rate is multiplied by
EXAMPLES, FEATURES, WIDTH, WINDOW = 1024, 64, 16, 128
# By the label of a row: the optimizer, its options, the learning rate that its search starts from, and its family.
ROWS: dict[str, tuple[str, dict[str, Any], float]] = {
    "SGD, momentum 0.9": ("sgd", {"momentum": 0.9}, 1.0),
    "AdaGrad": ("adagrad", {}, 0.5),
    "AdamW": ("adamw", {"weight_decay": 0.0}, 0.25),
    "low-rank M-FAC, default": ("lowrank_mfac", {}, 0.25),
    "the same, trust_lr = 1": ("lowrank_mfac", {"trust_lr": 1.0}, 0.25),
    "the same, matrix off": ("lowrank_mfac", {"relative_damp": 1e30}, 0.25),
    "dense M-FAC": ("dense_mfac", {"metric": "none", "num_grads": WINDOW}, 0.01),
    "dense GGT": ("dense_ggt", {"metric": "none", "num_grads": WINDOW}, 0.3),
    "dense, matrix off": ("dense_mfac", {"metric": "none", "num_grads": 1, "damp": OFF}, OFF),
    "sparse M-FAC": ("sparse_mfac", {"metric": "none", "num_grads": WINDOW, "density": 0.1}, 0.01),
    "sparse, matrix off": ("sparse_mfac", {"metric": "none", "num_grads": 1, "density": 0.1, "damp": OFF}, OFF),
}
STOCK: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adamw": torch.optim.AdamW,
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A panel of the figure.

    Args:
        title: what it is.
        axis: what is on the x axis.
        points: the values there.
        labels: the rows of `ROWS` that take part.
        batch: examples in a step; None takes all.
        make: a problem, from a point of the axis and a seed.
        windowed: whether a point is the optimizer's window.
    """

    title: str
    axis: str
    points: tuple[float, ...]
    make: Callable[[float, int], Problem]
    labels: tuple[str, ...] = tuple(ROWS)
    batch: int | None = None
    windowed: bool = False


_CONDITION = "condition number of the features"
STUDIES = {
    "rotated": Study(
        "turned, whole batches",
        _CONDITION,
        (1e1, 1e2, 1e3, 1e4, 1e5, 1e6),
        lambda condition, seed: logistic(condition, True, EXAMPLES, FEATURES, seed),
    ),
    "aligned": Study(
        "not turned, whole batches",
        _CONDITION,
        (1e2, 1e4),
        lambda condition, seed: logistic(condition, False, EXAMPLES, FEATURES, seed),
    ),
    "batches": Study(
        "turned, a quarter of the examples in a step",
        _CONDITION,
        (1e2, 1e4),
        lambda condition, seed: logistic(condition, True, EXAMPLES, FEATURES, seed),
        batch=EXAMPLES // 4,
    ),
    "window": Study(
        f"turned, condition 1e4, {FEATURES} features",
        "gradients in the window",
        (8, 16, 32, 64, 128),
        lambda _, seed: logistic(1e4, True, EXAMPLES, FEATURES, seed),
        labels=("dense M-FAC", "dense GGT"),
        windowed=True,
    ),
    "depth": Study(
        "network without normalisation",
        "hidden layers of 16 units",
        (4, 8, 16),
        lambda depth, seed: network(int(depth), EXAMPLES // 2, WIDTH, seed),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer on a point of a study, and everything but learning rate and seed that decides its runs."""

    study: str
    point: float
    label: str
    steps: int

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's options, with the window that the point asks for."""
        options = ROWS[self.label][1]
        return {**options, "num_grads": int(self.point)} if STUDIES[self.study].windowed else options

    def key(self, rate: float, seed: int) -> dict[str, Any]:
        """What decides the result of a run.

        Args:
            rate: the learning rate.
            seed: the seed.

        Returns:
            The settings by name.
        """
        settings = {"study": self.study, "point": self.point, "steps": self.steps, "seed": seed}
        return {**settings, "optimizer": ROWS[self.label][0], "options": self.options, "learning_rate": rate}

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Minimise once.

        Args:
            rate: the learning rate.
            seed: the seed.

        Returns:
            The key; `gap`, what is left in the end of the loss that could be taken off, None when the loss is no
            number; and `reached`, the step after which `REACHED` of it is left for the first time.
        """
        study, name = STUDIES[self.study], ROWS[self.label][0]
        problem = study.make(self.point, seed)
        make = STOCK.get(name) or OPTIMIZERS[name]
        optimizer = make(problem.model.parameters(), lr=rate, **self.options)
        every = torch.arange(len(problem.inputs))
        generator = torch.Generator().manual_seed(seed)
        start, reached = _loss(problem), None
        clock = time.perf_counter()
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 - step / self.steps)
            chosen = every[torch.randperm(len(every), generator=generator)[: study.batch]] if study.batch else every
            optimizer.zero_grad()
            loss = problem.loss(problem.model(problem.inputs[chosen]), chosen)
            left = ((_loss(problem) if study.batch else loss.item()) - problem.floor) / (start - problem.floor)
            if reached is None and left <= REACHED:
                reached = step
            loss.backward()  # type: ignore[no-untyped-call]
            if not all(bool(p.grad.isfinite().all()) for p in problem.model.parameters() if p.grad is not None):
                break
            optimizer.step()
        gap = (_loss(problem) - problem.floor) / (start - problem.floor)
        if reached is None and gap <= REACHED:
            reached = self.steps
        seconds = time.perf_counter() - clock
        finite = gap if math.isfinite(gap) else None
        return {"key": self.key(rate, seed), "label": self.label, "gap": finite, "reached": reached, "seconds": seconds}


@torch.no_grad()
def _loss(problem: Problem) -> float:
    return float(problem.loss(problem.model(problem.inputs), torch.arange(len(problem.inputs))))


def gap_of(run: dict[str, Any]) -> float:
    """What is left of the loss.

    Args:
        run: a run.

    Returns:
        Its gap; infinite when it diverged.
    """
    return math.inf if run["gap"] is None else float(run["gap"])


def search(
    start: float, measure: Callable[[float], float], most: int = MOST_RATES, enough: float = math.inf
) -> tuple[float, bool]:
    """Look for the learning rate at which a measure is least.

    By factors of four in both directions until the best has one on either side, then a factor of two from it.

    Args:
        start: where to begin.
        measure: of a learning rate, what is to be small.
        most: the most learning rates that are tried before the factors of two.
        enough: while the best is above it, the search goes on, first where less has been tried: where nothing is
            learned, all rates are about the same, and the best of them may be far away.

    Returns:
        The best learning rate, and whether it is inside of what was tried.
    """
    tried = {power: measure(start * 4.0**power) for power in (-1, 0, 1)}
    while len(tried) < most:
        best = min(tried, key=lambda power: tried[power])
        first, last = min(tried), max(tried)
        if best not in (first, last):
            if tried[best] <= enough:
                break
            power = first - 1 if -first <= last else last + 1
        else:
            power = best - 1 if best == first else best + 1
        tried[power] = measure(start * 4.0**power)
    best = min(tried, key=lambda power: tried[power])
    inside = min(tried) < best < max(tried)
    close = {factor: measure(start * 4.0**best * factor) for factor in (0.5, 2.0)}
    close[1.0] = tried[best]
    return start * 4.0**best * min(close, key=lambda factor: close[factor]), inside


def solve(case: Case, log: RunLog, seeds: Iterable[int], collect: bool = False) -> dict[str, Any]:
    """Find a case's learning rate, and run it with every seed; what is in the log is not run again.

    Args:
        case: the case.
        log: the finished runs.
        seeds: what is reported.
        collect: run nothing.

    Returns:
        The case, its `rate`, whether that is `inside`, and its `runs`.

    Raises:
        LookupError: if nothing is to be run, and a run is not there.
    """

    def run(rate: float, seed: int) -> dict[str, Any]:
        rate = float(f"{rate:.6g}")
        if log.finished(case.key(rate, seed)) is None:
            if collect:
                raise LookupError(f"{case} has not been run at {rate:g} with seed {seed}")
            log.add(case.run(rate, seed))
        done = log.finished(case.key(rate, seed))
        assert done is not None
        return done

    rate, inside = search(ROWS[case.label][2], lambda rate: gap_of(run(rate, SEARCH_SEED)), enough=LEARNED)
    return {"case": case, "rate": rate, "inside": inside, "runs": [run(rate, seed) for seed in seeds]}


def report(solved: list[dict[str, Any]]) -> str:
    """Lay out what was found in Markdown: for each study the gap that is left, and the steps to a loss.

    Args:
        solved: what `solve` returned.

    Returns:
        The text.
    """
    seeds, steps = len(solved[0]["runs"]), solved[0]["case"].steps
    lines = [
        f"What is left after {steps} steps of the loss that could be taken off, in percent: mean ± sample standard "
        f"deviation of {seeds} seeds. In brackets: the steps until {REACHED:.0%} was left, a mean over the seeds that "
        "came there, or - when less than half of them did. In bold: the least of a column. An asterisk: the best "
        "learning rate is the last that was tried.",
    ]
    for name in dict.fromkeys(one["case"].study for one in solved):
        found = [one for one in solved if one["case"].study == name]
        points = sorted({one["case"].point for one in found})
        least = {point: min(_mean(one) for one in found if one["case"].point == point) for point in points}
        rows = []
        for label in dict.fromkeys(one["case"].label for one in found):
            own = {one["case"].point: one for one in found if one["case"].label == label}
            rows.append((label, *(_cell(own[point], least[point]) if point in own else "" for point in points)))
        axis = STUDIES[name].axis
        head = (axis, *(f"{point:g}" if point < 1e3 else f"1e{round(math.log10(point))}" for point in points))
        lines += ["", f"### {name}: {STUDIES[name].title}", "", *table(head, rows)]
    return "\n".join(lines) + "\n"


def _mean(one: dict[str, Any]) -> float:
    return statistics.fmean(gap_of(run) for run in one["runs"])


def _cell(one: dict[str, Any], least: float) -> str:
    gaps = [100.0 * gap_of(run) for run in one["runs"]]
    reached = [run["reached"] for run in one["runs"] if run["reached"] is not None]
    if not math.isfinite(sum(gaps)):
        return "diverged"
    text = _percent(statistics.fmean(gaps))
    if len(gaps) > 1 and statistics.fmean(gaps) >= 0.01:
        text += f" ± {_percent(statistics.stdev(gaps))}"
    text = f"**{text}**" if _mean(one) <= least else text
    steps = f"{statistics.fmean(reached):.0f}" if 2 * len(reached) >= len(gaps) else "-"
    return f"{text} ({steps}){'' if one['inside'] else ' *'}"


def _percent(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else "<0.01"


def main() -> None:
    """Run what is not there yet, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--points", nargs="+", type=float, help="only these values of the axis")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="what is reported; seed 0 searches")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/conditioning"))
    parser.add_argument("--collect", action="store_true", help="run nothing: report the cases that are there")
    args = parser.parse_args()
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1: {args.steps}")
    if SEARCH_SEED in args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds must be others than {SEARCH_SEED}, each once: {args.seeds}")
    require("recipes", "matplotlib")
    torch.set_num_threads(1)  # so small are the problems
    log = RunLog(args.output_dir / "conditioning.jsonl")
    cases = [
        Case(name, point, label, args.steps)
        for name in args.studies
        for point in STUDIES[name].points
        for label in STUDIES[name].labels
        if not args.points or point in args.points
    ]
    solved: list[dict[str, Any]] = []
    try:
        for number, case in enumerate(cases, start=1):
            try:
                solved.append(solve(case, log, args.seeds, args.collect))
            except LookupError:  # only when nothing is to be run
                continue
            where = f"[{number}/{len(cases)}] {case.study} {case.point:g}, {case.label}"
            print(f"{where}: {_mean(solved[-1]):.3g} at lr {solved[-1]['rate']:g}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
    if solved:
        write(args.output_dir, solved)


def write(folder: Path, solved: list[dict[str, Any]]) -> None:
    """Write table and figure.

    Args:
        folder: where to.
        solved: what `solve` returned.
    """
    from conditioning_figures import plot

    text = report(solved)
    (folder / "conditioning.md").write_text(text, encoding="utf-8")
    plot(folder / "conditioning.png", solved)
    print(f"\n{text}\nconditioning.jsonl, conditioning.md and conditioning.png are in {folder}")


if __name__ == "__main__":
    with explained():
        main()
