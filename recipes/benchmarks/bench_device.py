"""What a step costs on a GPU: CUDA events, bytes of the allocator, and a measured copy as the floor.

The model is a BERT-base of random weights under bfloat16 autocast. Cases take turns; windows are filled by steps,
which a GPU does in seconds. Kernels are compiled, and caches filled, before anything is timed.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from bench_cases import ADAMW, Case
from training import state_bytes

from hf_efcp import EFCP, create_optimizer
from hf_efcp.factory import parse_optim_args

CAPACITIES = (16, 64, 256, 1024)
CASES = (
    Case(ADAMW, "adamw"),
    *(Case(f"low-rank M-FAC, m = {m}", "lowrank_mfac", f"num_grads={m}") for m in CAPACITIES),
    *(Case(f"sparse M-FAC, m = {m}", "sparse_mfac", f"num_grads={m}") for m in CAPACITIES),
    *(
        Case(f"{name} M-FAC, m = 16, in a CUDA graph", f"{key}_mfac", "num_grads=16,nonfinite=ignore,capturable=true")
        for name, key in (("low-rank", "lowrank"), ("sparse", "sparse"))
    ),
)
_COPIED = 1 << 30  # bytes of the copy that is the floor
_WARM_UP = 3


class Clock(Protocol):
    """What tells time and memory of a device."""

    device: torch.device

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long the device takes for some work."""

    def peak(self, work: Callable[[], Any]) -> int:
        """By how many bytes memory rises above what it is now, while something runs."""

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The same work as one graph."""

    def describe(self) -> dict[str, str]:
        """The card and its software."""


class CudaClock:
    """CUDA events, and the statistics of torch's allocator. The same for ROCm."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def seconds(self, work: Callable[[], Any]) -> float:
        """Between two events on the stream, with nothing else in it.

        Args:
            work: What launches it.

        Returns:
            Seconds.
        """
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000.0

    def peak(self, work: Callable[[], Any]) -> int:
        """By the allocator's own high-water mark.

        Args:
            work: What allocates.

        Returns:
            Bytes.
        """
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Capture some work.

        Args:
            work: What launches it; it has run before.

        Returns:
            What replays it.
        """
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def describe(self) -> dict[str, str]:
        """Name of the card, and versions.

        Returns:
            By what they are called.
        """
        return {"card": torch.cuda.get_device_name(self.device), "cuda": str(torch.version.cuda or torch.version.hip)}


@dataclass(frozen=True)
class Line:
    """What was measured of a case.

    Args:
        label: Its name.
        backend: What stepped it.
        steps: Seconds of every step.
        whole: Seconds of every training step, forward and backward included.
        state: Bytes of the state.
        moved: Bytes that a step has to read or write at least: gradient, parameters twice, and the state once.
        peak: Bytes that a step takes beside its state.
    """

    label: str
    backend: str
    steps: list[float]
    whole: list[float]
    state: int
    moved: int
    peak: int


def measure_device(
    clock: Clock,
    model: torch.nn.Module,
    cases: Iterable[Case] = CASES,
    *,
    repeats: int,
    batch: int,
    length: int,
    seed: int,
) -> dict[str, Any]:
    """Time steps of the optimizers, and training steps with each.

    Args:
        clock: Of the device.
        model: A sequence classifier of transformers, on the device.
        cases: At learning rate 0, so that all train the same model.
        repeats: Steps of each.
        batch: Sequences of a batch.
        length: Tokens of a sequence.
        seed: Of tokens and gradients.

    Returns:
        Machine, bandwidth, seconds of forward and backward, and a `Line` for each.
    """
    torch.manual_seed(seed)
    inputs = _inputs(model, batch, length, clock.device)
    lines, passes = [], [clock.seconds(lambda: _pass(model, inputs)) for _ in range(repeats + _WARM_UP)][_WARM_UP:]
    for case in cases:  # one after the other: all windows together may not fit
        optimizer = _build(case, model)
        _fill(optimizer, model)
        peak = clock.peak(optimizer.step)
        in_graph = "capturable=true" in case.options
        step = clock.captured(optimizer.step) if in_graph else optimizer.step
        for _ in range(_WARM_UP):
            step()
        steps = [clock.seconds(step) for _ in range(repeats)]

        def train(step: Callable[[], Any] = step, stay: bool = in_graph) -> None:
            _pass(model, inputs, stay=stay)
            step()

        whole = [clock.seconds(train) for _ in range(repeats)]
        state, size = state_bytes(optimizer), sum(p.numel() * p.element_size() for p in model.parameters())
        backend = optimizer.backend if isinstance(optimizer, EFCP) else "torch"
        lines.append(Line(case.label, backend, steps, whole, state, state + 3 * size, peak))
        print(f"{case.label}: {1000 * statistics.median(steps):.3f} ms", flush=True)
        del optimizer, step, train
    return {
        "machine": {**clock.describe(), **_versions(), "parameters": sum(p.numel() for p in model.parameters())},
        "bandwidth": _bandwidth(clock, repeats),
        "forward_backward": passes,
        "lines": [vars(line) for line in lines],
    }


def device_markdown(report: dict[str, Any]) -> str:
    """The report as a table.

    Args:
        report: From `measure_device`.

    Returns:
        Lines of Markdown.
    """
    machine, bandwidth = report["machine"], report["bandwidth"]
    median = statistics.median
    baseline = next((median(line["steps"]) for line in report["lines"] if line["label"] == ADAMW), None)
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        f"A copy on the device moves {bandwidth / 1e12:.2f} TB/s; forward and backward take "
        f"{1000 * median(report['forward_backward']):.1f} ms. The floor is the time of reading the state and the "
        "gradient and of reading and writing the parameters once, at that speed.",
        "",
        "| | backend | step, ms | floor, ms | of AdamW's | training step, ms | state, B/param | beside it, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in report["lines"]:
        step = median(line["steps"])
        ratio = "" if baseline is None else f"{step / baseline:.2f}"
        lines.append(
            f"| {line['label']} | {line['backend']} | {1000 * step:.3f} | {1000 * line['moved'] / bandwidth:.3f} "
            f"| {ratio} | {1000 * median(line['whole']):.2f} | {line['state'] / machine['parameters']:.2f} "
            f"| {line['peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _inputs(model: Any, batch: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    labels = torch.randint(0, model.config.num_labels, (batch,), device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def _pass(model: Any, inputs: dict[str, torch.Tensor], *, stay: bool = False) -> None:
    """Forward and backward in bfloat16 autocast; gradients `stay` where a graph has their addresses."""
    model.zero_grad(set_to_none=not stay)
    with torch.autocast(inputs["labels"].device.type, torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()


def _build(case: Case, model: torch.nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    arguments = parse_optim_args(case.optimizer, case.options)
    # The check of the gradients is left in, but in graphs, which cannot have it: it is what a user has.
    optimizer = create_optimizer(case.optimizer, model, lr=0.0, **arguments)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def _fill(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """As many steps on random gradients as the window has rows; the last gradients stay."""
    for _ in range(optimizer.param_groups[0].get("num_grads", 1)):
        for param in model.parameters():
            param.grad = torch.randn_like(param) * 1e-3
        optimizer.step()


def _bandwidth(clock: Clock, repeats: int) -> float:
    """Bytes that a copy reads and writes in a second."""
    size = _COPIED if clock.device.type == "cuda" else 1 << 20
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    times = [clock.seconds(lambda: target.copy_(source)) for _ in range(repeats + _WARM_UP)][_WARM_UP:]
    return 2 * size / statistics.median(times)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
