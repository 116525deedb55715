"""Files of one's own: what the task is, told from their columns, and what is wrong with them, told to the user."""

import json
import random
import runpy
import sys

import pytest
from datasets import Dataset
from glue_cases import ROOT, write_csv
from tiny import WORDS, save_tiny_bert

pytestmark = pytest.mark.usefixtures("private_cache")

TOPICS = dict(zip(("art", "body", "city", "data", "earth"), WORDS[:5], strict=True))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"))


def topics(count, seed):
    """Sentences in which one word tells which of five topics they are of."""
    rng = random.Random(seed)
    labels = [rng.choice(list(TOPICS)) for _ in range(count)]
    texts = [[*rng.choices(WORDS[5:], k=rng.randrange(2, 6)), TOPICS[label]] for label in labels]
    for words in texts:
        rng.shuffle(words)
    return {"id": list(range(count)), "topic": labels, "review": [" ".join(words) for words in texts]}


def test_five_classes_by_name(recipe, tiny_model, tmp_path, capsys):
    paths = {name: write_csv(tmp_path / f"{name}.csv", topics(200, seed)) for seed, name in enumerate(("train", "val"))}
    test = topics(50, 2)
    truth = test.pop("topic")
    flags = {
        "--train_file": paths["train"],
        "--validation_file": paths["val"],
        "--test_file": write_csv(tmp_path / "test.csv", test),
        "--label_column": "topic",
        "--do_predict": "true",
        "--model_name_or_path": tiny_model,
        "--output_dir": tmp_path / "out",
        "--max_seq_length": 16,
        "--optim_args": "trust_lr=1e-2",
        "--learning_rate": "1e-2",
        "--max_steps": 60,
        "--per_device_train_batch_size": 16,
        "--save_strategy": "no",
        "--disable_tqdm": "true",
        "--dataloader_pin_memory": "false",
        "--use_cpu": "true",
    }
    recipe.run_glue.main([str(part) for flag in flags.items() for part in flag])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["task"], metrics["headline"], metrics["optimizer"]) == ("train", "accuracy", "lowrank_mfac")
    assert metrics["metrics"]["accuracy"] > 0.8  # guessing gives 0.2
    assert metrics["metrics"]["f1_macro"] > 0.8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(TOPICS)}
    lines = (tmp_path / "out" / "predictions" / "test.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    predicted = [line.split("\t")[1] for line in lines[1:]]
    assert sum(a == b for a, b in zip(predicted, truth, strict=True)) > 40
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("text: ")] == [
        "text: review; label: topic (5 classes: art, body, city, data, earth)"
    ]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["no", "yes", "no", "maybe"], ("maybe", "no", "yes"), [1, 2, 1, 0]),
        ([4, 2, 10, 2], ("2", "4", "10"), [1, 0, 2, 0]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        ([0.5, 2.0, -1.0, 0.0], (), [0.5, 2.0, -1.0, 0.0]),
    ],
)
def test_labels_tell_the_task(recipe, files, labels, names, numbers):
    task, splits = recipe.own_data.load_files(files({"text": list("abcd"), "label": labels}))
    assert (task.name, task.text_columns, task.labels) == ("train", ("text",), names)
    assert task.metrics == (("accuracy", "f1_macro") if names else ("pearson", "spearmanr"))
    assert list(splits) == ["train", "validation"]
    assert splits["validation"]["label"] == numbers


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_holds_the_same(recipe, tmp_path, suffix):
    columns = {"text": ["a film", 'null, "quoted"', "the plot"], "label": ["x", "y", "x"]}
    path = tmp_path / f"train{suffix}"
    if suffix == ".csv":
        write_csv(path, columns)
    elif suffix == ".parquet":
        Dataset.from_dict(columns).to_parquet(path)
    else:
        Dataset.from_dict(columns).to_json(path)
    task, splits = recipe.own_data.load_files(recipe.own_data.FileArguments(str(path), str(path)))
    assert task.labels == ("x", "y")
    assert splits["train"].to_dict() == {"text": columns["text"], "label": [0, 1, 0]}


def test_columns_of_text_are_found_or_named(recipe, files):
    pair = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "source": ["x", "y"], "label": [0, 1]}
    task, _ = recipe.own_data.load_files(files(pair, text_column=["hypothesis", "premise"]))
    assert task.text_columns == ("hypothesis", "premise")
    with pytest.raises(ValueError, match=r"one column of text, or two .* has 3: premise, hypothesis, source"):
        recipe.own_data.load_files(files(pair))
    del pair["source"]
    assert recipe.own_data.load_files(files(pair))[0].text_columns == ("premise", "hypothesis")


def test_a_column_that_spells_the_label_is_refused_unless_it_is_named(recipe, files):
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 1], "label_text": ["neg", "pos", "pos"]}
    message = "column label_text of .*train.csv holds one text for each label .* --text_column, label_text too if"
    with pytest.raises(ValueError, match=message):
        recipe.own_data.load_files(files(columns))
    for texts in (["text"], ["text", "label_text"]):
        task, splits = recipe.own_data.load_files(files(columns, text_column=texts))
        assert (task.text_columns, splits["train"].column_names) == (tuple(texts), [*texts, "label"])
    for other in (["pos", "pos", "pos"], ["neg", "pos", "good"]):  # says nothing; says more than the label
        assert recipe.own_data.load_files(files({**columns, "label_text": other}))[0].text_columns[1] == "label_text"
    alone = {"label": columns["label"], "text": columns["label_text"]}  # it has to be what the model sees
    assert recipe.own_data.load_files(files(alone))[0].text_columns == ("text",)
    rated = {**columns, "label": [0.5, 1.5, 1.5], "label_text": ["low", "high", "high"]}
    assert recipe.own_data.load_files(files(rated))[0].regression  # it may be a row that is there twice
    rated = {name: 2 * cells for name, cells in rated.items()}
    with pytest.raises(ValueError, match="column label_text of .* holds one text for each label"):
        recipe.own_data.load_files(files(rated))


def test_columns_beside_those_that_are_named_are_left_out(recipe, files):
    columns = {"text": ["a", "b", "c"], "label": [3, 4, 5], "topic": ["x", "y", "x"]}
    named = files(columns, text_column=["text"], label_column="topic")
    task, splits = recipe.own_data.load_files(named)
    assert splits["validation"].to_dict() == {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    assert recipe.own_data.columns_taken(task, "topic") == "text: text; label: topic (2 classes: x, y)"
    scores, _ = recipe.own_data.load_files(files({"text": ["a", "b"], "score": [0.5, 1.5]}, label_column="score"))
    assert recipe.own_data.columns_taken(scores, "score") == "text: text; label: score (a regression)"
    for wrong in (["label"], ["text", "topic"]):
        with pytest.raises(ValueError, match=f"cannot be topic, .* nor be called label; got {', '.join(wrong)}: name"):
            recipe.own_data.load_files(files(columns, text_column=wrong, label_column="topic"))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({"text": ["a", "b"], "y": [0, 1]}, None, "has no column label: it has text, y; name the columns with --text"),
        ({"text": ["a", "b"], "label": [1, 1]}, None, "has the label 1 only: there is nothing to learn"),
        (
            {"text": ["a", "b"], "label": ["x", "y"]},
            {"text": ["a", "b"], "label": ["x", "z"]},
            "validation.csv has labels that the training file has not: z; it has x, y",
        ),
        (
            {"text": ["a", "b"], "label": [0.5, 1.5]},
            {"text": ["a", "b"], "label": ["x", "z"]},
            "the labels of the training file are floats, a regression, but column label of .*validation.csv holds",
        ),
        ({"text": ["a", "b"], "label": ["x", ""]}, None, "1 of 2: leave them out; the first is row 2, not counting"),
        (
            {"text": ["a", "b"], "label": [0, 1]},
            {"text": ["a", "b"], "label": [0, "x"]},
            "has labels that the training file has not: x; it has 0, 1. Labels .* int64 there, text here",
        ),
        ({"text": [1, 2], "label": [0, 1]}, None, "must name one column of text.* has 0: none"),
    ],
)
def test_what_does_not_fit_is_said(recipe, files, train, validation, message):
    with pytest.raises(ValueError, match=message):
        recipe.own_data.load_files(files(train, validation))


def test_files_have_to_be_there(recipe, files, tmp_path):
    columns = {"text": ["a", "b"], "label": [0, 1]}
    with pytest.raises(ValueError, match="--validation_file is missing: training is judged by examples"):
        recipe.own_data.load_files(files(columns, validation_file=None))
    with pytest.raises(ValueError, match="--test_file is missing: do_predict needs examples"):
        recipe.own_data.load_files(files(columns), predict=True)
    with pytest.raises(FileNotFoundError, match="--train_file nowhere.csv is not a file"):
        recipe.own_data.load_files(files(columns, train_file="nowhere.csv"))
    with pytest.raises(ValueError, match="--train_file must end in one of .parquet, .csv"):
        recipe.own_data.load_files(files(columns, train_file=str(tmp_path / "train.xlsx")))
    for argv, message in (
        (["--train_file", "a.csv", "--task_name", "sst2"], "give --task_name sst2 or --train_file a.csv, not both"),
        ([], "give --task_name with a task of GLUE, or --train_file"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.run_glue.main([*argv, "--output_dir", str(tmp_path)])


def test_a_mistake_ends_with_a_sentence_and_a_defect_with_its_traceback(recipe):
    with pytest.raises(SystemExit, match="^error: unknown task 'sst3': expected one of cola"), recipe.cli.explained():
        recipe.run_glue.main(["--task_name", "sst3"])
    with pytest.raises(ValueError, match="could not convert"), recipe.cli.explained():
        float("x")
    with pytest.raises(KeyError), recipe.cli.explained():
        {}["absent"]


def test_a_program_may_be_started_from_anywhere(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_glue.py"])
    with pytest.raises(SystemExit, match="^error: give --task_name"):
        runpy.run_path(str(ROOT / "docs" / ".." / "recipes" / "run_glue.py"), run_name="__main__")
