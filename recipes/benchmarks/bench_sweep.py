"""How the cost of a step of sparse M-FAC, the paper's rule, grows with the parameters, the window and the density."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from bench_cases import Case, build
from bench_measure import timed_step
from tables import table

_MATRIX = 1 << 18  # entries of a parameter, as of a layer of a small Transformer
_NUM_GRADS, _DENSITY = 256, 0.01  # where they are not swept
# Setting, the others in words, and (parameters, m, density) at each size.
_Plan = tuple[str, str, list[tuple[float, float, float]]]


@dataclass(frozen=True)
class Sweep:
    """One setting doubled several times. Times are medians, in seconds.

    Args:
        name: The setting.
        fixed: The others, in words.
        sizes: Its values, ascending.
        seconds: A step at each.
        parts: Its parts at each.
    """

    name: str
    fixed: str
    sizes: list[float]
    seconds: list[float]
    parts: list[dict[str, float]]

    @property
    def growing(self) -> list[float]:
        """The step without the solve, which grows with the third power of the window."""
        return [seconds - parts["solve"] for seconds, parts in zip(self.seconds, self.parts, strict=True)]

    @property
    def offset(self) -> float:
        """The part `a >= 0` of `growing` that does not grow: `a + b size` fitted to it, relative errors least."""
        sizes, times = np.array(self.sizes), np.array(self.growing)
        (a, _), *_ = np.linalg.lstsq(np.stack((1.0 / times, sizes / times), axis=1), np.ones(len(times)))
        return max(0.0, float(a))

    def ratios(self) -> list[float | None]:
        """By how much `growing`, above its offset, grows at each doubling.

        Returns:
            The ratios; None where less than half of the offset is above it, so that noise would be divided by noise.
        """
        above = [seconds - self.offset for seconds in self.growing]
        return [b / a if a > 0.5 * self.offset else None for a, b in pairwise(above)]

    @property
    def linear(self) -> bool:
        """Whether every doubling that has a ratio doubles the time above the fixed part, within 15 %."""
        ratios = [ratio for ratio in self.ratios() if ratio is not None]
        return bool(ratios) and all(1.7 <= ratio <= 2.3 for ratio in ratios)

    def markdown(self) -> list[str]:
        """The sweep as a table."""
        heading = (self.name, "step, s", *self.parts[0])
        rows = []
        for size, seconds, parts, ratio in zip(
            self.sizes, self.seconds, self.parts, [None, *self.ratios()], strict=True
        ):
            cells = [f"{taken:.4f}" for taken in parts.values()]
            rows.append((f"{size:g}", f"{seconds:.4f}", *cells, "-" if ratio is None else f"{ratio:.2f}"))
        verdict = "reached" if self.linear else "MISSED"
        note = (
            f"{self.fixed}; the fixed part is {self.offset:.4f} s; every doubling within 15 % of 2x, where the rest is "
            f"more than half of it: {verdict}."
        )
        return [note, "", *table((*heading, "growth above the fixed part"), rows), ""]


def run_sweeps(largest: int, doublings: int, *, repeats: int, seed: int, available: Callable[[], int]) -> list[Sweep]:
    """Sweep the parameters, the window and the density.

    Args:
        largest: The largest number of parameters; the other sweeps are at a quarter and an eighth of it.
        doublings: Of each setting.
        repeats: Steps at each size, in turns.
        seed: Seed of gradients and windows.
        available: Tells the bytes that are free.

    Returns:
        The sweeps.
    """
    scales = [2.0**-power for power in range(doublings, -1, -1)]
    quarter, eighth = largest // 4, largest // 8
    percent = f"density {_DENSITY:.0%}"
    plans: list[_Plan] = [
        ("parameters", f"m = {_NUM_GRADS}, {percent}", [(s * largest, _NUM_GRADS, _DENSITY) for s in scales]),
        ("num_grads", f"{quarter / 1e6:.2g} M parameters, {percent}", [(quarter, s * 2048, _DENSITY) for s in scales]),
        (
            "density",
            f"{eighth / 1e6:.2g} M parameters, m = {_NUM_GRADS}",
            [(eighth, _NUM_GRADS, s * 0.08) for s in scales],
        ),
    ]
    sweeps = []
    for column, (name, fixed, settings) in enumerate(plans):
        optimizers = []
        for numel, num_grads, density in settings:
            print(f"{name}: {int(numel):,} parameters, m = {int(num_grads)}, density {density:g}", flush=True)
            options = f"num_grads={int(num_grads)},density={density},metric=none"
            case = Case(f"{name} {options}", "sparse_mfac", options)
            optimizers.append(build(case, _model(int(numel), seed), seed, available))
        runs: list[list[tuple[float, dict[str, float]]]] = [[] for _ in optimizers]
        for turn in range(repeats + 1):
            for optimizer, times in zip(optimizers, runs, strict=True):
                run = timed_step(optimizer)
                if turn:  # the first round warms up
                    times.append(run)
            print(f"{name}: round {turn} of {repeats}", flush=True)
        seconds = [statistics.median(run[0] for run in times) for times in runs]
        parts = [{part: statistics.median(run[1][part] for run in times) for part in times[0][1]} for times in runs]
        sweeps.append(Sweep(name, fixed, [setting[column] for setting in settings], seconds, parts))
    return sweeps


def _model(numel: int, seed: int) -> torch.nn.Module:
    """So many parameters, in matrices of one size, with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [_MATRIX] * (numel // _MATRIX) + ([numel % _MATRIX] if numel % _MATRIX else [])
    model = torch.nn.ParameterList(torch.zeros(size) for size in sizes)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return model
