"""Files of one's own: what the task is, told from the columns, and the splits with their labels as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data import SUFFIXES, check_texts, column_type, is_text, read_file

from hf_efcp.glue import GlueTask

_SHOWN = 10  # names in a message
_NAMED, _TEXT = "names of classes", "text"  # a column of datasets.ClassLabel holds the former
# Cells that stand for no label in a column of numbers, which they have turned into one of text.
_MARKS = {"", "NA", "na", "N/A", "n/a", "nan", "NaN", "NAN", "null", "NULL", "None", "<NA>"}
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
    regression. Classes that a .parquet file names keep its order, and other files are read by these names, not by
    their numbers. Metrics are accuracy and the mean F1 of the classes, or the correlations of Pearson and Spearman.

    Args:
        files: the files.
        predict: whether the test file is to be predicted.

    Returns:
        The task, and its splits `train`, `validation`, and perhaps `test`, with the texts and, but in `test`, `label`
        as a number.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is missing on the command line, or does not hold what it should; if two columns of text
            are not named, and one of them has a text for each label and nothing else.
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
    kind = _kind(splits["train"], files.label_column)
    taken = {}
    for name, split in splits.items():
        taken[name] = split.select_columns(list(texts))
        if name != "test":
            numbers = _numbers(split, files.label_column, classes, kind, paths[name])
            taken[name] = taken[name].add_column("label", numbers)
    if len(texts) > 1 and not files.text_column:  # a single one is the text, whatever it holds
        _check_leaks(taken["train"], texts, bool(classes), paths["train"])
    return task, taken


def columns_taken(task: GlueTask, label_column: str) -> str:
    """Say which columns a task of one's own has been made of.

    Args:
        task: the task that `load_files` returned.
        label_column: the column of labels.

    Returns:
        Half a line: the columns of text, the column of labels, and what it holds.
    """
    held = f"{task.num_labels} classes: {_listed(list(task.labels))}" if task.labels else "a regression"
    return f"text: {', '.join(task.text_columns)}; label: {label_column} ({held})"


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
    if "label" in found or files.label_column in found:  # labels are called so from here on
        raise ValueError(
            f"a column of text cannot be {files.label_column}, which --label_column names, nor be called label; got "
            f"{', '.join(found)}: name others with --text_column, or rename the column in every file"
        )
    return tuple(found)


def _check_columns(split: Any, expected: tuple[str, ...], path: str) -> None:
    if missing := [column for column in expected if column not in split.column_names]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: it has {_listed(split.column_names)}; name the columns with "
            "--text_column and --label_column"
        )


def _kind(split: Any, column: str) -> str:
    if getattr(split.features[column], "names", None):
        return _NAMED
    return _TEXT if is_text(split, column) else column_type(split, column)


def _labels(split: Any, column: str, path: str, known: Collection[Any] = ()) -> list[Any]:
    """The labels of a split as its file gives them, classes with names by their names; every row must have one."""
    kind = _kind(split, column)
    if not kind.startswith((_NAMED, _TEXT, "int", "uint", "bool", "float")):
        raise ValueError(
            f"labels must be text, integers or truth values for classes, or floats for a regression; column {column} "
            f"of {path} holds {kind}"
        )
    labels: list[Any] = split.data.column(column).to_pylist()
    if kind == _NAMED:
        names = split.features[column].names  # files may number them otherwise; -1 is datasets' word for no label
        if (highest := max((number for number in labels if number is not None), default=0)) >= len(names):
            raise ValueError(f"column {column} of {path} has the class {highest}, but names for {len(names)} only")
        labels = [None if number is None or number < 0 else names[number] for number in labels]
    written = set(labels) if kind == _TEXT else set()  # names of classes mean what they say
    absent = _stand_for_none(written - {None}) - set(known)
    rows = [row for row, label in enumerate(labels) if label is None or label != label or label in absent]
    if rows:
        raise ValueError(
            f"column {column} of {path} has rows without a label, {len(rows)} of {len(labels)}: leave them out; the "
            f"first is row {rows[0] + 1}, not counting a heading, with {labels[rows[0]]!r}"
        )
    return labels


def _stand_for_none(texts: set[str]) -> set[str]:
    """Which of the texts of a column of labels are none: what is blank, and among numbers NA and the like."""
    marks = {text for text in texts if text.strip() in _MARKS}
    others = texts - marks
    return marks if others and all(map(_is_number, others)) else {text for text in texts if not text.strip()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in {"true", "false"}
    return True


def _classes(split: Any, column: str, path: str) -> dict[Any, str]:
    """The labels of the training file in the order of their numbers, and their names; empty for a regression."""
    values = set(_labels(split, column, path))
    kind = _kind(split, column)
    if kind.startswith("float"):
        return {}
    if len(values) < 2:
        raise ValueError(f"column {column} of {path} has the label {values.pop()!r} only: there is nothing to learn")
    return {value: str(value) for value in (split.features[column].names if kind == _NAMED else sorted(values))}


def _numbers(split: Any, column: str, classes: dict[Any, str], trained: str, path: str) -> list[Any]:
    """The labels of a split as numbers: of their classes, or the values of a regression."""
    labels, kind = _labels(split, column, path, classes), _kind(split, column)
    if not classes:
        if not kind.startswith(("float", "int", "uint")):
            raise ValueError(
                f"the labels of the training file are floats, a regression, but column {column} of {path} holds {kind}"
            )
        return [float(label) for label in labels]
    numbers = {label: number for number, label in enumerate(classes)}
    if unknown := {str(label) for label in labels if label not in numbers}:
        strange = sorted(unknown - set(classes.values()) or unknown)
        kinds = "" if kind == trained else f". Labels are matched as they are written: {trained} there, {kind} here"
        raise ValueError(
            f"column {column} of {path} has labels that the training file has not: {_listed(strange)}; "
            f"it has {_listed(list(classes.values()))}{kinds}"
        )
    return [numbers[label] for label in labels]


def _check_leaks(train: Any, texts: tuple[str, ...], classes: bool, path: str) -> None:
    """Refuse a column that spells the label: `label_text` beside `label`."""
    labels = train["label"][:]
    for column in texts:
        spelled = train[column][:]
        pairs = len(set(zip(spelled, labels, strict=True)))
        # Values of a regression may all differ, as texts do: a few rows that are there twice are no leak.
        repeated = len(labels) > pairs if classes else len(labels) >= 2 * pairs
        if repeated and pairs == len(set(spelled)) == len(set(labels)):
            raise ValueError(
                f"column {column} of {path} holds one text for each label and tells the model what it is to find: name "
                f"the columns of text with --text_column, {column} too if that is meant"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
