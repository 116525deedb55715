"""The command line of the recipes: one optional YAML file, then flags; flags win."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


def require(extra: str, *modules: str) -> None:
    """Check that packages are installed before anything slow starts.

    Args:
        extra: the extra of hf_efcp that installs them.
        *modules: the names they are imported by.

    Raises:
        ImportError: if one is missing, with the command that installs it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'this needs {", ".join(missing)}: pip install "hf_efcp[{extra}]"')


def parse_arguments(types: tuple[Any, ...], argv: list[str], defaults: dict[str, Any]) -> tuple[Any, ...]:
    """Fill dataclasses from `[CONFIG.yaml] [--flag value ...]`.

    The YAML's values are read as they are written and go through the argument parser like flags, so that `2e-5` is a
    number, `no` a word and an unknown key an error. Wrong input ends the program with a message, as argparse does.

    Args:
        types: the dataclasses; their fields are the keys and the flags.
        argv: the command line without the program's name.
        defaults: values for keys that neither the YAML nor a flag gives, in the place of the dataclasses' own.

    Returns:
        One instance of each dataclass.
    """
    keys = [field.name for type_ in types for field in dataclasses.fields(type_) if field.init]
    parser = HfArgumentParser(
        list(types),
        usage="%(prog)s [CONFIG.yaml] [--flag value ...]   (--help lists the flags)",
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    try:
        if argv and not argv[0].startswith("-"):
            argv = [*_flags_of_yaml(Path(argv[0]), keys), *argv[1:]]
        *instances, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments {' '.join(unknown)}; {_suggestions(unknown[0], keys)}")
    return tuple(instances)


def _flags_of_yaml(path: Path, keys: list[str]) -> list[str]:
    import yaml

    try:
        # BaseLoader makes no guesses: every value stays the text that was written, and the parser gives it its type.
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold lines of 'key: value'")
    flags = []
    for key, value in config.items():
        if key not in keys:
            raise ValueError(f"unknown key {key!r} in {path}; {_suggestions(key, keys)}")
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            flags += [f"--{key}", *value]
        elif isinstance(value, str) and value:
            flags.append(f"--{key}={value}")
        else:
            raise ValueError(f"{key!r} in {path} must have one value or a list of them; write a mapping as quoted JSON")
    return flags


def _suggestions(name: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(name.lstrip("-").split("=")[0], keys, n=3)
    return f"did you mean {' or '.join(close)}?" if close else "--help lists the valid ones"
