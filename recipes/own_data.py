"""Files of one's own: what the task is, told from the columns, and the splits with their labels as numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data import SUFFIXES, check_texts, column_type, is_text, read_file

from hf_efcp.glue import GlueTask

_SHOWN = 10  # names in a message
_WANTED = {
    "train": "the examples to train on",
    "validation": "training is judged by examples that it has not seen",
    "test": "do_predict needs examples to predict",
}


@dataclasses.dataclass
class FileArguments:
    """Files of one's own, instead of a task of GLUE."""

    train_file: str | None = dataclasses.field(
        default=None, metadata={"help": "a .csv, .json, .jsonl or .parquet file to train on, instead of task_name"}
    )
    validation_file: str | None = dataclasses.field(default=None, metadata={"help": "the file to evaluate on"})
    test_file: str | None = dataclasses.field(
        default=None, metadata={"help": "the file to predict with do_predict; it needs no labels"}
    )
    text_column: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "one or two columns of text; default: all that hold text, beside the label's"}
    )
    label_column: str = dataclasses.field(
        default="label", metadata={"help": "classes as text or integers, or floats for a regression"}
    )


def load_files(files: FileArguments, predict: bool = False) -> tuple[GlueTask, dict[str, Any]]:
    """Read the files, and tell the task from the training file: what is text, and what the labels are.

    Labels that are text, integers or truth values are classes, in the order in which they sort; floats are a
    regression. Metrics are accuracy and the mean F1 of the classes, or the correlations of Pearson and Spearman.

    Args:
        files: the files.
        predict: whether the test file is to be predicted.

    Returns:
        The task, and its splits `train`, `validation`, and perhaps `test`, with the texts and `label` as a number.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is missing on the command line, or does not hold what it should.
    """
    paths = {name: getattr(files, f"{name}_file") for name in ("train", "validation", "test")}
    if not predict:
        del paths["test"]
    for name, path in paths.items():
        check_file(name, path)
    splits = {name: read_file(Path(path)) for name, path in paths.items()}
    texts = _text_columns(files, splits["train"])
    for name, split in splits.items():
        _check_columns(split, texts if name == "test" else (*texts, files.label_column), paths[name])
        check_texts(split, texts, paths[name])
    classes = _classes(splits["train"], files.label_column, paths["train"])
    task = GlueTask(
        Path(paths["train"]).stem,
        texts,
        tuple(classes.values()),
        ("accuracy", "f1_macro") if classes else ("pearson", "spearmanr"),
        ("test.tsv",) if predict else (),
        test_splits=("test",) if predict else (),
        submits_names=bool(classes),
    )
    labelled = {
        name: split if name == "test" else _numbered(split, files.label_column, classes, paths[name])
        for name, split in splits.items()
    }
    return task, labelled


def check_file(name: str, path: str | None) -> None:
    """Refuse a file that cannot be read, by its name.

    Args:
        name: its split.
        path: the file; None if it was not given.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is missing on the command line, or of another kind.
    """
    if path is None:
        raise ValueError(f"--{name}_file is missing: {_WANTED[name]}")
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"--{name}_file must end in one of {', '.join(SUFFIXES)}, got {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--{name}_file {path} is not a file")


def _text_columns(files: FileArguments, split: Any) -> tuple[str, ...]:
    given = files.text_column
    found = given or [n for n in split.column_names if n != files.label_column and is_text(split, n)]
    if len(found) not in (1, 2) or len(set(found)) < len(found):
        what = f"got {', '.join(found)}" if given else f"{files.train_file} has {len(found)}: {_listed(found)}"
        raise ValueError(f"--text_column must name one column of text, or two of which the model sees both; {what}")
    return tuple(found)


def _check_columns(split: Any, expected: tuple[str, ...], path: str) -> None:
    if missing := [column for column in expected if column not in split.column_names]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: it has {_listed(split.column_names)}; name the columns with "
            "--text_column and --label_column"
        )


def _classes(split: Any, column: str, path: str) -> dict[Any, str]:
    """The labels of the training file in the order of their numbers, and their names; empty for a regression."""
    dtype = column_type(split, column)
    if dtype.startswith("float"):
        return {}
    if not is_text(split, column) and not dtype.startswith(("int", "uint", "bool")):
        raise ValueError(
            f"labels must be text, integers or truth values for classes, or floats for a regression; column {column} "
            f"of {path} holds {dtype}"
        )
    values = split.data.column(column).unique().to_pylist()
    if None in values or "" in values:
        raise ValueError(f"column {column} of {path} has rows without a label: leave them out")
    if len(values) < 2:
        raise ValueError(f"column {column} of {path} has the label {values[0]!r} only: there is nothing to learn")
    names = getattr(split.features[column], "names", None)  # a .parquet file may bring them
    return dict(enumerate(names)) if names else {value: str(value) for value in sorted(values)}


def _numbered(split: Any, column: str, classes: dict[Any, str], path: str) -> Any:
    """A split with its labels as `label`: the number of the class, or the value of a regression."""
    labels = split.data.column(column).to_pylist()
    if classes:
        numbers = {name: number for number, name in enumerate(classes)}
        if unknown := sorted({str(label) for label in labels if label not in numbers}):
            raise ValueError(
                f"column {column} of {path} has labels that the training file has not: {_listed(unknown)}; "
                f"it has {_listed([str(label) for label in classes])}"
            )
        labels = [numbers[label] for label in labels]
    elif not column_type(split, column).startswith(("float", "int")):
        raise ValueError(
            f"the labels of the training file are floats, a regression, but column {column} of {path} holds "
            f"{column_type(split, column)}"
        )
    else:
        if any(label is None or label != label for label in labels):
            raise ValueError(f"column {column} of {path} has rows without a label: leave them out")
        labels = [float(label) for label in labels]
    return split.remove_columns(column).add_column("label", labels)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
