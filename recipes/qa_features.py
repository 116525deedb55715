"""Contexts cut into windows that a model can take, and answers put together from what it says of the windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTSIDE = -1  # the place in the context of a token that does not belong to it


def check_tokenizer(tokenizer: Any, max_length: int) -> None:
    """Refuse a tokenizer whose windows could not be traced back to the text.

    Args:
        tokenizer: the model's tokenizer.
        max_length: the tokens of a window.

    Raises:
        ValueError: if it gives no offsets, no place for "no answer", or fewer tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens stand: expected a fast tokenizer, "
            "a model with a tokenizer.json"
        )
    if tokenizer.cls_token_id is None or tokenizer.padding_side != "right":
        raise ValueError(
            f"expected a tokenizer with a [CLS] token, which stands for no answer, that pads on the right; got "
            f"cls_token={tokenizer.cls_token!r}, padding_side={tokenizer.padding_side!r}: take a BERT-type model"
        )
    if not 1 <= max_length <= tokenizer.model_max_length:
        raise ValueError(f"--max_seq_length must be in 1..{tokenizer.model_max_length} for this model: {max_length}")


def cut_windows(
    tokenizer: Any, questions: Any, max_length: int, stride: int, *, keep_places: bool, name: str = "questions"
) -> Any:
    """Turn each question with its context into one or more windows of tokens; padding is left to the collator.

    Args:
        tokenizer: a tokenizer that `check_tokenizer` passed.
        questions: a dataset that `load_questions` returned.
        max_length: the tokens of a window: the question, a part of the context, and the special ones.
        stride: the tokens of the context that neighbouring windows share.
        keep_places: add the columns that `AnswerFinder` needs.
        name: what the progress bar calls the questions.

    Returns:
        A dataset of windows: the model's inputs, and in `start_positions` and `end_positions` the first and last token
        of the first answer, or twice the [CLS] token if the window does not hold all of it. With `keep_places` also
        `question_index`, `null_position` (of [CLS]), `char_starts` and `char_ends` (of each token in the context).
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [question.strip() for question in batch["question"]]
        _check_room(tokenizer, batch["id"], texts, batch["context"], max_length - special, stride)
        encoding = tokenizer(
            texts,
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = encoding.pop("overflow_to_sample_mapping")
        offsets = encoding.pop("offset_mapping")
        columns = {**encoding, "start_positions": [], "end_positions": []}
        if keep_places:
            columns |= {"question_index": [], "null_position": [], "char_starts": [], "char_ends": []}
        for window, row in enumerate(rows):
            context = np.array([part == 1 for part in encoding.sequence_ids(window)])
            places = np.where(context[:, None], np.array(offsets[window]), OUTSIDE)
            null = encoding["input_ids"][window].index(tokenizer.cls_token_id)
            start, end = _locate(places, batch["answers"][row]) or (null, null)
            columns["start_positions"].append(start)
            columns["end_positions"].append(end)
            if keep_places:
                columns["question_index"].append(indices[row])
                columns["null_position"].append(null)
                columns["char_starts"].append(places[:, 0])
                columns["char_ends"].append(places[:, 1])
        return columns

    return questions.map(
        encode, batched=True, with_indices=True, remove_columns=questions.column_names, desc=f"tokenize {name}"
    )


def _check_room(
    tokenizer: Any, ids: Sequence[str], texts: Sequence[str], contexts: Sequence[str], room: int, stride: int
) -> None:
    lengths = [len(tokens) for tokens in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    for question, length, context in zip(ids, lengths, contexts, strict=True):
        if room - length > stride:
            continue
        if length + len(tokenizer(context, add_special_tokens=False)["input_ids"]) > room:
            raise ValueError(
                f"question {question!r} has {length} tokens, which leaves {room - length} of a window for the context, "
                f"not more than the {stride} that windows share: raise --max_seq_length, lower --doc_stride, or "
                "shorten the question"
            )


def _locate(places: NDArray[np.int64], answers: dict[str, list[Any]]) -> tuple[int, int] | None:
    # The first and last token of the first answer; None if the window does not hold all of it.
    tokens = np.flatnonzero(places[:, 0] != OUTSIDE)
    if not answers["text"] or not tokens.size:
        return None
    text = answers["text"][0]
    begin = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = answers["answer_start"][0] + len(text.rstrip())
    starts, ends = places[tokens].T
    if begin < starts[0] or end > ends[-1]:
        return None
    first = int(np.searchsorted(ends, begin, side="right"))  # the first token that ends after the answer begins
    last = int(np.searchsorted(starts, end, side="left")) - 1  # the last token that begins before the answer ends
    # Characters that the tokenizer drops are in no token, and an answer may be made of them alone.
    return (int(tokens[first]), int(tokens[last])) if first <= last else None


class AnswerFinder:
    """Finds the most likely answer to each question from the logits of its windows.

    An answer is scored by the logit of its first token plus that of its last one, both in the context, among the
    `n_best_size` most likely of either. No answer is scored by the [CLS] token, in the window where that is least.

    Args:
        questions: a dataset that `load_questions` returned.
        windows: the windows that `cut_windows` made of it with `keep_places`.
        n_best_size: how many first and last tokens of a window are tried with each other.
        max_answer_length: the tokens of the longest answer.
        null_threshold: no answer is preferred if its score exceeds that of the best answer by more; None: never.
    """

    def __init__(
        self,
        questions: Any,
        windows: Any,
        *,
        n_best_size: int,
        max_answer_length: int,
        null_threshold: float | None,
    ) -> None:
        self.ids: list[str] = list(questions["id"])
        self.contexts: list[str] = list(questions["context"])
        self.question_index = np.array(windows["question_index"])
        self.null_position = np.array(windows["null_position"])
        self.starts, self.ends = (_pad(list(windows[column])) for column in ("char_starts", "char_ends"))
        self.n_best_size, self.max_answer_length = n_best_size, max_answer_length
        self.null_threshold = null_threshold

    def __call__(self, start_logits: NDArray[Any], end_logits: NDArray[Any]) -> dict[str, str]:
        """Find the answers.

        Args:
            start_logits: for each window in the order of the dataset, the logit of each token to be the first one;
                what stands after a window's last token is not looked at.
            end_logits: the same for the last token.

        Returns:
            The answer to each question by its id, as it stands in the context; "" for no answer.
        """
        scores, firsts, lasts = self._best_spans(start_logits, end_logits)
        # The best window of each question: the first one of its run in this order.
        order = np.lexsort((-scores, self.question_index))
        best = order[np.unique(self.question_index[order], return_index=True)[1]]
        answerable = scores[best] > -np.inf
        if self.null_threshold is not None:
            rows = np.arange(len(self.null_position))
            null = np.full(len(self.ids), np.inf)
            at_null = start_logits[rows, self.null_position] + end_logits[rows, self.null_position]
            np.minimum.at(null, self.question_index, at_null)
            answerable &= null - scores[best] <= self.null_threshold
        return {
            name: context[self.starts[window, first] : self.ends[window, last]] if found else ""
            for name, context, found, window, first, last in zip(
                self.ids, self.contexts, answerable, best, firsts[best], lasts[best], strict=True
            )
        }

    def _best_spans(
        self, start_logits: NDArray[Any], end_logits: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        # The score, first and last token of every window's best answer; -inf if it has none.
        first, first_scores = self._most_likely(start_logits)
        last, last_scores = self._most_likely(end_logits)
        scores = first_scores[:, :, None] + last_scores[:, None, :]
        lengths = last[:, None, :] - first[:, :, None] + 1
        scores = np.where((lengths >= 1) & (lengths <= self.max_answer_length), scores, -np.inf)
        scores = scores.reshape(len(scores), -1)
        best, rows = scores.argmax(axis=1), np.arange(len(scores))
        return scores[rows, best], first[rows, best // last.shape[1]], last[rows, best % last.shape[1]]

    def _most_likely(self, logits: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        # The context's most likely tokens, the likeliest first; a model that has diverged has none.
        logits = logits[:, : self.starts.shape[1]].astype(np.float64)
        logits = np.where((self.starts == OUTSIDE) | np.isnan(logits), -np.inf, logits)
        tokens = np.argsort(-logits, axis=1, kind="stable")[:, : self.n_best_size]
        return tokens, np.take_along_axis(logits, tokens, axis=1)


def _pad(rows: list[list[int]]) -> NDArray[np.int64]:
    padded = np.full((len(rows), max(map(len, rows))), OUTSIDE)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
