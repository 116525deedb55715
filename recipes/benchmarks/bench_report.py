"""The benchmark's numbers, their tables in Markdown, and what they must reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench_cases import ADAMW, PUBLISHED, SMALLEST, SPARSE_256, SPARSE_1024
from bench_measure import PARTS
from tables import table

MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """What was measured of one case. Times are medians, in seconds.

    Args:
        label: Its name.
        optimizer: Name of the optimizer.
        options: Its options.
        seconds: A step.
        parts: Those of `PARTS` that it has, and "rest"; empty for another library's optimizer.
        repeats: Every step that was timed, as it was.
        stream_seconds: Reading the window twice; 0 without one.
        stream_bytes: Bytes that were read then.
        memory: Bytes of the state by part.
        bytes_per_parameter: Of the whole state.
        peak: Bytes by which resident memory rose during a step, after a warm-up step.
        extrapolated_from: Rows of the window that was measured, where products and update were multiplied up from it.
    """

    label: str
    optimizer: str
    options: str
    seconds: float
    parts: dict[str, float]
    repeats: list[float]
    stream_seconds: float
    stream_bytes: int
    memory: dict[str, int]
    bytes_per_parameter: float
    peak: int
    extrapolated_from: int | None = None


@dataclass(frozen=True)
class Target:
    """A number that has to be reached.

    Args:
        what: What it is.
        measured: The number; None where a case was left out.
        limit: What it must be at least or at most.
        unit: Behind both.
        at_least: The limit is a lower one.
    """

    what: str
    measured: float | None
    limit: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether it is; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Report:
    """A whole run.

    Args:
        machine: Where, and with which versions.
        parameters: Entries of all parameters.
        accumulator_seconds: Reading and writing a float32 vector of that size once, the median.
        peak_method: How resident memory was measured.
        results: Of the cases.
        in_cache: Seconds of "dots" and "combine" if memory cost nothing, by label.
        training: Of training steps, by label.
        training_batch: Sequences and tokens of a batch.
        left_out: Cases that could not be built, with the reason.
        cold: Seconds of a first step without and with compiled kernels on disk; empty if not measured.
    """

    machine: dict[str, Any]
    parameters: int
    accumulator_seconds: float
    peak_method: str
    results: list[Timing]
    in_cache: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    training_batch: tuple[int, int] = (0, 0)
    left_out: dict[str, str] = field(default_factory=dict)
    cold: tuple[float, ...] = ()

    def targets(self) -> list[Target]:
        """What the measured numbers must reach; those of the cases that took part."""
        by_label = {result.label: result for result in self.results}
        published, large, small = by_label.get(PUBLISHED), by_label.get(SPARSE_1024), by_label.get(SPARSE_256)
        ratio = published.seconds / large.seconds if published and large else None
        targets = [Target(f"{PUBLISHED} / {SPARSE_1024}", ratio, 30.0, "x", at_least=True)]
        for label, result in ((SPARSE_1024, large), (SPARSE_256, small)):
            work = (
                None if result is None else (result.parts["products"] + result.parts["update"]) / result.stream_seconds
            )
            targets.append(Target(f"{label}: (products + update) / reading the window twice", work, 2.2, "x"))
        limit = max(0.06, 2.5 * self.accumulator_seconds)
        for label, result in ((SPARSE_1024, large), (SPARSE_256, small)):
            seconds = None if result is None else result.parts["compress"]
            targets.append(Target(f"{label}: compress", seconds, limit, " s"))
        reference = self.training.get(ADAMW)
        for label, most in ((SPARSE_1024, 1.20), (SPARSE_256, 1.07)):
            whole = self.training[label]["whole"] / reference["whole"] if reference and label in self.training else None
            targets.append(Target(f"training step, {label} / {ADAMW}", whole, most, "x"))
        smallest = by_label.get(SMALLEST)
        entries = None if smallest is None else smallest.memory["total"] - smallest.memory["gram"]
        size = None if entries is None else entries / self.parameters
        targets.append(Target(f"{SMALLEST}: state without K, bytes per parameter", size, 7.5, ""))
        for label, result in ((SPARSE_1024, large), (SPARSE_256, small), (SMALLEST, smallest)):
            most = 32.0 if result is None else max(0.05 * result.memory["total"] / MIB, 32.0)
            peak = None if result is None else result.peak / MIB
            targets.append(Target(f"{label}: resident memory, peak of a step", peak, most, " MiB"))
        return targets

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        targets = [{**asdict(target), "reached": target.reached} for target in self.targets()]
        return {**asdict(self), "targets": targets}

    def markdown(self) -> str:
        """All tables."""
        lines = [
            describe(self.machine),
            "",
            f"{self.parameters:,} parameters; every number is the median over its repeats, the cases "
            "took turns, their windows were full of random rows. Peak: by how much resident memory rises during a step "
            f"({self.peak_method}).",
            "",
            *self._steps(),
            *(f"\n{label}: left out, {reason}" for label, reason in self.left_out.items()),
            *self._extrapolations(),
            "",
            "Bytes per parameter:",
            "",
            *self._memory(),
            *self._floor(),
        ]
        if self.training:
            batch, length = self.training_batch
            lines += ["", f"A whole training step, batches of {batch} x {length} tokens:", "", *self._training()]
        if self.cold:
            lines += [
                "",
                "The first step of a fresh process, 1 M parameters: {:.2f} s, {:.2f} s with the kernels of an "
                "earlier process on disk.".format(*self.cold),
            ]
        lines += [
            "",
            *table(("what", "measured", "must reach", ""), map(_row, self.targets()), words=("must reach", "")),
        ]
        return "\n".join(lines) + "\n"

    def _steps(self) -> list[str]:
        adamw = next((result.seconds for result in self.results if result.label == ADAMW), None)
        heading = ("optimizer", "step, s", *PARTS, "rest")
        rows = []
        for result in self.results:
            parts = [_seconds(result.parts.get(part)) for part in (*PARTS, "rest")]
            rows.append((
                result.label + ("*" if result.extrapolated_from else ""),
                _seconds(result.seconds),
                *parts,
                _seconds(result.stream_seconds),
                "-" if adamw is None else f"{result.seconds / adamw:.1f}",
                f"{result.bytes_per_parameter:.2f}",
                f"{result.peak / MIB:.0f}",
            ))
        return table((*heading, "window read twice", "/ AdamW", "bytes / parameter", "peak, MiB"), rows)

    def _extrapolations(self) -> list[str]:
        return [
            f"\n\\* memory had room for {result.extrapolated_from} rows: products and update were measured there and "
            "multiplied up in proportion to m; the solve is that of the smaller window, and so are the bytes"
            for result in self.results
            if result.extrapolated_from
        ]

    def _memory(self) -> list[str]:
        parts = ("indices", "values", "error", "momentum", "metric", "gram", "total")
        rows = [
            (result.label, *(f"{result.memory[part] / self.parameters:.2f}" for part in parts))
            for result in self.results
        ]
        return table(("optimizer", "indices", "values", "error", "moments", "metric", "Gram matrix", "all"), rows)

    def _floor(self) -> list[str]:
        if not self.in_cache:
            return []
        rows = []
        for result in self.results:
            if cached := self.in_cache.get(result.label):
                work = (result.parts[part] for part in ("products", "update"))
                alone = (cached["dots"], cached["combine"], result.stream_seconds)
                rows.append((result.label, *map(_seconds, (*work, *alone))))
        heading = (
            "optimizer",
            "products",
            "update",
            "dots, in the cache",
            "combine, in the cache",
            "window read twice",
        )
        return [
            "",
            "Where products and update spend their time: as in a step; their kernels on a window that stays in the "
            "cache, multiplied up to as many entries; and reading alone:",
            "",
            *table(heading, rows),
        ]

    def _training(self) -> list[str]:
        reference = self.training.get(ADAMW)
        rows = [
            (
                label,
                *(_seconds(run[name]) for name in ("forward_backward", "optimizer", "whole")),
                "-" if reference is None else f"{run['whole'] / reference['whole']:.3f}",
            )
            for label, run in self.training.items()
        ]
        return table(("optimizer", "forward + backward, s", "optimizer, s", "whole, s", "/ AdamW"), rows)


def describe(machine: dict[str, Any]) -> str:
    """The machine in a line.

    Args:
        machine: From `bench_measure.machine`.

    Returns:
        The line.
    """
    versions = ", ".join(f"{name} {machine[name]}" for name in ("hf_efcp", "torch", "numba", "transformers", "python"))
    load = machine["load_average"]
    busy = "" if load is None else f"load average {load:.1f} at the start, "
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory'] / 2**30:.0f} GiB, {busy}{versions}, seed {machine['seed']}"
    )


def _row(target: Target) -> tuple[str, str, str, str]:
    measured = "not measured" if target.measured is None else f"{target.measured:.3g}{target.unit}"
    limit = f"{'at least' if target.at_least else 'at most'} {target.limit:.3g}{target.unit}"
    return target.what, measured, limit, {None: "-", True: "reached", False: "MISSED"}[target.reached]


def _seconds(value: float | None) -> str:
    return f"{value:.3f}" if value else "-"
