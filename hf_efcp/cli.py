"""The command `hf-efcp`: the programs of `recipes/` by short names; a wheel has that folder beside this file.

hf-efcp train quickstart --max_steps 20
hf-efcp plan google-bert/bert-base-uncased --memory_budget 8B/param
hf-efcp compare compare_tasks --data_dir GLUE
torchrun --nproc_per_node 2 -m hf_efcp train quickstart
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from . import __version__

# Keys and flags by which `train` knows that the program is not run_glue.py.
TELLING = {
    "run_qa": frozenset({
        *("max_train_samples", "max_eval_samples", "doc_stride", "n_best_size"),
        *("max_answer_length", "null_score_diff_threshold"),
    }),
    "run_image_classification": frozenset({"image_folder", "image_size", "augment", "from_scratch", "lr_steps"}),
}
HELP = """\
usage: hf-efcp train [CONFIG] [--flag value ...]
       hf-efcp plan MODEL [--memory_budget 8B/param] [--optim NAME [--optim_args KEY=VALUE,...]]
       hf-efcp compare CONFIG [--flag value ...]

train     GLUE, SQuAD, pictures or files of your own; --help after it lists the flags
plan      bytes of each optimizer's state for a model, and the windows that fit a budget
compare   optimizers and learning rates side by side

CONFIG is a YAML file, or one of these: {configs}
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: The command line without the program's name; None takes the process's own.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    tools = _module("cli")
    if command in ("-h", "--help"):
        sys.stdout.write(HELP.format(configs=", ".join(tools.config_names())))
        return
    if command == "--version":
        sys.stdout.write(f"hf_efcp {__version__}\n")
        return
    with tools.explained():
        name = program(command, rest)
        sys.argv[0] = f"hf-efcp {command}"  # what usage lines call the program
        _module(name).main(rest)


def program(command: str, argv: list[str]) -> str:
    """Tell which program does a command.

    Args:
        command: "train", "plan" or "compare".
        argv: What follows it.

    Returns:
        The name of a module of `recipes/`.

    Raises:
        ValueError: There is no such command, or its configuration is another command's.
    """
    tools = _module("cli")
    if command == "plan":
        return "memory_plan"
    if command not in ("train", "compare"):
        raise ValueError(f"unknown command {command!r}; {tools.suggestions(command, ['train', 'plan', 'compare'])}")
    tools.require("recipes", "datasets", "matplotlib", "scipy", "sklearn", "yaml")
    words = set(filter(None, map(tools.flag_name, argv)))
    if argv and not argv[0].startswith("-"):
        path = tools.find_config(argv[0])
        keys = set(tools.read_yaml(path))
        if "optimizers" in keys and command == "train":
            raise ValueError(f"{path} compares optimizers: hf-efcp compare {argv[0]}")
        words |= keys
    if command == "compare":
        return "compare_optimizers"
    found = next((name for name, telling in TELLING.items() if telling & words), "run_glue")
    if found == "run_glue" and "dataset_name" in words:
        raise ValueError(
            "dataset_name may be of questions or of pictures: begin with a configuration, squad_v2 or digits"
        )
    return found


def _module(name: str) -> ModuleType:
    """A module of `recipes/`, whose programs import each other by their bare names."""
    packaged = Path(__file__).with_name("recipes")
    recipes = packaged if packaged.is_dir() else Path(__file__).parents[1] / "recipes"  # in a checkout
    for folder in (recipes / "benchmarks", recipes):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)
