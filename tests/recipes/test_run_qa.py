"""The question answering recipe: data, windows, answers, metrics, and whole runs with a tiny model."""

import itertools
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForQuestionAnswering, BertConfig, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "squad_sample"
CONFIG = ROOT / "recipes" / "configs" / "squad_v2.yaml"
SQUAD = "rajpurkar/squad_v2"
pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def parse(recipe):
    types = (recipe.run_qa.DataArguments, recipe.run_qa.ModelArguments)
    types += (recipe.run_qa.BaselineArguments, recipe.run_qa.EFCPTrainingArguments)
    return lambda *argv: recipe.cli.parse_arguments(types, [str(arg) for arg in argv], recipe.run_qa.DEFAULTS)


def sample_rows(split):
    content = json.loads((SAMPLE / f"{split}.json").read_text(encoding="utf-8"))
    return [
        {
            "id": question["id"],
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
        }
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def word_tokenizer(**options):
    """Words of the sample that start with a to m are known, the rest is cut into letters."""
    texts = [row[key] for split in ("train", "validation") for row in sample_rows(split) for key in row if key != "id"]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", str(text).lower())})
    letters = sorted({letter for word in words for letter in word})
    known = [word for word in words if len(word) > 1 and word[0] <= "m"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *known]
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, "model_max_length": 256, **options})


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tokenizer):
    """A folder with a BERT of two small layers, without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2, **sizes)
    config.num_labels = 1  # some checkpoints say so; the head for answers has two outputs all the same
    BertModel(config).save_pretrained(folder)
    return folder


def small_run(model, data_dir, output_dir, *flags):
    options = {
        "--data_dir": data_dir,
        "--model_name_or_path": model,
        "--output_dir": output_dir,
        "--optim": "sparse_mfac",
        "--optim_args": "num_grads=32,density=0.05,trust_lr=1e-2",
        "--learning_rate": "1e-2",
        "--max_seq_length": 96,
        "--doc_stride": 16,
        "--per_device_train_batch_size": 16,
        "--per_device_eval_batch_size": 16,
        "--logging_steps": 2,
        "--save_strategy": "no",
        "--disable_tqdm": "true",
        "--dataloader_pin_memory": "false",
        "--use_cpu": "true",
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    return [str(part) for option in options.items() for part in option]


def row(**changes):
    answers = {"text": ["seven"], "answer_start": [3]}
    return {"id": "q1", "question": "When?", "context": "At seven, in May.", "answers": answers, **changes}


def write_flat(folder, rows, suffix="json"):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        path = folder / f"{split}.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        if suffix == "jsonl":
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(path)
    return str(folder)


def metal_questions(count, seed):
    """Random words, in most texts with one metal, which is the answer."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.choices(["bees", "bell", "boat", "ice", "jar", "goose", "honey", "flood", "gate"], k=6)
        answers = {"text": [], "answer_start": []}
        if number % 4:  # the others cannot be answered
            metal = rng.choice(["cobalt", "copper"])
            words[rng.randrange(6)] = metal
            answers = {"text": [metal], "answer_start": [" ".join(words).index(metal)]}
        rows.append(row(id=str(number), context=" ".join(words), answers=answers))
    return rows


# Configuration


def test_the_config_binds_and_is_the_published_one(parse):
    text = CONFIG.read_text(encoding="utf-8")
    data, model, baseline, args = parse(CONFIG)
    assert text.startswith("# ")
    assert f"python recipes/run_qa.py {CONFIG.relative_to(ROOT)}" in text
    assert (data.dataset_name, model.model_name_or_path) == (SQUAD, "google-bert/bert-base-uncased")
    assert (data.max_seq_length, data.doc_stride, data.null_score_diff_threshold) == (384, 128, 0.0)
    published = "num_grads=1024,density=0.01,damp=5e-5,metric=none"
    assert (args.optim, args.optim_args) == ("sparse_mfac", published)
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (3e-5, 2, 12)
    assert "max_grad_norm" in yaml.load(text, Loader=yaml.BaseLoader)
    assert args.logging_nan_inf_filter is False
    assert args.output_dir.startswith("outputs/")
    assert baseline.baseline is None


def test_the_defaults(parse):
    data, _, _, args = parse()
    assert (data.dataset_name, data.data_dir, data.max_train_samples, data.max_eval_samples) == (SQUAD, *[None] * 3)
    assert (data.max_seq_length, data.doc_stride, data.n_best_size, data.max_answer_length) == (384, 128, 20, 30)
    assert (args.optim, args.warmup_steps, args.logging_nan_inf_filter) == ("lowrank_mfac", 0.1, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1: 0"),
        (["--max_eval_samples", "-3"], "--max_eval_samples must be at least 1: -3"),
        (["--doc_stride", "-1"], "--doc_stride must be at least 0: -1"),
        (["--n_best_size", "0"], "--n_best_size must be at least 1: 0"),
        (["--max_answer_length", "0"], "--max_answer_length must be at least 1: 0"),
        (["--doc_strid", "3"], "unknown arguments --doc_strid 3; did you mean doc_stride"),
    ],
)
def test_wrong_flags_end_with_a_message(parse, capsys, argv, message):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


# Sources of data


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("folder", [".", "squad_v2"])
def test_local_files_of_every_format(recipe, tmp_path, suffix, folder):
    rows = [
        row(title="left out"),
        row(id="q2", context=" Caf\u00e9\u2028at seven", answers={"text": [], "answer_start": []}),
        row(id="q3", answers={"text": ["seven", "At seven"], "answer_start": [3, 0]}),
    ]
    rows = [{"title": "", **item} for item in rows]
    write_flat(tmp_path / folder, rows, suffix)
    splits = recipe.qa_data.load_questions(SQUAD, str(tmp_path))
    expected = [{key: item[key] for key in ("id", "question", "context", "answers")} for item in rows]
    assert {name: split.to_list() for name, split in splits.items()} == {"train": expected, "validation": expected}


def test_squads_own_json(recipe):
    splits = recipe.qa_data.load_questions(SQUAD, str(SAMPLE))
    assert {name: split.to_list() for name, split in splits.items()} == {
        name: sample_rows(name) for name in ("train", "validation")
    }
    counts = {name: (len(split), sum(not a["text"] for a in split["answers"])) for name, split in splits.items()}
    assert counts == {"train": (45, 9), "validation": (23, 6)}
    assert all(recipe.qa_data.has_unanswerable(split) for split in splits.values())
    assert not recipe.qa_data.has_unanswerable(splits["train"].select([0]))
    assert not set(splits["train"]["context"]) & set(splits["validation"]["context"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "q1", "question": "?", "context": "c"}], r"no column answers in row 0: expected id, .* got id, quest"),
        ([row(), {"id": "q2"}], "no column question, context, answers in row 1"),
        ([row(), 3], "row 1 of .*train.json must be a record with id, question, context, answers; got 3"),
        ([row(), row()], "the id 'q1' is in .*train.json twice"),
        ([row(question=" ")], "question of question 'q1' .row 0. in .* must be text; got ' '"),
        ([row(context=None)], "context of question 'q1' .* must be text; got None"),
        ([row(id=7)], "id of question 7 .* must be text; got 7"),
        ([row(answers=["seven"])], r"answers of question 'q1' .* two lists of one length, .* got \['seven'\]"),
        ([row(answers={"text": ["seven"], "answer_start": []})], "answers of question 'q1' .* two lists"),
        ([row(answers={"text": [""], "answer_start": [0]})], "an answer of question 'q1' .* got '' and 0"),
        ([row(answers={"text": ["At"], "answer_start": ["0"]})], "an answer of question 'q1' .* got 'At' and '0'"),
        (
            [row(answers={"text": ["seven"], "answer_start": [4]})],
            "the answer 'seven' of question 'q1' in .*train.json does not stand at its answer_start 4, where the "
            "context says 'even,'",
        ),
        ([row(answers={"text": ["."], "answer_start": [-1]})], "does not stand at its answer_start -1"),
        ([], "train.json is empty: expected at least one question"),
    ],
)
def test_flat_data_that_is_wrong_is_refused(recipe, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        recipe.qa_data.load_questions(SQUAD, write_flat(tmp_path / "data", rows))


def test_a_table_is_checked_like_records(recipe, tmp_path):
    rows = [row(answers={"text": ["seven"], "answer_start": [4]})]
    with pytest.raises(ValueError, match=r"'seven' of question 'q1' in .*train.parquet does not stand"):
        recipe.qa_data.load_questions(SQUAD, write_flat(tmp_path / "data", rows, "parquet"))
    del rows[0]["context"]
    with pytest.raises(ValueError, match="train.parquet has no column context"):
        recipe.qa_data.load_questions(SQUAD, write_flat(tmp_path / "data", rows, "parquet"))


def nested(**changes):
    question = {"id": "q1", "question": "When?", "answers": [{"text": "seven", "answer_start": 3}], **changes}
    return {"data": [{"paragraphs": [{"context": "At seven.", "qas": [question]}]}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(is_impossible=True), "question 'q1' in .*train.json is_impossible, but has answers"),
        (nested(answers=[{"text": "seven"}]), r"data\[0\].paragraphs\[0\].qas\[0\].answers\[0\] of .* no answer_start"),
        (nested(answers={"text": []}), r"answers of data\[0\].paragraphs\[0\].qas\[0\] of .* must be a list"),
        (nested(answers=[{"text": "even", "answer_start": 3}]), "'even' of question 'q1' .* says 'seve'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\].paragraphs\[0\] of .* has no context, .* got qas"),
        ({"data": [{"paragraphs": []}, {"title": "b"}]}, r"data\[1\] of .* has no paragraphs, .* got title"),
        ({"data": [{"paragraphs": []}]}, "train.json is empty"),
        ({"version": "v2.0"}, "train.json must hold SQuAD's own JSON"),
        ("text", "train.json must hold SQuAD's own JSON"),
    ],
)
def test_nested_data_that_is_wrong_is_refused(recipe, tmp_path, content, message):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        recipe.qa_data.load_questions(SQUAD, str(tmp_path))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.parquet"])
def test_a_broken_file_is_named(recipe, tmp_path, name):
    (tmp_path / name).write_text('{"id": "a", ')
    with pytest.raises(ValueError, match=name):
        recipe.qa_data.load_questions(SQUAD, str(tmp_path))


def test_an_absent_file_is_an_error_that_lists_the_folder(recipe, tmp_path):
    (tmp_path / "train.csv").write_text("id,question\n")
    with pytest.raises(
        FileNotFoundError, match=r"expected one of train.json, train.jsonl, train.parquet in .* it holds train.csv"
    ):
        recipe.qa_data.load_questions(SQUAD, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        recipe.qa_data.load_questions(SQUAD, str(tmp_path / "nowhere"))


def test_a_hub_out_of_reach_is_an_error_that_says_what_to_do(recipe, monkeypatch):
    def unreachable(name):
        assert name == SQUAD
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OSError, match=r"could not load rajpurkar/squad_v2 .*HF_HUB_OFFLINE=1.*--data_dir FOLDER") as e:
        recipe.qa_data.load_questions(SQUAD, None)
    assert "train.json, validation.json (or .jsonl, .parquet)" in str(e.value)


def test_the_hub_gives_the_two_splits(recipe, monkeypatch):
    table = Dataset.from_list([{"title": "t", **row()}])
    hub = DatasetDict({"validation": table, "train": table, "test": table})
    monkeypatch.setattr("datasets.load_dataset", lambda name: hub)
    splits = recipe.qa_data.load_questions("rajpurkar/squad", None)
    assert {name: split.to_list() for name, split in splits.items()} == {"train": [row()], "validation": [row()]}
    del hub["validation"]
    with pytest.raises(ValueError, match="some/thing has no split validation: it has train, test"):
        recipe.qa_data.load_questions("some/thing", None)


# Metrics


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


# Windows


def cut(recipe, tokenizer, rows, max_length, stride):
    questions = Dataset.from_list(rows)
    return questions, recipe.qa_features.cut_windows(tokenizer, questions, max_length, stride, keep_places=True)


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


# Answers


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


# Whole runs


def test_a_run_with_a_baseline(recipe, tiny_model, tmp_path, capsys):
    write_flat(tmp_path / "metals", metal_questions(64, seed=1))
    (tmp_path / "metals" / "train.json").write_text(json.dumps(metal_questions(256, seed=0)))
    output = tmp_path / "out"
    flags = ["--max_steps", 60, "--eval_strategy", "steps", "--eval_steps", 30, "--eval_on_start", "true"]
    flags += ["--baseline", "adamw_torch", "--baseline_learning_rate", "3e-3", "--seed", 3]
    recipe.run_qa.main(small_run(tiny_model, tmp_path / "metals", output, *flags))

    metrics, alone = (json.loads((output / name / "metrics.json").read_text()) for name in (".", "baseline"))
    baseline = metrics["baseline"]
    assert baseline == alone
    assert (metrics["task"], metrics["headline"], metrics["model"]) == ("metals", "f1", str(tiny_model))
    assert (metrics["optimizer"], metrics["learning_rate"], metrics["seed"]) == ("sparse_mfac", 1e-2, 3)
    assert (baseline["optimizer"], baseline["learning_rate"]) == ("adamw_torch", 3e-3)
    names = {f"{prefix}{name}" for prefix in ("", "HasAns_", "NoAns_") for name in ("f1", "exact")}
    histories = [json.loads((folder / "history.json").read_text()) for folder in (output, output / "baseline")]
    answers = {item["id"]: item["answers"]["text"] for item in metal_questions(64, seed=1)}
    for folder, record, history in zip((output, output / "baseline"), (metrics, baseline), histories, strict=True):
        assert set(record["metrics"]) == {*names, "loss"}
        assert (record["steps"], record["train_examples"], record["validation_examples"]) == (60, 256, 64)
        assert record["train_windows"] == 256
        predictions = json.loads((folder / "predictions.json").read_text())
        again = recipe.qa_metrics.squad_metrics(predictions, answers)
        assert again == pytest.approx({name: record["metrics"][name] for name in names})
        # It learned, and not by always saying the same: a quarter has no answer, the rest one of two.
        assert record["metrics"]["HasAns_exact"] >= 0.9
        assert record["metrics"]["NoAns_exact"] >= 0.9
        assert history[0]["eval_f1"] < 0.5
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 30
        assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert histories[0][0]["step"] == 0
    assert histories[0][0]["eval_loss"] == histories[1][0]["eval_loss"]

    assert (output / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"metals f1: [01]\.\d{3} \(sparse_mfac, 60 steps, \d+ s\)", lines[-1])
    assert [line.split()[:2] for line in lines[-4:-2]] == [["sparse_mfac", "0.01"], ["adamw_torch", "0.003"]]
    arguments = recipe.run_qa.ModelArguments(str(output))
    _, model = recipe.training.load_pretrained(arguments, AutoModelForQuestionAnswering, {})
    assert model.qa_outputs.out_features == 2
    assert torch.equal(model.qa_outputs.weight, load_file(output / "model.safetensors")["qa_outputs.weight"])


def test_samples_are_limited_and_the_split_is_the_validation_one(recipe, tiny_model, tmp_path):
    flags = ["--max_steps", 2, "--max_train_samples", 20, "--max_eval_samples", 5]
    recipe.run_qa.main(small_run(tiny_model, SAMPLE, tmp_path / "out", *flags))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["task"], metrics["train_examples"], metrics["validation_examples"]) == ("squad_sample", 20, 5)
    assert metrics["baseline"] is None
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(predictions) == [item["id"] for item in sample_rows("validation")[:5]]


def test_data_without_unanswerable_questions_never_gets_no_answer(recipe, tiny_model, tmp_path):
    rows = [item for item in metal_questions(32, seed=0) if item["answers"]["text"]]
    write_flat(tmp_path / "data", rows)
    flags = ["--max_steps", 2, "--null_score_diff_threshold", -1000]
    recipe.run_qa.main(small_run(tiny_model, tmp_path / "data", tmp_path / "out", *flags))
    assert all(json.loads((tmp_path / "out" / "predictions.json").read_text()).values())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"f1", "exact", "loss"}
    # The same threshold, and one question without an answer.
    write_flat(tmp_path / "data", [*rows, row(id="none", answers={"text": [], "answer_start": []})])
    recipe.run_qa.main(small_run(tiny_model, tmp_path / "data", tmp_path / "out", *flags))
    assert not any(json.loads((tmp_path / "out" / "predictions.json").read_text()).values())


def test_a_run_resumes_from_its_checkpoint(recipe, tiny_model, tmp_path):
    output = tmp_path / "out"
    flags = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2]
    argv = small_run(tiny_model, write_flat(tmp_path / "data", metal_questions(64, seed=0)), output, *flags)
    recipe.run_qa.main(argv)
    whole = load_file(output / "model.safetensors")
    for checkpoint, steps_left in ((str(output / "checkpoint-2"), True), ("true", False)):  # "true" is the newest one
        recipe.run_qa.main([*argv, "--resume_from_checkpoint", checkpoint])
        resumed = load_file(output / "model.safetensors")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        metrics = json.loads((output / "metrics.json").read_text())
        assert (metrics["seconds_per_step"] is not None) == steps_left
    start = load_file(tiny_model / "model.safetensors")
    still = [name for name, tensor in start.items() if torch.equal(tensor, whole.get(f"bert.{name}", tensor))]
    assert all(name.startswith("pooler") for name in still), still


def test_wrong_names_end_a_run_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(recipe.run_qa, "load_questions", lambda *args: pytest.fail("loaded data"))
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'"):
        recipe.run_qa.main(["--baseline", "adamv"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('datasets, matplotlib, yaml: pip install "hf_efcp[recipes]"')):
        recipe.run_qa.main([])
