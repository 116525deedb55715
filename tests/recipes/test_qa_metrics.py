"""The question answering recipe: metrics and windows."""

import itertools
from types import SimpleNamespace

import pytest
from datasets import Dataset
from qa_cases import cut, row, sample_rows, word_tokenizer
from tokenizers import normalizers

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The  Cat!", "cat", 1, 1),
        ("cats", "cat", 0, 0),
        ("the black cat", "a cat", 0, 2 / 3),  # one word of two predicted, one of one true
        ("in the year 1874", "1874", 0, 1 / 2),  # "in year 1874"
        ("red red blue", "red blue blue", 0, 2 / 3),  # words count as often as they occur: red and blue once
        ("theatre", "atre", 0, 0),  # an article is a whole word
        ("2,114 pipes", "2114 pipes", 1, 1),
        ("", "", 1, 1),
        ("", "cat", 0, 0),
        ("cat", "", 0, 0),
    ],
)
def test_metrics_of_one_answer(recipe, prediction, answer, exact, f1):
    assert recipe.qa_metrics.exact_match(prediction, answer) == exact
    assert recipe.qa_metrics.f1(prediction, answer) == pytest.approx(f1)


def test_metrics_over_questions(recipe):
    answers = {"a": ["the dog", "black dog"], "b": ["one"], "c": [], "d": []}
    predictions = {"a": "big black dog", "b": "one", "c": "", "d": "cat"}
    metrics = recipe.qa_metrics.squad_metrics(predictions, answers)
    # a: 2 words of 3 against 2 of 2; b and c are right; d is not.
    assert metrics == pytest.approx({
        "f1": (0.8 + 1 + 1 + 0) / 4,
        "exact": 2 / 4,
        "HasAns_f1": 1.8 / 2,
        "HasAns_exact": 1 / 2,
        "NoAns_f1": 1 / 2,
        "NoAns_exact": 1 / 2,
    })
    assert tuple(metrics) == recipe.qa_metrics.metric_names(answers)


def test_without_unanswerable_questions_there_are_two_metrics(recipe):
    assert recipe.qa_metrics.squad_metrics({"a": "x y"}, {"a": ["x"]}) == {"f1": pytest.approx(2 / 3), "exact": 0.0}
    assert recipe.qa_metrics.metric_names({"a": []}) == ("f1", "exact", "NoAns_f1", "NoAns_exact")


def test_an_answer_without_words_counts_as_none(recipe):
    metrics = recipe.qa_metrics.squad_metrics({"a": "", "b": "."}, {"a": ["the"], "b": ["...", "x"]})
    assert metrics == {"f1": 0.5, "exact": 0.5}


def test_predictions_must_be_of_the_same_questions(recipe):
    with pytest.raises(ValueError, match=r"got 1 for 2 \(only one side has b\)"):
        recipe.qa_metrics.squad_metrics({"a": ""}, {"a": [], "b": []})
    with pytest.raises(ValueError, match="got 0 for 0"):
        recipe.qa_metrics.squad_metrics({}, {})


@pytest.mark.parametrize(("max_length", "stride"), [(256, 64), (96, 0), (96, 16), (80, 7)])
def test_every_gold_span_is_found_again(recipe, tokenizer, max_length, stride):
    rows = [*sample_rows("train"), *sample_rows("validation")]
    _, windows = cut(recipe, tokenizer, rows, max_length, stride)
    assert (len(windows) == len(rows)) == (max_length == 256)
    found, covered = set(), {}
    for window in windows:
        item = rows[window["question_index"]]
        start, end, null = window["start_positions"], window["end_positions"], window["null_position"]
        tokens = [n for n, place in enumerate(window["char_starts"]) if place >= 0]
        assert len(window["input_ids"]) <= max_length
        assert (null, window["input_ids"][null]) == (0, tokenizer.cls_token_id)
        assert covered.setdefault(item["id"], 0) >= window["char_starts"][tokens[0]] - 1  # no gap but a space
        covered[item["id"]] = window["char_ends"][tokens[-1]]
        begin, text = (item["answers"][key][:1] for key in ("answer_start", "text"))
        inside = bool(text) and window["char_starts"][tokens[0]] <= begin[0]
        inside = inside and begin[0] + len(text[0]) <= window["char_ends"][tokens[-1]]
        assert (start != null) == (end != null) == inside
        if inside:
            assert item["context"][window["char_starts"][start] : window["char_ends"][end]] == text[0]
            assert {start, end} <= set(tokens)
            found.add(item["id"])
    assert all(covered[item["id"]] == len(item["context"]) for item in rows)
    # Windows that share nothing may cut an answer in two; those that share more than any answer has tokens cannot.
    lengths = {item["id"]: len(tokenizer(text).input_ids) for item in rows for text in item["answers"]["text"][:1]}
    assert found >= {name for name, length in lengths.items() if length - 2 <= stride or max_length == 256}
    assert len(lengths) == 53


def test_neighbouring_windows_share_the_stride(recipe, tokenizer):
    _, windows = cut(recipe, tokenizer, sample_rows("train")[:1], 80, 7)
    tokens = [[place for place in window["char_starts"] if place >= 0] for window in windows]
    assert len(tokens) > 1
    assert all(left[-7:] == right[:7] for left, right in itertools.pairwise(tokens))


@pytest.mark.parametrize(
    ("answer", "start", "found"),
    [
        ("7", 5, "1874"),  # a part of a word stands for the word
        (" 1874 ", 2, "1874"),  # spaces are in no token
        ("In 1874", 0, "In 1874"),
        ("jar", 10, "jar"),
        ("\u200b", 13, None),
    ],
)
def test_answers_that_are_not_whole_words(recipe, answer, start, found):
    context = "In 1874 a jar\u200b"
    assert context[start : start + len(answer)] == answer
    # What the tokenizer drops is in no token.
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    answers = {"text": [answer], "answer_start": [start]}
    _, windows = cut(recipe, tokenizer, [row(context=context, answers=answers)], 64, 8)
    (window,) = windows
    first, last = window["start_positions"], window["end_positions"]
    if found is None:
        assert (first, last) == (0, 0)
    else:
        assert context[window["char_starts"][first] : window["char_ends"][last]] == found


def test_training_windows_hold_only_what_the_model_takes(recipe, tokenizer):
    questions = Dataset.from_list([row()])
    windows = recipe.qa_features.cut_windows(tokenizer, questions, 64, 8, keep_places=False)
    inputs = ["input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"]
    assert sorted(windows.column_names) == sorted(inputs)


def test_a_question_that_leaves_no_room_is_named(recipe, tokenizer):
    rows = [row(), row(id="long", question="jar " * 50, context="jar " * 12)]
    with pytest.raises(
        ValueError, match=r"question 'long' has 50 tokens, which leaves 11 of a window .* not more than the 11 .*raise"
    ):
        cut(recipe, tokenizer, rows, 64, 11)
    assert len(cut(recipe, tokenizer, rows, 64, 10)[1]) == 3
    rows[1]["context"] = "jar " * 11  # no second window is needed
    assert len(cut(recipe, tokenizer, rows, 64, 11)[1]) == 2


def test_what_the_tokenizer_cannot_do_is_refused(recipe, tokenizer):
    check = recipe.qa_features.check_tokenizer
    check(tokenizer, 256)
    for length in (0, 257):
        with pytest.raises(ValueError, match=rf"--max_seq_length must be in 1..256 for this model: {length}"):
            check(tokenizer, length)
    with pytest.raises(ValueError, match=r"expected a tokenizer with a \[CLS\] token.*cls_token=None"):
        check(word_tokenizer(cls_token=None), 64)
    with pytest.raises(ValueError, match=r"pads on the right; got .*padding_side='left'"):
        check(word_tokenizer(padding_side="left"), 64)
    with pytest.raises(ValueError, match="SimpleNamespace does not tell where .* expected a fast tokenizer"):
        check(SimpleNamespace(is_fast=False), 64)
