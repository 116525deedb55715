"""Compare optimizers on tasks: search the learning rate of each on one seed, and train with the best on several.

    python recipes/benchmarks/compare_optimizers.py recipes/configs/compare_variants.yaml
    python recipes/benchmarks/compare_optimizers.py recipes/configs/compare_variants.yaml --max_steps 20

The YAML has `tasks`, `search_seed`, `seeds`, training arguments for all, and under `optimizers` a label for each with
`optim`, `learning_rates` and perhaps `optim_args` and `optim_target_modules`. With `holdout: 0.1` and `select_by:
selection_loss` the learning rates are chosen by the loss on a tenth of the training split, and not on what is reported;
with `eval_steps` the table has the steps to AdamW's loss. docs/protocol.md is a protocol of such parts.

All runs with one seed start from the same weights and see the same batches. No model is stored.

The folder `output_dir` then holds `runs.jsonl`, `table.md` and pictures. A run is in `runs.jsonl` as soon as it ends:
interrupt the program and start it again, or change the YAML, and only what is not there is run. A run that diverges is
a result; one that raises an error is tried again at the next start.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
import time
from typing import Any

import _recipes  # noqa: F401
from bench import Bench
from cli import explained, require
from families import family
from plan import Contender, Plan, read_plan
from report import Curve, Result, rates_table, table
from runs import RunLog
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from hf_efcp.glue import get_task


@dataclasses.dataclass(frozen=True)
class Slot:
    """A run to do; without a learning rate, with the best of those tried."""

    bench: Bench
    contender: Contender
    learning_rate: float | None
    seed: int


class Comparison:
    """The runs of a plan: the search on all tasks first, then seed by seed, so that every start is loaded once.

    Args:
        plan: the plan.
        log: where finished runs are.
    """

    def __init__(self, plan: Plan, log: RunLog) -> None:
        self.plan, self.log = plan, log
        self.benches = [Bench(plan, get_task(name)) for name in plan.comparison.tasks]
        search_seed, seeds = plan.comparison.search_seed, plan.comparison.seeds
        self.slots: list[Slot] = []
        for bench in self.benches:
            self.slots += [Slot(bench, c, rate, search_seed) for c in plan.contenders for rate in c.learning_rates]
        for bench, seed in itertools.product(self.benches, [seed for seed in seeds if seed != search_seed]):
            for contender in plan.contenders:
                rates = contender.learning_rates if plan.comparison.every_rate else (None,)
                self.slots += [Slot(bench, contender, rate, seed) for rate in rates]

    def run(self) -> None:
        """Do every run that is not finished, and print a line for each."""
        start = time.perf_counter()
        done = sum(self._finished(slot) is not None for slot in self.slots)
        print(f"{len(self.slots)} runs, {done} of them done before", flush=True)
        for number, slot in enumerate(self.slots, start=1):
            rate = self._rate(slot)
            if self._finished(slot):
                continue
            where = f"[{number}/{len(self.slots)}] {slot.bench.task.name}, {slot.contender.label}, seed {slot.seed}"
            if rate is None:
                print(f"{where}: left out, no learning rate has a result", flush=True)
                continue
            run = slot.bench.run(slot.contender, rate, slot.seed)
            self.log.add(run)
            print(
                f"{where}, lr {rate:g}: {_outcome(run)}; {_time(time.perf_counter() - start)} passed, "
                f"about {_time(self._remaining(self.slots[number:]))} to go",
                flush=True,
            )

    def results(self) -> list[Result]:
        """Collect what is there.

        Returns:
            A result for each task and optimizer, tasks first.
        """
        return [self._result(bench, contender) for bench in self.benches for contender in self.plan.contenders]

    def curves(self) -> list[Curve]:
        """Collect metric and validation loss against the learning rate.

        Returns:
            A curve for each task and optimizer, tasks first.
        """
        return [self._curve(bench, contender) for bench in self.benches for contender in self.plan.contenders]

    def _curve(self, bench: Bench, contender: Contender) -> Curve:
        found: dict[str, dict[float, tuple[float, ...]]] = {bench.task.headline: {}, "loss": {}}
        for rate in sorted(contender.learning_rates):
            runs = [self.log.finished(bench.key(contender, rate, seed)) for seed in self.plan.comparison.seeds]
            for name, points in found.items():
                values = [run["metrics"][name] for run in runs if run is not None]
                points[rate] = tuple(float(value) for value in values if value is not None)
        kind = "stock" if contender.stock else family(str(contender.args.optim))
        return Curve(bench.task.name, bench.task.headline, contender.label, kind, *found.values())

    def _result(self, bench: Bench, contender: Contender) -> Result:
        search_seed, seeds = self.plan.comparison.search_seed, self.plan.comparison.seeds
        best, tried, failures = self._best(bench, contender), [], []
        places = [(rate, search_seed) for rate in contender.learning_rates]
        places += [(best, seed) for seed in seeds if best is not None and (best, seed) not in places]
        for rate, seed in places:
            key = bench.key(contender, rate, seed)
            if message := self.log.failure(key):
                failures.append(f"lr {rate:g}, seed {seed} failed: {message}")
            elif seed == search_seed and self.log.finished(key):
                tried.append(rate)
        runs = [self.log.finished(bench.key(contender, best, seed)) for seed in seeds] if best is not None else []
        return Result(
            task=bench.task.name,
            headline=bench.task.headline,
            label=contender.label,
            stock=contender.stock,
            tried=tuple(tried),
            best=best,
            seeds=tuple(seeds),
            runs=tuple(run for run in runs if run is not None),
            failures=tuple(failures),
        )

    def _best(self, bench: Bench, contender: Contender) -> float | None:
        seed = self.plan.comparison.search_seed
        finished = {
            rate: run
            for rate in contender.learning_rates
            if (run := self.log.finished(bench.key(contender, rate, seed)))
        }

        def held_out(rate: float) -> float:
            loss = finished[rate]["selection_loss"]
            return math.inf if loss is None else loss

        def merit(rate: float) -> tuple[bool, float, float]:
            metrics = finished[rate]["metrics"]
            value, loss = metrics[bench.task.headline], metrics["loss"]
            # A model whose loss is not a number may still be right by chance; of equals the lower loss wins.
            return loss is not None, -math.inf if value is None else value, -math.inf if loss is None else -loss

        if self.plan.comparison.select_by == "selection_loss":
            return min(finished, key=held_out, default=None)
        return max(finished, key=merit, default=None)

    def _rate(self, slot: Slot) -> float | None:
        return slot.learning_rate or self._best(slot.bench, slot.contender)

    def _finished(self, slot: Slot) -> dict[str, Any] | None:
        rate = self._rate(slot)
        return None if rate is None else self.log.finished(slot.bench.key(slot.contender, rate, slot.seed))

    def _remaining(self, slots: list[Slot]) -> float:
        # Each takes as long as its like took, or else as the average.
        known = [(slot, run["all_seconds"]) for slot in self.slots if (run := self._finished(slot))]
        average = statistics.fmean([seconds for _, seconds in known] or [0.0])
        by_kind: dict[tuple[str, str], list[float]] = {}
        for slot, seconds in known:
            by_kind.setdefault((slot.bench.task.name, slot.contender.label), []).append(seconds)
        kinds = [(slot.bench.task.name, slot.contender.label) for slot in slots if not self._finished(slot)]
        return sum(statistics.fmean(by_kind.get(kind, [average])) for kind in kinds)


def _outcome(run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"failed, {run['failed'].splitlines()[0]}"
    return f"{run['headline']} {run['metrics'][run['headline']]:.3f} in {run['all_seconds']:.0f} s"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def write_report(comparison: Comparison) -> None:
    """Write the table and the pictures of the runs that are there.

    Args:
        comparison: the comparison.
    """
    from figures import plot_losses, plot_memory, plot_metrics, plot_rates

    output_dir, results = comparison.plan.output_dir, comparison.results()
    arguments = comparison.plan.comparison
    text = table(results, arguments.search_seed, comparison.plan.skipped, arguments.select_by)
    if comparison.plan.comparison.every_rate:
        curves = comparison.curves()
        text += rates_table(curves)
        plot_rates(output_dir / "rates.png", curves)
    (output_dir / "table.md").write_text(text, encoding="utf-8")
    for task in comparison.plan.comparison.tasks:
        of_task = [result for result in results if result.task == task]
        for against in ("steps", "seconds"):
            plot_losses(output_dir / f"{task}_loss_{against}.png", of_task, against)
    plot_metrics(output_dir / "metrics.png", results)
    plot_memory(output_dir / "memory.png", results)
    print(f"\n{text}\nruns.jsonl, table.md and the pictures are in {output_dir}")


def main(argv: list[str]) -> None:
    """Run the comparison.

    Args:
        argv: the command line without the program's name.
    """
    require("recipes", "datasets", "matplotlib", "scipy", "sklearn", "yaml")
    from datasets import disable_progress_bars

    disable_progress_bars()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]  # every start would be reported to have a new head
    plan = read_plan(argv)
    for note in plan.skipped:
        print(note)
    comparison = Comparison(plan, RunLog(plan.output_dir / "runs.jsonl"))
    try:
        comparison.run()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
    write_report(comparison)


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
