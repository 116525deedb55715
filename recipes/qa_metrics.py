"""Exact match and F1 of extracted answers, as in SQuAD's official evaluation but as fractions."""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Strip an answer of what does not count.

    Args:
        text: the answer.

    Returns:
        The text in lower case, without punctuation and articles, its words one space apart.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """Compare two answers as a whole.

    Args:
        prediction: the predicted answer.
        answer: a true one.

    Returns:
        1.0 if they are equal once normalized, else 0.0.
    """
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """Compare two answers word by word.

    Args:
        prediction: the predicted answer.
        answer: a true one.

    Returns:
        The harmonic mean of precision and recall over the words, which count as often as they occur. If one answer
        has no words, 1.0 if the other has none either, else 0.0.
    """
    predicted, true = normalize(prediction).split(), normalize(answer).split()
    if not predicted or not true:
        return float(predicted == true)
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true))


METRICS = {"f1": f1, "exact": exact_match}


def metric_names(answers: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """List what `squad_metrics` computes.

    Args:
        answers: as there.

    Returns:
        The names, the headline first.
    """
    return tuple(prefix + metric for prefix in _groups(answers) for metric in METRICS)


def squad_metrics(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compare predicted answers with the true ones.

    Args:
        predictions: the predicted answer to each question, by id; "" says that there is none.
        answers: the true answers to each question, by id; an empty list if it cannot be answered.

    Returns:
        The means of `f1` and `exact` over the questions, each of which counts with its best answer. If some questions
        cannot be answered, also `HasAns_f1`, `HasAns_exact`, `NoAns_f1` and `NoAns_exact`, over those that can
        and those that cannot.

    Raises:
        ValueError: if the two are not about the same questions, or about none.
    """
    if not answers or predictions.keys() != answers.keys():
        example = min(predictions.keys() ^ answers.keys(), default="none")
        raise ValueError(
            f"expected a prediction for each of the questions; got {len(predictions)} for {len(answers)} "
            f"(only one side has {example})"
        )
    scores = {}
    for name, metric in METRICS.items():
        for question, texts in answers.items():
            # An answer without words is none, as in the official evaluation.
            true = [text for text in texts if normalize(text)] or [""]
            scores[name, question] = max(metric(predictions[question], text) for text in true)
    return {
        prefix + name: statistics.fmean(scores[name, question] for question in questions)
        for prefix, questions in _groups(answers).items()
        for name in METRICS
    }


def _groups(answers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    # The prefix of a metric's name, and the questions that it is computed over.
    groups = {"": list(answers)}
    unanswerable = [question for question, texts in answers.items() if not texts]
    if unanswerable:
        answerable = [question for question, texts in answers.items() if texts]
        groups |= {"HasAns_": answerable} if answerable else {}
        groups["NoAns_"] = unanswerable
    return groups
