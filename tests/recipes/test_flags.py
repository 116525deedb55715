"""Flags of the recipes: both spellings, and those that a run would have no use for."""

import pytest

TASK = ["--task_name", "sst2", "--data_dir", "glue"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--max_steps", "max_steps"),
        ("--max-steps=3", "max_steps"),
        ("--lr_steps=0.5-0.75", "lr_steps"),
        ("max_steps", None),
        ("-h", None),
    ],
)
def test_a_flag_is_known_in_both_spellings(recipe, word, name):
    assert recipe.cli.flag_name(word) == name


@pytest.mark.parametrize("program", ["run_qa", "run_image_classification"])
def test_a_flag_of_another_program_is_told_in_both_spellings(recipe, capsys, program):
    for flag in ("--do_predict", "--do-predict"):
        with pytest.raises(SystemExit):
            getattr(recipe, program).main([flag, "true"])
        assert "do_predict does not belong here: use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [*TASK, "--validation_file", "x", "--test_file", "nosuch.csv", "--label_column", "nonsense"],
            "^--validation_file, --test_file, --label_column may be given with --train_file only; --task_name sst2 has",
        ),
        ([*TASK, "--text-column", "a", "b"], "^--text_column may be given with --train_file only"),
        (
            ["--train_file", "a.csv", "--validation_file", "a.csv", "--data_dir", "nosuch"],
            "^--data_dir nosuch is of use with --task_name only, and not with --train_file: leave it out",
        ),
    ],
)
def test_flags_that_would_do_nothing_are_refused(recipe, argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.run_glue, "load_splits", lambda *_: pytest.fail("loaded data"))
    with pytest.raises(ValueError, match=message):
        recipe.run_glue.main([*argv, "--output_dir", str(tmp_path)])
    # Those of a YAML file, too.
    config = tmp_path / "c.yaml"
    words = " ".join(argv).split("--")[1:]
    lines = [f"{key.replace('-', '_')}: [{', '.join(values)}]" for key, *values in map(str.split, words)]
    config.write_text("\n".join(line.replace("[", "").replace("]", "") if "," not in line else line for line in lines))
    with pytest.raises(ValueError, match=message):
        recipe.run_glue.main([str(config), "--output_dir", str(tmp_path)])


def test_a_default_that_is_spelled_out_is_no_mistake(recipe, monkeypatch):
    loaded = []
    monkeypatch.setattr(recipe.run_glue, "load_splits", lambda *arguments: loaded.append(arguments))
    data = recipe.run_glue.DataArguments(task_name="sst2", label_column="label", data_dir="glue")
    task, _ = recipe.run_glue.load(data, False)
    assert loaded == [(task, "glue", False)]


@pytest.mark.parametrize(
    ("word", "checkpoint"),
    [(None, False), ("false", False), ("False", False), ("true", True), ("True", True), ("out/a", "out/a")],
)
def test_a_word_tells_whether_to_resume(recipe, word, checkpoint, tmp_path):
    from hf_efcp import EFCPTrainingArguments

    args = EFCPTrainingArguments(str(tmp_path), resume_from_checkpoint=word)
    assert recipe.fine_tuning.checkpoint_of(args) == checkpoint
