"""The rows of published tables: every one binds with the published settings; the table beside the published numbers."""

import json
import subprocess

import pytest
from test_configs import FOLDER, SCRIPTS

from hf_efcp.glue import TASKS

ROWS = [
    *(f"{model}/{task}/{optimizer}" for model in ("bert-tiny", "bert-mini") for optimizer in ("adam", "mfac")
      for task in ("mnli", "qnli", "qqp", "sst2", "mrpc", "stsb", "squad_v2")),
    *(f"bert-base/{task}/efcp-{kind}" for task in ("mnli", "squad_v2") for kind in ("topk", "rank4")),
    "bert-base/mnli/microadam",
]  # fmt: skip


@pytest.fixture
def published(recipe):
    return recipe.published


def test_there_is_every_row(published):
    assert set(published.ROWS) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_binds_with_the_published_settings(published, recipe, name):
    row = published.ROWS[name]
    config, *flags = row.command()
    (args,) = SCRIPTS[row.script](recipe.cli.find_config(config), *flags, "--seed=7", "--use_cpu=true")
    model, task, optimizer = name.split("/")
    squad = task == "squad_v2"
    assert args.seed == 7
    assert config == f"published/{row.config}"
    assert (FOLDER / f"{config}.yaml").is_file()
    assert (args.warmup_steps, args.weight_decay, args.max_grad_norm) == (0, 0, 1.0)
    assert args.per_device_train_batch_size == (12 if squad else 32)
    if model != "bert-base":
        assert args.num_train_epochs == {"sst2": 3, "squad_v2": 2}.get(task, 5)
        window = 512 if task in ("mrpc", "stsb") else 1024
        if optimizer == "mfac":
            wanted = ("dense_mfac", 1e-4, f"num_grads={window},damp=1e-6,metric=none")
        else:
            wanted = ("adamw_torch", 5e-5, "")
        assert (args.optim, args.learning_rate, args.optim_args) == wanted
        assert len(published.SEEDS) == row.seeds == 5
        assert 40 < row.number[0] < 90
    elif optimizer == "microadam":
        assert (args.optim, args.learning_rate, args.num_train_epochs, args.bf16) == ("microadam", 4e-5, 3, True)
        assert "num_grads=10,density=0.01" in args.optim_args
    else:
        kept = {"efcp-topk": "density=0.01", "efcp-rank4": "rank=4"}[optimizer]
        assert args.optim == {"efcp-topk": "sparse_mfac", "efcp-rank4": "lowrank_mfac"}[optimizer]
        assert set(args.optim_args.split(",")) == {"num_grads=1024", kept, "damp=5e-5", "metric=none"}
        assert (args.learning_rate, args.num_train_epochs) == ((3e-5, 2) if squad else (2e-5, 3))


def test_the_task_is_that_of_the_row(published):
    for name in ROWS:
        row = published.ROWS[name]
        task = name.split("/")[1]
        assert row.script == ("run_qa" if task == "squad_v2" else "run_glue")
        if row.script == "run_glue":
            assert row.metric in TASKS[task].metrics
            assert row.flags.get("task_name", "mnli") == task


def put(folder, row, seed, value, metric="accuracy", flags=()):
    place = folder / row / f"seed-{seed}"
    place.mkdir(parents=True)
    (place / "metrics.json").write_text(json.dumps({"metrics": {metric: value}}))
    (place / "flags.json").write_text(json.dumps(flags if isinstance(flags, dict) else {"extra": list(flags)}))


def cells(text):
    return {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines() if "|" in line
    }


def test_the_table_has_differences_in_standard_deviations(published, tmp_path):
    for seed, value in ((42, 0.80), (7, 0.82), (1234, 0.84)):
        put(tmp_path, "bert-tiny/qnli/mfac", seed, value, flags=["--data-dir", "GLUE"])
    put(tmp_path, "bert-tiny/sst2/mfac", 42, 0.8286)
    put(tmp_path, "bert-mini/mrpc/adam", 42, 0.8421, "f1", ["--max_steps=20", "--data_dir=x"])
    put(tmp_path, "bert-mini/stsb/mfac", 42, None, "pearson")
    put(tmp_path, "bert-base/mnli/efcp-topk", 42, 0.84)
    text = published.collect(tmp_path)
    table = cells(text)
    # 82.00 - 81.17, over the root of (0.43^2 + 2.00^2) / 2.
    assert table["bert-tiny/qnli/mfac"] == ["accuracy", "81.17 ± 0.43", "82.00 ± 2.00", "3", "+0.83", "+0.6"]
    assert table["bert-tiny/sst2/mfac"] == ["accuracy", "81.86", "82.86", "1", "+1.00", "-"]
    assert table["bert-mini/mrpc/adam"] == ["f1", "84.57 ± 0.36", "84.21", "1", "-0.36", "-1.0"]
    assert table["bert-mini/stsb/mfac"][2:] == ["-", "0", "-", "-"]
    assert table["bert-base/mnli/efcp-topk"] == ["accuracy", "-", "84.00", "1", "-", "-"]
    assert table["bert-tiny/mnli/adam"] == ["accuracy", "65.36 ± 0.13", "-", "0", "-", "-"]
    assert "- bert-mini/mrpc/adam: not the published settings, but with --max_steps=20 --data_dir=x" in text
    assert "no number for pearson in seed-42" in text
    assert "bert-tiny/qnli/mfac: not" not in text
    assert "70.2 on MNLI and 81.5 on QNLI" in text
    assert "were not measured here" in text


def test_a_row_runs_once_for_each_seed(published, tmp_path, monkeypatch, capsys):
    commands = []

    def train(command, check):
        commands.append(command)
        output = next(word for word in command if word.startswith("--output_dir=")).removeprefix("--output_dir=")
        if "--seed=9" not in command:
            (tmp_path / output / "metrics.json").write_text('{"metrics": {"accuracy": 0.5}}')
        return subprocess.CompletedProcess(command, 3 if "--seed=9" in command else 0)

    monkeypatch.setattr(published.subprocess, "run", train)

    def main(*argv):
        monkeypatch.setattr("sys.argv", ["published", "--output_dir", str(tmp_path), *argv])
        published.main()

    main("--row", "bert-tiny/sst2/mfac", "--seeds", "42", "7", "--", "--data_dir=GLUE")
    script, *rest = commands[0][1:]
    assert script.endswith("run_glue.py")
    assert rest[:4] == ["published/mfac_bert_tiny", "--task_name=sst2", "--num_train_epochs=3", "--seed=42"]
    assert rest[-1] == "--data_dir=GLUE"
    assert len(commands) == 2
    main("--row", "bert-tiny/sst2/mfac", "--seeds", "42", "7", "--", "--data_dir=GLUE")
    assert len(commands) == 2
    assert "seed 7: was there" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"was run with the flags \['--data_dir=GLUE'\], and not \['--max_steps=1'\]"):
        main("--row", "bert-tiny/sst2/mfac", "--seeds", "42", "--", "--max_steps=1")
    with pytest.raises(RuntimeError, match="bert-tiny/sst2/mfac, seed 9, failed with the exit status 3"):
        main("--row", "bert-tiny/sst2/mfac", "--seeds", "9")
    with pytest.raises(ValueError, match="there is no row 'bert-tiny/sst3/mfac'; --list names them"):
        main("--row", "bert-tiny/sst3/mfac")
    with pytest.raises(ValueError, match="each seed once"):
        main("--row", "bert-tiny/sst2/mfac", "--seeds", "1", "1")

    main("--row", "bert-tiny/qnli/mfac")
    assert [word for command in commands[3:] for word in command if "--seed" in word] == [
        f"--seed={seed}" for seed in (42, 7, 1234, 8276, 10723)
    ]
    main("--collect")
    assert cells((tmp_path / "published.md").read_text())["bert-tiny/qnli/mfac"][2] == "50.00 ± 0.00"
    main("--list")
    listed = capsys.readouterr().out
    assert "bert-base/squad_v2/efcp-topk: python recipes/run_qa.py published/efcp_bert_base_squad\n" in listed


def test_a_run_of_other_settings_is_not_that_of_the_row(published, tmp_path, monkeypatch):
    def train(command, check):
        output = next(word for word in command if word.startswith("--output_dir=")).removeprefix("--output_dir=")
        (tmp_path / output / "metrics.json").write_text('{"metrics": {"f1": 0.5}}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(published.subprocess, "run", train)
    name = "bert-tiny/mrpc/mfac"
    row = published.ROWS[name]
    assert published.run(name, row, 42, tmp_path, [])
    assert not published.run(name, row, 42, tmp_path, [])
    assert "not the published settings" not in published.collect(tmp_path)

    file = tmp_path / name / "seed-42" / "flags.json"
    noted = json.loads(file.read_text())
    assert noted["command"] == row.command()
    assert noted["config"]["model_name_or_path"] == "google/bert_uncased_L-2_H-128_A-2"
    command = ["published/mfac_bert_tiny", "--task_name=mrpc", "--optim_args=num_grads=8"]
    other = {**noted["config"], "optim": "sparse_mfac"}
    ask = "choose another --output_dir, or delete that folder to run it anew"
    for changes, message, remark in (
        ({"command": command}, rf"with the command \[.*=8'\], and not \[.*=none'\]: {ask}", "the command ['published/"),
        (
            {"config": other},
            rf"with the configuration {{'optim': 'sparse_mfac'}}, and not {{'optim': 'dense_mfac'}}: {ask}",
            "the configuration {'optim': 'sparse_mfac'}\n",
        ),
    ):
        file.write_text(json.dumps({**noted, **changes}))
        with pytest.raises(ValueError, match=message):
            published.run(name, row, 42, tmp_path, [])
        assert f"- {name}: not the published settings, but with {remark}" in published.collect(tmp_path)
    file.write_text("[]")  # as it was before the command was noted
    with pytest.raises(ValueError, match=f"with the command that an older version did not note, and not .*: {ask}"):
        published.run(name, row, 42, tmp_path, [])
    assert "not the published settings" not in published.collect(tmp_path)
