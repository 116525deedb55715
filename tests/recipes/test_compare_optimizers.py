"""The comparison of optimizers: its runs and how they are kept, the table and the pictures."""

import json
import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from compare_cases import OPTIONS, lines

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def counted(recipe, monkeypatch):
    """The places of the runs that are really done."""
    done = []
    run = recipe.bench.Bench.run

    def counting(self, contender, learning_rate, seed):
        done.append((self.task.name, contender.label, learning_rate, seed))
        return run(self, contender, learning_rate, seed)

    monkeypatch.setattr(recipe.bench.Bench, "run", counting)
    return done


def place(run):
    return run["label"], run["key"]["learning_rate"], run["key"]["seed"]


def rows(table):
    """The cells of the table's lines by their first cell."""
    cells = [line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def test_a_comparison_from_start_to_table(recipe, write_config, counted, tmp_path, capsys):
    path, out = write_config(), tmp_path / "out"
    recipe.compare_optimizers.main([path])
    runs = lines(out)
    assert [place(run) for run in runs[:4]] == [
        ("EFCP", 1e-5, 3),
        ("EFCP", 1e-2, 3),
        ("AdamW", 1e-3, 3),
        ("AdamW", 1e-7, 3),
    ]
    # The others learn nothing in 40 steps.
    assert [place(run) for run in runs[4:]] == [("EFCP", 1e-2, 4), ("AdamW", 1e-3, 4)]
    accuracies = [run["metrics"]["accuracy"] for run in runs]
    assert accuracies[1] > accuracies[0] + 0.1
    assert accuracies[2] > accuracies[3] + 0.1
    for run in runs:
        assert (run["steps"], run["train_batch_size"], run["seed"]) == (40, 16, run["key"]["seed"])
        assert [row["step"] for row in run["history"] if "loss" in row] == list(range(4, 41, 4))
        seconds = [row["seconds"] for row in run["history"]]
        assert 0 < seconds[0] <= seconds[-1] < run["all_seconds"]

    text = (out / "table.md").read_text()
    table = rows(text)
    for label, numbers in (("EFCP", (1, 4)), ("AdamW", (2, 5))):
        rate, tried, metric, seconds, size = table[label]
        values = [accuracies[number] for number in numbers]
        assert float(rate) == max(OPTIONS[label]["learning_rates"])
        assert tried == "2: " + ", ".join(f"{rate:g}" for rate in OPTIONS[label]["learning_rates"])
        assert metric == f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
        steps = [runs[number]["seconds_per_step"] for number in numbers]
        assert float(seconds) == pytest.approx(statistics.median(steps), abs=5e-4)
        state = runs[numbers[0]]["optimizer_memory"]["total"] / runs[numbers[0]]["parameters"]
        assert float(size) == pytest.approx(state, abs=5e-3)
    assert 8 <= float(table["AdamW"][-1]) < 8.2
    assert "tried with seed 3" in text
    assert "40 steps of 16 examples, gradients clipped at 1." in text
    assert "Mean over tasks" not in text

    pictures = ["memory.png", "metrics.png", "sst2_loss_seconds.png", "sst2_loss_steps.png"]
    assert sorted(file.name for file in out.iterdir()) == sorted([*pictures, "runs.jsonl", "table.md"])
    for picture in pictures:
        png = (out / picture).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(png) > 20_000
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "6 runs, 0 of them done before"
    time = r"\d+ (s|min)"
    line = rf"\[5/6\] sst2, EFCP, seed 4, lr 0.01: accuracy [01]\.\d{{3}} in \d+ s; {time} passed, about {time} to go"
    assert re.fullmatch(line, shown[5])
    assert sum(line.startswith("[") for line in shown) == 6
    assert not any("'loss'" in line for line in shown)

    # The same run as run_glue's.
    flags = "--task_name sst2 --max_seq_length 16 --max_steps 40 --per_device_train_batch_size 16 --use_cpu true"
    flags += (
        " --optim sparse_mfac --optim_args num_grads=16,density=0.05 --learning_rate 1e-2 --seed 4 --logging_steps 4"
    )
    flags += f" --data_dir {tmp_path / 'data'} --model_name_or_path {runs[0]['model']} --output_dir {tmp_path / 'one'}"
    recipe.run_glue.main([*flags.split(), "--save_strategy", "no", "--dataloader_pin_memory", "false"])
    alone = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert alone["metrics"] == runs[4]["metrics"]
    assert alone["optimizer_memory"] == runs[4]["optimizer_memory"]

    # A second start runs nothing, and writes the same.
    before = (out / "runs.jsonl").read_bytes()
    del counted[:]
    (out / "table.md").unlink()
    (out / "memory.png").unlink()
    recipe.compare_optimizers.main([path])
    assert counted == []
    assert (out / "runs.jsonl").read_bytes() == before
    assert (out / "table.md").read_text() == text
    assert (out / "memory.png").is_file()

    # Killed while it wrote the last line, and with one run less.
    kept = before.splitlines(keepends=True)
    (out / "runs.jsonl").write_bytes(b"".join([kept[0], *kept[2:5], kept[5][:300]]))
    recipe.compare_optimizers.main([path])
    assert counted == [("sst2", "EFCP", 1e-2, 3), ("sst2", "AdamW", 1e-3, 4)]
    again = lines(out)
    assert sorted(map(place, again)) == sorted(map(place, runs))
    assert {place(run): run["metrics"] for run in again} == {place(run): run["metrics"] for run in runs}

    # One more learning rate and one more seed: only they are run, and the other label is no other run.
    del counted[:]
    wider = {"renamed": {**OPTIONS["AdamW"], "learning_rates": [1e-3, 1e-7, 1e-8]}, "EFCP": OPTIONS["EFCP"]}
    recipe.compare_optimizers.main([write_config(optimizers=wider, seeds=[3, 4, 5])])
    assert counted == [
        ("sst2", "renamed", 1e-8, 3),
        ("sst2", "renamed", 1e-3, 5),
        ("sst2", "EFCP", 1e-2, 5),
    ]
    assert "not the same number of learning rates for all: 2 to 3" in (out / "table.md").read_text()


def test_runs_that_fail_or_diverge_do_not_stop_the_others(recipe, write_config, monkeypatch, counted, tmp_path, capsys):
    train = recipe.bench.train

    def failing(trainer, *args):
        if trainer.args.optim == "adamw_torch" and trainer.args.learning_rate == 1e-3:
            raise RuntimeError("out of luck\nand more")
        return train(trainer, *args)

    monkeypatch.setattr(recipe.bench, "train", failing)
    optimizers = {
        "SGD": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rates": [1e30, 1e29]},
        "only failures": {"optim": "adamw_torch", "learning_rates": [1e-3]},
        "AdamW": {"optim": "adamw_torch", "learning_rates": [1e-3, 2e-3]},
    }
    path, out = write_config(optimizers=optimizers, max_steps=6), tmp_path / "out"
    recipe.compare_optimizers.main([path])
    runs = lines(out)
    assert len(counted) == 7  # 5 to search, and the second seed of those with a result
    assert [run.get("failed") for run in runs if "failed" in run] == ["RuntimeError: out of luck\nand more"] * 2
    diverged = [run for run in runs if run["label"] == "SGD"]
    assert [run["metrics"]["loss"] for run in diverged] == [None] * 3
    text = (out / "table.md").read_text()
    table = rows(text)
    assert table["only failures"][:3] == ["-", "0", "-"]
    assert table["AdamW"][:2] == ["0.002", "1: 0.002"]
    assert "- AdamW: lr 0.001, seed 3 failed: RuntimeError: out of luck\n" in text
    assert "- SGD: diverged with 2 of 2 seeds" in text
    shown = capsys.readouterr().out
    assert "failed, RuntimeError: out of luck;" in shown
    assert "only failures, seed 4: left out, no learning rate has a result" in shown

    # What failed is tried again, the rest is not.
    del counted[:]
    monkeypatch.setattr(recipe.bench, "train", train)
    recipe.compare_optimizers.main([path])
    assert [run[1:] for run in counted[:1]] == [("only failures", 1e-3, 3)]
    assert "failed" not in (out / "table.md").read_text().replace("only failures", "")
    assert len(rows((out / "table.md").read_text())["only failures"][2].split("±")) == 2


def test_an_interrupted_comparison_shows_what_it_has(recipe, write_config, monkeypatch, tmp_path, capsys):
    train, trained = recipe.bench.train, []

    def interrupted(*args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(args)
        return train(*args)

    monkeypatch.setattr(recipe.bench, "train", interrupted)
    recipe.compare_optimizers.main([write_config(max_steps=2)])
    assert len(lines(tmp_path / "out")) == 2
    assert "the same command goes on from here" in capsys.readouterr().out
    table = rows((tmp_path / "out" / "table.md").read_text())
    assert "(1 of 2 seeds)" in table["EFCP"][2]
    assert table["AdamW"] == ["-", "0", "-", "-", "-"]


def test_several_tasks_and_the_mean_over_them(recipe, write_config, reviews, tmp_path):
    for task in ("sst2", "cola"):
        (reviews / task).mkdir()
        for split in ("train", "validation"):
            (reviews / task / f"{split}.csv").write_bytes((reviews / f"{split}.csv").read_bytes())
    optimizers = {"AdamW": {"optim": "adamw_torch", "learning_rates": [1e-3]}}
    recipe.compare_optimizers.main([write_config(tasks=["sst2", "cola"], optimizers=optimizers, seeds=[3])])
    accuracy, correlation = (run["metrics"][run["headline"]] for run in lines(tmp_path / "out"))
    text = (tmp_path / "out" / "table.md").read_text()
    first, second, mean = text.split("\n## ")[1:]
    assert rows(first)["AdamW"][2] == f"{accuracy:.3f}"
    assert "matthews correlation" in second
    assert rows(second)["AdamW"][2] == f"{correlation:.3f}"
    assert float(rows(mean)["AdamW"][0]) == pytest.approx((accuracy + correlation) / 2, abs=6e-4)
    assert (tmp_path / "out" / "cola_loss_steps.png").is_file()


def test_every_rate_is_trained_with_every_seed_and_drawn(recipe, write_config, counted, tmp_path):
    optimizers = {
        "AdamW": {"optim": "adamw_torch", "learning_rates": [1e-3, 1e-4]},
        "ours": {"optim": "sparse_mfac", "optim_args": "num_grads=4", "learning_rates": [1e-3]},
    }
    recipe.compare_optimizers.main([write_config(optimizers=optimizers, every_rate=True, max_steps=3)])
    pairs = [("AdamW", 1e-3), ("AdamW", 1e-4), ("ours", 1e-3)]
    assert counted == [("sst2", label, rate, seed) for seed in (3, 4) for label, rate in pairs]
    found = {(run["label"], run["key"]["learning_rate"]): [] for run in lines(tmp_path / "out")}
    for run in lines(tmp_path / "out"):
        found[run["label"], run["key"]["learning_rate"]].append(run["metrics"]["accuracy"])
    text = (tmp_path / "out" / "table.md").read_text().split("# Every learning rate")[1]
    text, losses = text.split("### sst2, loss")
    assert rows(losses)["ours"][0] == "-"
    assert 0.3 < float(rows(losses)["ours"][1].split(" ± ")[0]) < 2.0
    assert rows(text)["optimizer"] == ["0.0001", "0.001"]
    for (label, rate), values in found.items():
        cell = rows(text)[label][[1e-4, 1e-3].index(rate)]
        assert float(cell.split(" ± ")[0]) == pytest.approx(sum(values) / 2, abs=6e-4)
        assert float(cell.split(" ± ")[1]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=6e-4)
    assert rows(text)["ours"][0] == "-"
    assert (tmp_path / "out" / "rates.png").stat().st_size > 10_000


def test_the_log_tolerates_a_torn_end_only(recipe, tmp_path):
    log = recipe.runs.RunLog(tmp_path / "new" / "runs.jsonl")
    log.add({"key": {"a": 1, "b": torch.float32}, "value": math.nan})
    log.add({"key": {"a": 2}, "failed": "no"})
    path = log.path
    assert log.finished({"b": "torch.float32", "a": 1}) == {"key": {"a": 1, "b": "torch.float32"}, "value": None}
    assert (log.finished({"a": 2}), log.failure({"a": 2}), log.failure({"a": 3})) == (None, "no", None)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": {"a": 3}}')  # complete, but for its end
    log = recipe.runs.RunLog(path)
    assert path.read_bytes() == whole
    assert log.finished({"a": 3}) is None
    log.add({"key": {"a": 2}, "value": 5})
    reread = recipe.runs.RunLog(path)
    assert reread.finished({"a": 2})["value"] == 5
    assert reread.failure({"a": 2}) is None
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .*runs.jsonl is not a run .*: delete the line"):
        recipe.runs.RunLog(path)


def test_the_bytes_of_a_stock_optimizer_include_what_its_objects_hold(recipe):
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    projector = SimpleNamespace(rank=2, ortho_matrix=[torch.zeros(3, dtype=torch.float64), torch.zeros(5)])
    optimizer.state[parameter] = {"momentum_buffer": torch.zeros(4), "projector": projector, "step": 3}
    assert recipe.training._memory(optimizer) == {"total": 16 + 24 + 20}
