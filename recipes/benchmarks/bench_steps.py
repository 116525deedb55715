"""The step alone: cases that take turns on one model, and the medians of what they take."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from bench_baselines import PUBLISHED_ROWS, AsPublished
from bench_cases import Case, available_memory, build, state_memory, window_tensors
from bench_measure import peak_memory, read_and_write, stream, timed_step
from bench_report import Report, Timing
from peers import parse_options

from hf_efcp import EFCP
from hf_efcp.kernels import choose
from hf_efcp.threads import one_thread

Step = tuple[float, dict[str, float]]
_IN_CACHE = 1 << 18  # entries of a parameter whose window stays in the cache: 10 MB at m = 1024 and 1 %


def build_all(
    cases: list[Case], model: torch.nn.Module, seed: int
) -> tuple[dict[str, torch.optim.Optimizer], dict[str, str]]:
    """Make the optimizers, with full windows.

    Args:
        cases: Which.
        model: Its parameters have gradients.
        seed: Seed of the windows.

    Returns:
        The optimizers by label, and by label why an optional case was left out.

    Raises:
        ImportError: A case that is not optional needs a package.
        MemoryError: Its state would not fit.
        ValueError: Its options are wrong.
    """
    built: dict[str, torch.optim.Optimizer] = {}
    left_out = {}
    # The published algorithm takes what memory the others leave.
    for case in sorted(cases, key=lambda case: case.optimizer == "published"):
        try:
            print(f"filling the window: {case.label}", flush=True)
            built[case.label] = build(case, model, seed, available_memory)
        except (ImportError, MemoryError, ValueError) as error:
            if not case.optional:
                raise
            left_out[case.label] = str(error)
            print(f"left out: {error}", flush=True)
    return built, left_out


def measure_steps(
    cases: list[Case],
    built: dict[str, torch.optim.Optimizer],
    model: torch.nn.Module,
    here: dict[str, Any],
    *,
    repeats: int,
    published_repeats: int,
) -> Report:
    """Time steps in turns. One more warms up, and one shows the memory: the same one for the published algorithm.

    Args:
        cases: In the order of the report.
        built: Their optimizers by label; those without one are left out.
        model: The model.
        here: The machine, for the report.
        repeats: Steps of each.
        published_repeats: Steps of the published algorithm.

    Returns:
        The report, without training steps.
    """
    numel = sum(param.numel() for param in model.parameters())
    accumulator, accumulator_seconds = torch.ones(numel), []
    steps: dict[str, list[Step]] = defaultdict(list)
    streams: dict[str, list[tuple[float, int]]] = defaultdict(list)
    peaks: dict[str, int] = {}
    method = ""
    for turn in range(repeats + 1):
        accumulator_seconds.append(read_and_write(accumulator))
        for label, optimizer in built.items():
            published = isinstance(optimizer, AsPublished)
            if published and turn > published_repeats:
                continue
            if turn:
                steps[label].append(timed_step(optimizer))
            else:
                if not published:  # a step of which takes as long as a hundred of the others
                    optimizer.step()
                peaks[label], method = peak_memory(optimizer.step)
            # Behind the step, which would find a small window in the cache.
            streams[label].append(stream(window_tensors(optimizer)))
        print(f"steps: round {turn} of {repeats}", flush=True)
    results = [
        _result(case, built[case.label], numel, steps[case.label], streams[case.label], peak)
        for case in cases
        if (peak := peaks.get(case.label)) is not None
    ]
    return Report(here, numel, statistics.median(accumulator_seconds), method, results)


def measure_in_cache(
    cases: list[Case], built: dict[str, torch.optim.Optimizer], *, repeats: int, seed: int
) -> dict[str, dict[str, float]]:
    """Time dots and combine on a window that stays in the cache: what they would take if memory cost nothing.

    Args:
        cases: Of sparse windows.
        built: Their optimizers by label; those without one are left out.
        repeats: Calls of each.
        seed: Seed of the window.

    Returns:
        By label, the seconds of "dots" and "combine", medians, multiplied up to as many entries as the window has.
    """
    found = {}
    for case in cases:
        if case.label in built:
            small, seconds = _dots_and_combine(case, repeats, seed)
            entries = [sum(tensor.nbytes for tensor in window_tensors(some)) for some in (built[case.label], small)]
            found[case.label] = {name: entries[0] / entries[1] * taken for name, taken in seconds.items()}
    return found


def _dots_and_combine(case: Case, repeats: int, seed: int) -> tuple[EFCP, dict[str, float]]:
    """An optimizer over one small parameter, and the seconds of both."""
    param = torch.nn.Parameter(torch.zeros(_IN_CACHE))
    param.grad = torch.randn(_IN_CACHE, generator=torch.Generator().manual_seed(seed))
    optimizer = build(case, torch.nn.ParameterList([param]), seed, available_memory)
    assert isinstance(optimizer, EFCP)
    window, state, shape = optimizer._layout.window, optimizer.state[param], param.shape
    kernels, rows = choose("auto", param.device), optimizer.param_groups[0]["num_grads"]
    weights = torch.linspace(-1.0, 1.0, rows, dtype=torch.float64)
    with one_thread():
        return optimizer, {
            "dots": _median_seconds(lambda: window.dots([(state, shape)], 0, rows, kernels), repeats),
            "combine": _median_seconds(
                lambda: [
                    window.combine(state, shape, span, weights, kernels) for span in window.spans(shape, param.device)
                ],
                repeats,
            ),
        }


def _median_seconds(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first warms up


def _result(
    case: Case,
    optimizer: torch.optim.Optimizer,
    numel: int,
    steps: list[Step],
    streams: list[tuple[float, int]],
    peak: int,
) -> Timing:
    seconds = statistics.median(whole for whole, _ in steps)
    parts = {part: statistics.median(parts[part] for _, parts in steps) for part in steps[0][1]}
    extrapolated_from = None
    if isinstance(optimizer, AsPublished):
        wanted = parse_options(case.options).get("num_grads", PUBLISHED_ROWS)
        if wanted > optimizer.num_grads:
            extrapolated_from = optimizer.num_grads
            for part in ("products", "update"):
                more = (wanted / optimizer.num_grads - 1.0) * parts[part]
                parts[part] += more
                seconds += more
    memory = state_memory(optimizer)
    return Timing(
        label=case.label,
        optimizer=case.optimizer,
        options=case.options,
        seconds=seconds,
        parts=parts,
        repeats=[whole for whole, _ in steps],
        stream_seconds=statistics.median(seconds for seconds, _ in streams) if streams[0][1] else 0.0,
        stream_bytes=streams[0][1],
        memory=memory,
        bytes_per_parameter=memory["total"] / numel,
        peak=peak,
        extrapolated_from=extrapolated_from,
    )
