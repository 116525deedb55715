"""Where questions and their contexts come from: files in SQuAD's format or the Hub, and the checks they must pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data import NO_HUB, find_file, read_file

COLUMNS = ("id", "question", "context", "answers")
SPLITS = ("train", "validation")
SUFFIXES = (".json", ".jsonl", ".parquet")


def load_questions(dataset_name: str, data_dir: str | None) -> dict[str, Any]:
    """Load the training split and the validation split.

    Args:
        dataset_name: a dataset on the Hub in the format of rajpurkar/squad_v2.
        data_dir: a folder with `train` and `validation`, as `.json` (SQuAD's own, or flat records), `.jsonl` or
            `.parquet` (flat records), or with such a folder named after the dataset. None takes the Hub.

    Returns:
        A dataset for each of `train` and `validation`, with the columns id, question, context and answers. A question
        without an answer has empty lists in `answers`.
    """
    if data_dir is None:
        hub = _load_hub(dataset_name)
        return {name: _checked(hub[name], f"the {name} split of {dataset_name}") for name in SPLITS}
    folder = dataset_name.rpartition("/")[2]
    return {name: _load_file(find_file(Path(data_dir), folder, name, SUFFIXES)) for name in SPLITS}


def has_unanswerable(split: Any) -> bool:
    """Tell whether some questions have no answer.

    Args:
        split: a dataset that `load_questions` returned.

    Returns:
        Whether there is one.
    """
    return any(not answers["text"] for answers in split["answers"])


def _load_hub(name: str) -> Any:
    from datasets import load_dataset

    try:
        hub = load_dataset(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"could not load {name} from the Hub ({error}). {NO_HUB}: --data_dir FOLDER with "
            f"{', '.join(f'{split}.json' for split in SPLITS)} (or .jsonl, .parquet)"
        ) from error
    if missing := [split for split in SPLITS if split not in hub]:
        raise ValueError(f"{name} has no split {', '.join(missing)}: it has {', '.join(hub)}")
    return hub


def _load_file(path: Path) -> Any:
    from datasets import Dataset, Features, List, Value

    where = str(path)
    if path.suffix == ".parquet":
        return _checked(read_file(path), where)
    rows = list(_read_json(path))
    _check(rows, where)  # before arrow sees them: its errors name no question
    text = Value("string")
    answers = {"text": List(text), "answer_start": List(Value("int32"))}
    features = Features({"id": text, "question": text, "context": text, "answers": answers})
    return Dataset.from_dict({column: [row[column] for row in rows] for column in COLUMNS}, features=features)


def _checked(split: Any, where: str) -> Any:
    _check(split, where)
    return split.select_columns(list(COLUMNS))


def _read_json(path: Path) -> Iterable[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold SQuAD's own JSON, a mapping with a list 'data', or a list of flat records")
    nested = any(isinstance(row, dict) and "paragraphs" in row for row in rows)
    return _flatten(rows, str(path)) if nested else rows


def _flatten(articles: list[Any], where: str) -> Iterator[dict[str, Any]]:
    # SQuAD's own nesting, as rows of the Hub's form.
    for i, article in enumerate(articles):
        place = f"data[{i}]"
        for j, paragraph in enumerate(_take(article, "paragraphs", place, where)):
            place = f"data[{i}].paragraphs[{j}]"
            context = _take(paragraph, "context", place, where)
            for k, question in enumerate(_take(paragraph, "qas", place, where)):
                place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                name, answers = _take(question, "id", place, where), _take(question, "answers", place, where)
                if question.get("is_impossible") and answers:
                    raise ValueError(f"question {name!r} in {where} is_impossible, but has answers: drop one of them")
                yield {
                    "id": name,
                    "question": _take(question, "question", place, where),
                    "context": context,
                    "answers": {
                        key: [_take(answer, key, f"{place}.answers[{n}]", where) for n, answer in enumerate(answers)]
                        for key in ("text", "answer_start")
                    },
                }


def _take(item: Any, key: str, place: str, where: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        got = ", ".join(item) if isinstance(item, dict) else repr(item)
        raise ValueError(f"{place} of {where} has no {key}, as SQuAD's own JSON has; got {got:.80}")
    value = item[key]
    if key in {"paragraphs", "qas", "answers"} and not isinstance(value, list):
        raise ValueError(f"{key} of {place} of {where} must be a list; got {value!r:.80}")
    return value


def _check(rows: Iterable[Any], where: str) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows):
        _check_row(row, number, where)
        if row["id"] in seen:
            raise ValueError(f"the id {row['id']!r} is in {where} twice: predictions are told apart by it")
        seen.add(row["id"])
    if not seen:
        raise ValueError(f"{where} is empty: expected at least one question")


def _check_row(row: Any, number: int, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} of {where} must be a record with {', '.join(COLUMNS)}; got {row!r:.80}")
    if missing := [column for column in COLUMNS if column not in row]:
        raise ValueError(
            f"{where} has no column {', '.join(missing)} in row {number}: expected {', '.join(COLUMNS)}, "
            f"got {', '.join(row)}"
        )
    for column in ("id", "question", "context"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(
                f"{column} of question {row['id']!r} (row {number}) in {where} must be text; got {row[column]!r:.80}"
            )
    _check_answers(row, where)


def _check_answers(row: dict[str, Any], where: str) -> None:
    which, answers = f"question {row['id']!r} in {where}", row["answers"]
    texts, starts = (answers.get(key) if isinstance(answers, dict) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(
            f"the answers of {which} must be two lists of one length, {{text: [...], answer_start: [...]}}, both empty "
            f"if it cannot be answered; got {answers!r:.80}"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise ValueError(f"an answer of {which} must be text and the place of its first character; "
                             f"got {text!r:.80} and {start!r}")  # fmt: skip
        found = row["context"][max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or found != text:
            raise ValueError(
                f"the answer {text!r:.80} of {which} does not stand at its answer_start {start}, where the context "
                f"says {found!r:.80}: correct answer_start, which counts characters from 0"
            )
