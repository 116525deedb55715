"""The question answering recipe: configuration and sources of data."""

import json

import pytest
import yaml
from datasets import Dataset, DatasetDict
from qa_cases import ROOT, SAMPLE, row, sample_rows, write_flat

CONFIG = ROOT / "recipes" / "configs" / "squad_v2.yaml"


SQUAD = "rajpurkar/squad_v2"


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def parse(recipe):
    types = (recipe.run_qa.DataArguments, recipe.run_qa.ModelArguments)
    types += (recipe.run_qa.BaselineArguments, recipe.run_qa.EFCPTrainingArguments)
    return lambda *argv: recipe.cli.parse_arguments(types, [str(arg) for arg in argv], recipe.run_qa.DEFAULTS)


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
