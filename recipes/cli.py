"""The command line of the recipes: one optional YAML file, then flags; flags win."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hf_efcp

CONFIGS = Path(__file__).with_name("configs")


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


@contextmanager
def explained() -> Iterator[None]:
    """End the program with a sentence instead of a traceback, for an error that this project raised itself.

    It says what was expected, what came and what to do; where it was raised is of no use to who made the mistake. What
    others raise, and what is no message to the user, keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        if not _explains_itself(error):
            raise
        sys.exit(f"error: {error}")


def _explains_itself(error: Exception) -> bool:
    """Whether an error was raised by a `raise` of the recipes or of hf_efcp."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    folders = Path(__file__).resolve().parent, Path(hf_efcp.__file__).resolve().parent
    place = Path(last.filename).resolve()  # a program that was started as ../recipes/run_glue.py has that name
    own = any(place.is_relative_to(folder) for folder in folders)
    return own and (last.line or "").startswith("raise ")


def parse_arguments(
    types: tuple[Any, ...],
    argv: list[str],
    defaults: dict[str, Any],
    tables: tuple[str, ...] = (),
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Any, ...]:
    """Fill dataclasses from `[CONFIG] [--flag value ...]`; see `find_config` for what CONFIG may be.

    The YAML's values are read as they are written and go through the argument parser like flags, so that `2e-5` is a
    number, `no` a word and an unknown key an error. Wrong input ends the program with a message, as argparse does.

    Args:
        types: the dataclasses; their fields are the keys and the flags.
        argv: the command line without the program's name.
        defaults: values for keys that neither the YAML nor a flag gives, in the place of the dataclasses' own.
        tables: keys of the YAML, and of no dataclass, that must be there and hold a mapping.
        elsewhere: fields of the dataclasses that are neither key nor flag, and what to use in their place.

    Returns:
        One instance of each dataclass, and the mapping of each table, its values as they are written.
    """
    from transformers import HfArgumentParser  # a second, which the first errors need not wait for

    keys = [field.name for type_ in types for field in dataclasses.fields(type_) if field.init]
    parser = HfArgumentParser(
        list(types),
        usage="%(prog)s [CONFIG] [--flag value ...]   (CONFIG is a YAML file; --help lists the flags)",
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    mappings: list[Any] = []
    try:
        if argv and not argv[0].startswith("-"):
            path = find_config(argv[0])
            config = read_yaml(path)
            mappings = [_table(config, key, path) for key in tables]
            argv = [*_flags(config, keys, path), *argv[1:]]
        elif tables and not {"-h", "--help"} & set(argv):
            parser.error(f"the first argument must be a YAML file with the key {' and '.join(tables)}")
        for name in filter(None, map(flag_name, argv)):
            if place := elsewhere.get(name):
                parser.error(f"{name} does not belong here: use {place}")
        *instances, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments {' '.join(unknown)}; {suggestions(unknown[0], keys)}")
    return (*instances, *mappings)


def given(argv: list[str], names: Iterable[str]) -> dict[str, str]:
    """What a command line says of some keys, for a first look before anything slow is imported.

    What is wrong with the rest of it, `parse_arguments` tells.

    Args:
        argv: the command line without the program's name.
        names: keys of one value.

    Returns:
        Those that are given, as text; the last counts, as it does for a parser.
    """
    found: dict[str, str] = {}
    if argv and not argv[0].startswith("-"):
        try:
            config = read_yaml(find_config(argv[0]))
        except (OSError, ValueError):
            return {}
        found = {name: config[name] for name in names if isinstance(config.get(name), str)}
    for place, word in enumerate(argv):
        name = flag_name(word)
        if name is not None and name in names:
            _, equals, value = word.partition("=")
            value = value if equals else "".join(argv[place + 1 : place + 2])
            found |= {name: value} if value and not value.startswith("--") else {}
    return found


def flag_name(word: str) -> str | None:
    """Tell the key that a word of a command line is the flag of.

    Args:
        word: such as "--max_steps", "--max-steps" or "--max_steps=3".

    Returns:
        The key, with "_" where the flag has "-", which HfArgumentParser takes as well; None for a word that is a value.
    """
    return word.split("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else None


def find_config(name: str) -> Path:
    """Find the YAML file that a command line names.

    Args:
        name: a file, or the name of one in `configs/` such as "quickstart" or "published/efcp_bert_base".

    Returns:
        The file.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = config_names()
    if name in known:
        return CONFIGS / f"{name}.yaml"
    close = difflib.get_close_matches(path.with_suffix("").name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(f"{name} is neither a file nor one of the configurations {', '.join(known)}{hint}")


def config_names() -> list[str]:
    """Name the YAML files in `configs/`.

    Returns:
        The names that `find_config` takes.
    """
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file, its values as they are written.

    Args:
        path: the file.

    Returns:
        Its keys with text, lists and mappings of text.

    Raises:
        ValueError: if it holds no keys, or one twice.
    """
    import yaml

    try:
        # BaseLoader makes no guesses: every value stays the text that was written, and the parser gives it its type.
        text = path.read_text(encoding="utf-8")
        config = yaml.load(text, Loader=yaml.BaseLoader)
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.BaseLoader), path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold lines of 'key: value'")
    return config


def _refuse_repeated_keys(node: Any, path: Path) -> None:
    # YAML's reader keeps the last of them without a word.
    if node is None or node.id != "mapping":
        return
    keys = [key.value for key, _ in node.value]
    for number, (key, value) in enumerate(node.value):
        if key.value in keys[:number]:
            raise ValueError(f"the key {key.value!r} is in {path} twice, again in line {key.start_mark.line + 1}")
        _refuse_repeated_keys(value, path)


def _table(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = config.pop(key, None)
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} must have the key {key!r} with a mapping under it")
    return table


def _flags(config: dict[str, Any], keys: list[str], path: Path) -> list[str]:
    flags = []
    for key, value in config.items():
        if key not in keys:
            raise ValueError(f"unknown key {key!r} in {path}; {suggestions(key, keys)}")
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            flags += [f"--{key}", *value]
        elif isinstance(value, str) and value:
            flags.append(f"--{key}={value}")
        else:
            raise ValueError(f"{key!r} in {path} must have one value or a list of them; write a mapping as quoted JSON")
    return flags


def suggestions(name: str, keys: list[str]) -> str:
    """Say what a wrong name may have meant.

    Args:
        name: the name, of a flag or a key.
        keys: the valid names.

    Returns:
        The end of an error message.
    """
    close = difflib.get_close_matches(name.lstrip("-").split("=")[0], keys, n=3)
    return f"did you mean {' or '.join(close)}?" if close else "--help lists the valid ones"
