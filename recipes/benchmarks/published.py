"""Run the rows of published tables, and set what has run beside the published numbers.

    python recipes/benchmarks/published.py --list
    python recipes/benchmarks/published.py --row bert-tiny/mnli/mfac
    python recipes/benchmarks/published.py --row bert-tiny/mrpc/mfac bert-tiny/mrpc/adam --seeds 42 7 -- --data_dir GLUE
    python recipes/benchmarks/published.py --collect

A row is a YAML file under recipes/configs/published/ with flags; `published_rows.py` has all of them. What stands
behind `--` goes to the program that trains. Every run has a folder `output_dir/<row>/seed-<seed>`: interrupt the
program and start it again, and only what is not there is run. `--collect` writes `published.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _recipes  # noqa: F401
from cli import explained, find_config, flag_name, read_yaml
from published_rows import ROWS, SEEDS, TUNED_ADAM, Number, Row
from tables import table

RECIPES = Path(__file__).resolve().parents[1]
_NAMES = {"command": "the command", "config": "the configuration", "extra": "the flags"}
# What may be given behind `--` without making another experiment of it.
_SAME_EXPERIMENT = {"data_dir", "dataloader_num_workers", "per_device_eval_batch_size", "disable_tqdm", "report_to"}


def select(names: Sequence[str]) -> dict[str, Row]:
    """The rows with these names.

    Args:
        names: of `ROWS`.

    Returns:
        The rows, by name.

    Raises:
        ValueError: if there is no such row.
    """
    for name in names:
        if name not in ROWS:
            raise ValueError(f"there is no row {name!r}; --list names them, such as {next(iter(ROWS))}")
    return {name: ROWS[name] for name in names}


def run(name: str, row: Row, seed: int, folder: Path, extra: Sequence[str]) -> bool:
    """Do one run, unless it is there.

    Args:
        name: the row's name.
        row: the row.
        seed: the seed.
        folder: where all rows are.
        extra: further flags.

    Returns:
        Whether it ran.

    Raises:
        RuntimeError: if the program that trains failed.
        ValueError: if the run is there with other settings.
    """
    place = folder / name / f"seed-{seed}"
    asked = {**_settings(row), "extra": list(extra)}
    if (place / "metrics.json").exists():
        noted = _flags(place)
        for what, value in asked.items():
            before = noted.get(what, "that an older version did not note")
            if before != value:
                raise ValueError(
                    f"{place} was run with {_NAMES[what]} {_apart(before, value)}, and not {_apart(value, before)}: "
                    "choose another --output_dir, or delete that folder to run it anew"
                )
        return False
    place.mkdir(parents=True, exist_ok=True)
    (place / "flags.json").write_text(json.dumps(asked) + "\n", encoding="utf-8")
    command = [sys.executable, str(RECIPES / f"{row.script}.py"), *row.command(), f"--seed={seed}"]
    # A process of its own: the window's memory is free when it ends.
    ended = subprocess.run([*command, f"--output_dir={place}", *extra], check=False)
    if ended.returncode != 0 or not (place / "metrics.json").exists():
        raise RuntimeError(f"{name}, seed {seed}, failed with the exit status {ended.returncode}; see its output above")
    return True


def _settings(row: Row) -> dict[str, Any]:
    command = row.command()
    return {"command": command, "config": read_yaml(find_config(command[0]))}


def _apart(settings: Any, others: Any) -> Any:
    # Of a configuration, what differs.
    if not isinstance(settings, dict) or not isinstance(others, dict):
        return settings
    return {key: settings.get(key) for key in sorted({*settings, *others}) if settings.get(key) != others.get(key)}


def _flags(place: Path) -> dict[str, Any]:
    """What `run` noted of a run: `command`, `config` and `extra`. An older version noted `extra` alone, as a list."""
    file = place / "flags.json"
    noted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {"extra": noted} if isinstance(noted, list) else dict(noted)


def collect(folder: Path) -> str:
    """Set what has run beside what was published.

    Args:
        folder: where all rows are.

    Returns:
        A table in Markdown, of every row; what has not run has a dash.
    """
    head = ("row", "metric", "published", "here", "runs", "difference", "in standard deviations")
    lines, remarks = [], []
    for name, row in ROWS.items():
        values, changed = _measured(folder / name, row)
        here = _number(values)
        lines.append((
            name,
            row.metric,
            _text(row.number),
            _text(here),
            str(len(values)),
            *_difference(row.number, here),
        ))
        remarks += [f"- {name}: not the published settings, but {what}" for what in sorted(changed)]
    return (
        "\n".join([
            "Percent on the validation split: mean ± sample standard deviation. Published numbers are as published, of "
            "five runs, and were not measured here. The last column divides the difference by the standard deviation "
            "of a run, the root of the mean of both variances, or the one that is known.",
            "",
            TUNED_ADAM,
            "",
            *table(head, lines, words=("metric",)),
            "",
            *remarks,
        ]).rstrip()
        + "\n"
    )


def _measured(folder: Path, row: Row) -> tuple[list[float], set[str]]:
    values, changed = [], set()
    for file in sorted(folder.glob("seed-*/metrics.json")):
        value: Any = json.loads(file.read_text(encoding="utf-8"))["metrics"][row.metric]
        if value is None:  # diverged
            changed.add(f"no number for {row.metric} in {file.parent.name}")
            continue
        values.append(100.0 * float(value))
        flags = _flags(file.parent)
        if set(filter(None, map(flag_name, flags["extra"]))) - _SAME_EXPERIMENT:
            changed.add(f"with {' '.join(flags['extra'])}")
        for what, wanted in _settings(row).items():
            if flags.get(what, wanted) != wanted:
                changed.add(f"with {_NAMES[what]} {_apart(flags[what], wanted)}")
    return values, changed


def _number(values: list[float]) -> Number | None:
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _text(number: Number | None) -> str:
    if number is None:
        return "-"
    return f"{number[0]:.2f}" + ("" if number[1] is None else f" ± {number[1]:.2f}")


def _difference(published: Number | None, here: Number | None) -> tuple[str, str]:
    if published is None or here is None:
        return "-", "-"
    difference = here[0] - published[0]
    known = [number[1] for number in (published, here) if number[1] is not None]
    deviation = math.sqrt(statistics.fmean(value**2 for value in known)) if known else 0.0
    return f"{difference:+.2f}", f"{difference / deviation:+.1f}" if deviation else "-"


def main() -> None:
    """List rows, run some, or collect what has run.

    Raises:
        ValueError: if a row or a seed is not valid.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="name the rows and the commands that they stand for")
    what.add_argument("--row", nargs="+", help="run these")
    what.add_argument("--collect", action="store_true", help="write the table of what has run")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: five for the model cards of M-FAC, else one")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/published/rows"))
    parser.add_argument("extra", nargs="*", help="behind --: flags for the program that trains")
    args = parser.parse_args()
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds must have each seed once: {args.seeds}")
    if args.list:
        for name, row in ROWS.items():
            print(f"{name}: python recipes/{row.script}.py {' '.join(row.command())}")
    elif args.row:
        for name, row in select(args.row).items():
            for seed in args.seeds or SEEDS[: row.seeds]:
                ran = run(name, row, seed, args.output_dir, args.extra)
                print(f"{name}, seed {seed}: {'done' if ran else 'was there'}", flush=True)
    else:
        text = collect(args.output_dir)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "published.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    with explained():
        main()
