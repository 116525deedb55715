"""What the site has beside its pages: tables of the runs under recipes/results, and the pictures there.

A line `<!-- runs: NAME.jsonl -->` of a page becomes the table of that file, so that no number is written down twice.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hf_efcp import OPTIMIZERS
from hf_efcp.factory import parse_optim_args

RESULTS = Path(__file__).parents[1] / "recipes" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Put the pictures of the results into `results/` of the site.

    Args:
        files: The site's files.
        config: Its settings.

    Returns:
        The files, with the pictures.
    """
    from mkdocs.structure.files import File  # the tests read the tables without it

    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of a page.

    Args:
        markdown: The page as it is written.
        **_: Not used.

    Returns:
        The page with its tables.
    """
    return re.sub(r"^<!-- runs: (\S+) -->$", lambda found: runs_table(RESULTS / found[1]), markdown, flags=re.MULTILINE)


def runs_table(path: Path) -> str:
    """The mean of the headline metric, and of the loss, of each optimizer at each learning rate.

    The loss is that on the part of the training split that chose the rate, or on the validation split where none did.

    Args:
        path: A file of runs, as `compare_optimizers.py` writes it.

    Returns:
        A table in Markdown for each task.
    """
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rates = sorted({run["learning_rate"] for run in runs})
    tables = []
    for task in dict.fromkeys(run["task"] for run in runs):
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            if run["task"] == task:
                rows[_settings(run)].append(run)
        head = ["optimizer", "bytes per parameter", *(f"{rate:g}" for rate in rates), "seeds"]
        tables.append(f"`{task}`\n\n" + "\n".join([_line(head), _line(["---"] * len(head)), *_lines(rows, rates)]))
    return "\n\n".join(tables)


def _settings(run: dict[str, Any]) -> str:
    """The identity of a run's optimizer; runs with equal settings may have been written down in different words."""
    return json.dumps([run["optimizer"], run["key"]["options"]], sort_keys=True)


def _lines(rows: dict[str, list[dict[str, Any]]], rates: list[float]) -> list[str]:
    lines = []
    for runs in rows.values():
        memory = fmean(run["optimizer_memory"]["total"] / run["parameters"] for run in runs)
        at = [[run for run in runs if run["learning_rate"] == rate] for rate in rates]
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
        lines.append(_line([_name(runs), f"{memory:.1f}", *map(_numbers, at), seeds]))
    return lines


def _name(runs: list[dict[str, Any]]) -> str:
    """The optimizer and the options that make it today, whatever the defaults were when it ran."""
    name, options = runs[0]["optimizer"], runs[0]["key"]["options"]
    written = sorted({run["optim_args"] or "" for run in runs}, key=len)
    if name in OPTIMIZERS:
        made = {words: _differences(name, words, options) for words in written}
        without = ",".join(f"{key}={value}" for key, value in _differences(name, "", options).items())
        written = [words for words, differences in made.items() if not differences] or [without]
    return f"`{name}`" + (f", `{written[0]}`" if written[0] else "")


def _differences(name: str, optim_args: str, options: dict[str, Any]) -> dict[str, Any]:
    """Which of a run's options an optimizer does not have that is made from `optim_args`."""
    given = parse_optim_args(name, optim_args)
    own = {key: value for key, value in given.items() if key not in ("exclude", "exclude_lr")}
    group = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(1))], **own).param_groups[0]
    return {key: value for key, value in options.items() if key in group and group[key] != value}


def _numbers(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    found = [(run["metrics"][run["headline"]], run.get("selection_loss", run["metrics"]["loss"])) for run in runs]
    diverged = sum(None in pair for pair in found)
    if diverged:
        return f"{diverged} of {len(runs)} diverged"
    headline, loss = (fmean(values) for values in zip(*found, strict=True))
    return f"{headline:.3f} ({loss:.3f})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
