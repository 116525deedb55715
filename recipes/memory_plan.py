"""What the state of each optimizer takes for a model, before anything is loaded or allocated.

    python recipes/memory_plan.py google-bert/bert-base-uncased --memory_budget 8B/param
    python recipes/memory_plan.py my_folder/config.json --optim lowrank_mfac --optim_args rank=8,exclude=embeddings

Only the model's configuration is read: the model is made of it without weights. Its own size, its gradients and its
activations are not in the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from arguments import PACKAGED, model_source
from cli import explained
from data import NO_HUB

from hf_efcp import OPTIMIZERS, MemoryPlan, create_optimizer, estimate_memory
from hf_efcp.budget import in_bytes
from hf_efcp.factory import parse_optim_args


def main(argv: list[str] | None = None) -> None:
    """Print the table.

    Args:
        argv: the command line without the program's name; None takes the process's own.

    Raises:
        ValueError: if the budget cannot be read, or there are options of no optimizer.
    """
    arguments = _parser().parse_args(argv)
    if arguments.memory_budget is not None:
        in_bytes(arguments.memory_budget, 1)  # refused before a model is looked for
    if arguments.optim is None and arguments.optim_args is not None:
        raise ValueError("--optim_args belong to one optimizer: name it with --optim")
    model = skeleton(arguments.model)
    print(f"{arguments.model}: {type(model).__name__}, {_parameters(model):,} parameters\n")
    if arguments.optim is None:
        print(table(model, arguments.memory_budget))
    else:
        print(plan(model, arguments.optim, arguments.optim_args, arguments.memory_budget))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Bytes of the optimizers' state for a model.", allow_abbrev=False)
    parser.add_argument("model", help=f"a folder, a config.json, a name on the Hub, or {PACKAGED}")
    parser.add_argument(
        "--memory_budget", "--memory-budget", help='find the largest windows in it: "8B/param", "300MB", "2GiB"'
    )
    parser.add_argument("--optim", help=f"this optimizer only, by part: {', '.join(OPTIMIZERS)}")
    parser.add_argument("--optim_args", "--optim-args", help="its options: num_grads=32,rank=8,exclude=embeddings")
    return parser


def skeleton(name: str) -> torch.nn.Module:
    """Make a model from its configuration, on the meta device: shapes, and no weights.

    Args:
        name: a folder, a config.json, a name on the Hub, or "packaged-minilm".

    Returns:
        The model, of the class that the configuration names.

    Raises:
        OSError: if there is no configuration.
        ValueError: if no model can be made from it.
    """
    import transformers

    path = Path(name).expanduser()
    try:
        config = transformers.AutoConfig.from_pretrained(path if path.is_file() else model_source(name))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise OSError(
            f"could not read the configuration of {name} ({why}). {NO_HUB}: a folder, or config.json"
        ) from error
    architecture = next(iter(config.architectures or ()), "")
    if hasattr(transformers, architecture):
        cls = getattr(transformers, architecture)
    elif type(config) in transformers.MODEL_MAPPING:
        cls = transformers.MODEL_MAPPING[type(config)]
    else:
        raise ValueError(f"{name} is of the type {config.model_type}, for which transformers has no model")
    with torch.device("meta"):
        model: torch.nn.Module = cls(config)
    return model


def plan(
    model: torch.nn.Module, optimizer: str, optim_args: str | None = None, memory_budget: str | None = None
) -> MemoryPlan:
    """Count an optimizer's bytes for a model.

    Args:
        model: the model.
        optimizer: the name of the optimizer.
        optim_args: its options, as text.
        memory_budget: take the largest window that fits this.

    Returns:
        The bytes by part.
    """
    options: dict[str, Any] = parse_optim_args(optimizer, optim_args)
    if memory_budget is not None:
        options["memory_budget"] = memory_budget
    return estimate_memory(model, lambda _: create_optimizer(optimizer, model, **options))


def table(model: torch.nn.Module, memory_budget: str | None = None) -> str:
    """Lay out the bytes of all optimizers at their defaults.

    Args:
        model: the model.
        memory_budget: with a second set of columns: the largest window in this budget.

    Returns:
        A line of headings, and a line for AdamW and each optimizer.
    """
    count = _parameters(model)
    rows: list[list[str]] = [["optimizer", "num_grads", "bytes", "B/param"]]
    for name in OPTIMIZERS:
        default = plan(model, name)
        if len(rows) == 1:
            rows.append(["AdamW", "", f"{default.adamw:,}", f"{default.adamw / count:.2f}"])
        rows.append([name, *_cells(default)])
    if memory_budget is not None:
        rows[0] += [f"in {memory_budget}:", *rows[0][1:]]
        rows[1] += ["", "", "", ""]
        for row, name in zip(rows[2:], OPTIMIZERS, strict=True):
            try:
                row += ["", *_cells(plan(model, name, memory_budget=memory_budget))]
            except ValueError:  # the budget was read before: it is too small
                row += ["", "", "does not fit", ""]
            except TypeError:  # there is no window to choose
                row += ["", "", "", ""]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in cells)
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(found: MemoryPlan) -> list[str]:
    return [str(found.num_grads or ""), f"{found['total']:,}", f"{found['total'] / found.parameters:.2f}"]


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
