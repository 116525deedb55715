"""What a step costs, in time and memory: EFCP's optimizers with full windows beside AdamW, in one run.

    python recipes/benchmarks/benchmark_step.py
    python recipes/benchmarks/benchmark_step.py --only "AdamW|1024" --train_repeats 0
    python recipes/benchmarks/benchmark_step.py --case "small: sparse_mfac num_grads=64,metric=none" lowrank_ggt
    python recipes/benchmarks/benchmark_step.py --sweep

The model is the demo extra's MiniLM (22.7 M parameters). First the step alone, on random gradients, by part; among the
cases is the algorithm as it was published, in plain torch. Then whole training steps. Windows are filled by
writing random rows into the state, which takes seconds where a thousand steps would take an hour. The cases take
turns, and medians are reported, beside the time of reading the window twice, which is the floor of what a step over
that window can cost. `--sweep` doubles the parameters, the window and the density of sparse M-FAC instead.

results.json, results.md and results.png, or sweep.json and so on, are written to `--output_dir`.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _recipes  # noqa: F401
import torch
from arguments import PACKAGED, ModelArguments
from bench_cases import (
    ADAMW,
    DEFAULTS,
    LOW_RANK,
    MOMENTS,
    SPARSE_256,
    SPARSE_1024,
    Case,
    available_memory,
    parse_case,
)
from bench_figures import plot_report, plot_sweeps
from bench_measure import cold_first_step, machine
from bench_report import describe
from bench_steps import build_all, measure_in_cache, measure_steps
from bench_sweep import run_sweeps
from bench_training import measure_training
from cli import require
from training import load_model

from hf_efcp.glue import get_task


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark.

    Args:
        argv: The command line; None is the program's own.
    """
    arguments = _parser().parse_args(argv)
    require("recipes", "matplotlib", "psutil")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.sweep:
        _sweep(arguments)
    else:
        _benchmark(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    trained = "|".join(map(re.escape, (ADAMW, LOW_RANK, MOMENTS, SPARSE_256, SPARSE_1024)))
    add = parser.add_argument
    add(
        "--case",
        nargs="+",
        type=_case,
        default=[],
        help='more of them, or others of the same label: "label: optimizer options"',
    )
    add(
        "--only",
        type=_regex,
        default=re.compile(""),
        help="a regular expression: only cases whose label it matches somewhere",
    )
    add("--repeats", type=_positive, default=9, help="steps of each case; one more warms up, one shows the memory")
    add(
        "--published_repeats",
        type=_positive,
        default=3,
        help="steps of the published algorithm; one more warms up",
    )
    add(
        "--train",
        type=_regex,
        default=re.compile(trained),
        help="a regular expression for whole labels: who makes training steps",
    )
    add("--train_repeats", type=int, default=9, help="training steps of each, beside one that warms up; 0 for none")
    add("--batch", type=int, default=32, help="sequences of a training step")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--model_name_or_path", default=PACKAGED, help=f"a folder, a name on the Hub, or {PACKAGED}")
    add("--cold", action="store_true", help="also the first step of fresh processes, which compiles the kernels")
    add("--sweep", action="store_true", help="double the parameters, the window and the density instead")
    add("--sweep_parameters", type=_positive, default=1 << 25, help="the largest number of them")
    add("--sweep_doublings", type=_positive, default=5)
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, default=Path("outputs/benchmark_step"))
    return parser


def _case(text: str) -> Case:
    try:
        return parse_case(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def _benchmark(arguments: argparse.Namespace) -> None:
    here = machine(arguments.seed)
    _, model = load_model(ModelArguments(arguments.model_name_or_path), get_task("sst2"))
    generator = torch.Generator().manual_seed(arguments.seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3

    by_label = {case.label: case for case in (*DEFAULTS, *arguments.case)}
    cases = [case for case in by_label.values() if arguments.only.search(case.label)]
    built, left_out = build_all(cases, model, arguments.seed)
    report = measure_steps(
        cases, built, model, here, repeats=arguments.repeats, published_repeats=arguments.published_repeats
    )
    sparse = [case for case in cases if case.label in (SPARSE_256, SPARSE_1024)]
    in_cache = measure_in_cache(sparse, built, repeats=10 * arguments.repeats, seed=arguments.seed)
    trained = {label: optimizer for label, optimizer in built.items() if arguments.train.fullmatch(label)}
    training: dict[str, Any] = {}
    if trained and arguments.train_repeats:
        training = measure_training(
            model,
            trained,
            repeats=arguments.train_repeats,
            batch=arguments.batch,
            length=arguments.length,
            seed=arguments.seed,
        )
    batch = (arguments.batch, arguments.length)
    cold = cold_first_step() if arguments.cold else ()
    report = replace(report, in_cache=in_cache, training=training, training_batch=batch, left_out=left_out, cold=cold)
    _write(arguments.output_dir, "results", report.to_dict(), report.markdown())
    plot_report(arguments.output_dir / "results.png", report)


def _sweep(arguments: argparse.Namespace) -> None:
    here = machine(arguments.seed)
    sweeps = run_sweeps(
        arguments.sweep_parameters,
        arguments.sweep_doublings,
        repeats=arguments.repeats,
        seed=arguments.seed,
        available=available_memory,
    )
    content = {
        "machine": here,
        "sweeps": [{**asdict(s), "offset": s.offset, "ratios": s.ratios(), "linear": s.linear} for s in sweeps],
    }
    lines = [describe(here), "", *(line for sweep in sweeps for line in sweep.markdown())]
    _write(arguments.output_dir, "sweep", content, "\n".join(lines))
    plot_sweeps(arguments.output_dir / "sweep.png", sweeps)


def _write(folder: Path, name: str, content: dict[str, Any], text: str) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{folder / name}.json, .md and .png have the rest")


if __name__ == "__main__":
    main()
