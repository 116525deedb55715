"""The question answering recipe: from logits to answers."""

import itertools
import math

import numpy as np
import pytest
from qa_cases import cut, row, sample_rows

pytestmark = pytest.mark.usefixtures("private_cache")


def finder_for(recipe, tokenizer, rows, max_length=64, stride=8, **options):
    questions, windows = cut(recipe, tokenizer, rows, max_length, stride)
    options = {"n_best_size": 20, "max_answer_length": 30, "null_threshold": 0.0, **options}
    return recipe.qa_features.AnswerFinder(questions, windows, **options), windows


def logits_for(windows, *points):
    """Logits of -5 but where a point (window, the context's character, logit) says otherwise, padded as Trainer does.

    A character of None is the [CLS] token.
    """
    width = max(map(len, windows["input_ids"]))
    logits = np.full((len(windows), width), -100.0, dtype=np.float32)
    for number, window in enumerate(windows):
        logits[number, : len(window["input_ids"])] = -5.0
    for number, character, value in points:
        token = 0 if character is None else windows[number]["char_starts"].index(character)
        logits[number, token] = value
    return logits


CONTEXT = "ice jar bell boat bees"  # known words at 0, 4, 8, 13 and 18


def test_the_best_span_wins(recipe, tokenizer):
    find, windows = finder_for(recipe, tokenizer, [row(context=CONTEXT, answers={"text": [], "answer_start": []})])
    assert find(logits_for(windows, (0, 4, 3.0)), logits_for(windows, (0, 13, 2.0))) == {"q1": "jar bell boat"}
    # The most likely last token stands before the most likely first one: the pair is none.
    start, end = logits_for(windows, (0, 8, 3.0), (0, 0, 2.5)), logits_for(windows, (0, 4, 3.0), (0, 13, 1.0))
    assert find(start, end) == {"q1": "ice jar"}
    # The question's tokens and the padding are no answers.
    start, end = logits_for(windows, (0, 4, 0.0)), logits_for(windows, (0, 4, 0.0))
    start[0, 1] = end[0, 1] = 50.0
    more = np.full((1, 3), 90.0, dtype=np.float32)
    assert find(np.hstack([start, more]), np.hstack([end, more])) == {"q1": "jar"}


def test_answers_have_a_longest_length(recipe, tokenizer):
    for length, found in ((5, CONTEXT), (4, "ice jar bell boat"), (1, "ice")):
        rows = [row(context=CONTEXT, answers={"text": [], "answer_start": []})]
        find, windows = finder_for(recipe, tokenizer, rows, max_answer_length=length)
        start = logits_for(windows, (0, 0, 9.0))
        end = logits_for(windows, (0, 18, 4.0), (0, 13, 3.0), (0, 0, 2.0))
        assert find(start, end) == {"q1": found}


def test_n_best_limits_what_is_tried(recipe, tokenizer):
    rows = [row(context=CONTEXT, answers={"text": [], "answer_start": []})]
    start, end = [(0, 13, 3.0), (0, 0, 2.0)], [(0, 4, 3.0), (0, 18, -9.0)]
    for size, found in ((1, ""), (2, "ice jar")):
        find, windows = finder_for(recipe, tokenizer, rows, n_best_size=size, null_threshold=None)
        assert find(logits_for(windows, *start), logits_for(windows, *end)) == {"q1": found}


@pytest.mark.parametrize(
    ("threshold", "found"), [(0.0, ""), (0.9, ""), (1.0, "jar"), (1.5, "jar"), (None, "jar"), (-8.0, "")]
)
def test_no_answer_wins_by_the_threshold(recipe, tokenizer, threshold, found):
    rows = [row(context=CONTEXT, answers={"text": [], "answer_start": []})]
    find, windows = finder_for(recipe, tokenizer, rows, null_threshold=threshold)
    points = (0, 4, 1.0), (0, None, 1.5)  # the answer scores 2, no answer 3
    assert find(logits_for(windows, *points), logits_for(windows, *points)) == {"q1": found}


def test_no_answer_must_win_in_every_window(recipe, tokenizer):
    rows = [row(context=f"{CONTEXT} {CONTEXT}"), row(id="q2", context=CONTEXT)]
    rows = [{**item, "answers": {"text": [], "answer_start": []}} for item in rows]
    find, windows = finder_for(recipe, tokenizer, rows, max_length=16, stride=1)
    assert windows["question_index"][:] == [0, 0, 1]
    sure = [(number, None, 5.0) for number in range(3)]
    start, end = logits_for(windows, *sure, (1, 31, 2.0)), logits_for(windows, *sure, (1, 36, 2.0))
    assert find(start, end) == {"q1": "", "q2": ""}
    start[1, 0] = end[1, 0] = 1.0  # the second window doubts, and the answer in it scores 4
    assert find(start, end) == {"q1": "bell boat", "q2": ""}


def test_answers_equal_those_of_plain_loops(recipe, tokenizer):
    rows = sample_rows("validation")
    rng = np.random.default_rng(0)
    finder, windows = finder_for(recipe, tokenizer, rows, max_length=80, n_best_size=80, max_answer_length=6)
    shape = (len(windows), max(map(len, windows["input_ids"])))
    start, end = rng.normal(size=(2, *shape)).astype(np.float32)
    start[:, 0] += 4
    expected = {}
    for index, item in enumerate(rows):
        null, best, text = math.inf, -math.inf, ""
        for number, window in enumerate(windows):
            if window["question_index"] != index:
                continue
            null = min(null, float(start[number, 0] + end[number, 0]))
            tokens = [n for n, place in enumerate(window["char_starts"]) if place >= 0]
            for first, last in itertools.product(tokens, tokens):
                score = float(start[number, first]) + float(end[number, last])
                if first <= last < first + 6 and score > best:
                    best = score
                    text = item["context"][window["char_starts"][first] : window["char_ends"][last]]
        expected[item["id"]] = "" if null > best else text
    assert finder(start, end) == expected
    assert 0 < sum(not text for text in expected.values()) < len(rows)


def test_a_diverged_model_answers_nothing(recipe, tokenizer):
    find, windows = finder_for(recipe, tokenizer, [row()], null_threshold=None)
    nothing = np.full_like(logits_for(windows), np.nan)
    assert find(nothing, nothing) == {"q1": ""}
