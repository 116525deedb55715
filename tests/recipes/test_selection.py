"""Learning rates that are chosen by a held-out loss, the steps to AdamW's loss, and the edge of a grid."""

import json
import random
from dataclasses import replace

import pytest
import yaml
from datasets import Dataset
from tiny import WORDS, save_tiny_bert

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def write_config(tmp_path):
    """Write the YAML of a comparison on 40 sentences, with changes."""
    model = save_tiny_bert(tmp_path / "tiny")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 40), ("validation", 16)):
        rng = random.Random(count)
        words = [" ".join(rng.choices(WORDS, k=5)) for _ in range(count)]
        labels = [rng.randrange(2) for _ in range(count)]
        Dataset.from_dict({"sentence": words, "label": labels}).to_parquet(tmp_path / "data" / f"{split}.parquet")

    def write(**changes):
        config = {
            "tasks": ["sst2"],
            "data_dir": str(tmp_path / "data"),
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / "out"),
            "search_seed": 1,
            "seeds": [2, 3],
            "max_seq_length": 8,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "dataloader_pin_memory": False,
            "use_cpu": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "optimizers": {"AdamW": {"optim": "adamw_torch", "learning_rates": [1e-4, 1e-3, 1e-2]}},
            **changes,
        }
        (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return str(tmp_path / "comparison.yaml")

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 1.0}, "at least 0 and below 1: 1.0"),
        ({"holdout": 0.1, "holdout_max": 0}, "holdout_max must be at least 1: 0"),
        ({"select_by": "selection_loss"}, "needs a holdout to take the loss of, such as holdout: 0.1"),
    ],
)
def test_what_cannot_choose_is_refused(recipe, write_config, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe.plan.read_plan([write_config(**changes)])


@pytest.mark.parametrize(("part", "most", "count"), [(0.1, 100, 4), (0.11, 100, 5), (0.5, 3, 3)])
def test_a_holdout_and_what_is_left_are_the_whole(recipe, part, most, count):
    train = Dataset.from_dict({"number": list(range(40))})
    split = recipe.bench.hold_out(train, part, most)
    kept, left = (list(split[name]["number"]) for name in ("selection", "train"))
    assert len(kept) == count
    assert sorted(kept + left) == list(range(40))
    assert left == sorted(left)
    assert kept != list(range(count)), "not the first ones: files are sorted"
    again = recipe.bench.hold_out(train, part, most)
    assert list(again["selection"]["number"]) == kept
    with pytest.raises(ValueError, match="a holdout of 0.99 leaves none of 40 examples"):
        recipe.bench.hold_out(train, 0.99, 100)


def test_the_held_out_loss_chooses_and_the_validation_split_does_not(recipe, write_config, tmp_path, monkeypatch):
    # The numbers of a run are replaced by some that disagree about the best rate.
    train = recipe.bench.train
    sizes = []

    def telling(trainer, task, splits):
        record, history = train(trainer, task, splits)
        sizes.append((record["train_examples"], len(splits["selection"])))
        record["metrics"]["accuracy"] = trainer.args.learning_rate  # the largest is the best
        evaluate = trainer.evaluate

        def evaluating(dataset, metric_key_prefix):
            assert dataset is splits["selection"]
            found = evaluate(dataset, metric_key_prefix=metric_key_prefix)
            assert 0.3 < found["selection_loss"] < 2.0
            loss = {1e-4: 0.5, 1e-3: 0.2, 1e-2: float("nan")}[trainer.args.learning_rate]
            return {"selection_loss": loss, "selection_accuracy": found["selection_accuracy"]}

        monkeypatch.setattr(trainer, "evaluate", evaluating)
        return record, history

    monkeypatch.setattr(recipe.bench, "train", telling)
    recipe.compare_optimizers.main([write_config(holdout=0.25, select_by="selection_loss")])
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert sizes == [(30, 10)] * 5
    assert [(run["seed"], run["learning_rate"]) for run in runs[3:]] == [(2, 1e-3), (3, 1e-3)]
    assert [run["selection_loss"] for run in runs[:3]] == [0.5, 0.2, None]
    assert all(round(10 * run["selection_metric"], 6) in range(11) for run in runs)  # of ten examples
    text = (tmp_path / "out" / "table.md").read_text()
    assert "the loss on a part of the training split without training chose the learning rate" in text
    assert "a better one may lie beyond" not in text
    assert "steps to AdamW's loss" in text

    # Without it, the accuracy chooses; runs on other training data are other runs.
    monkeypatch.setattr(recipe.bench, "train", train)
    recipe.compare_optimizers.main([write_config()])
    again = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(again) == 10
    assert again[5]["train_examples"] == 40
    assert "selection_loss" not in again[5]
    assert "that also chose the learning rate" in (tmp_path / "out" / "table.md").read_text()


def result(recipe, label, finals, losses, stock=False, optimizer="lowrank_mfac", tried=(1.0, 2.0, 4.0), best=2.0):
    """A result of a run for each of `losses`: validation losses after every ten steps."""
    runs = [
        {
            "metrics": {"accuracy": 0.5, "loss": final},
            "history": [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate(of_run, start=1)],
            "steps": 30,
            "optimizer": optimizer,
            "model": "m",
            "layers": 1,
            "parameters": 10,
            "train_batch_size": 4,
            "max_grad_norm": 1.0,
            "seconds_per_step": 1.0,
            "optimizer_memory": {"total": 20},
        }
        for final, of_run in zip(finals, losses, strict=True)
    ]
    seeds = tuple(range(len(runs)))
    return recipe.report.Result("sst2", "accuracy", label, stock, tried, best, seeds, tuple(runs), ())


def test_steps_to_the_loss_of_adamw(recipe):
    adamw = result(recipe, "AdamW", [0.4, 0.6], [[0.9, 0.7, 0.4], [0.9, 0.5, 0.6]], True, "adamw_torch_fused")
    ours = result(recipe, "ours", [0.3, 0.3], [[0.5, 0.3, 0.3], [0.6, 0.4, 0.3]])
    late = result(recipe, "late", [0.7, 0.5], [[0.9, 0.8, 0.7], [0.9, 0.8, 0.5]])
    never = result(recipe, "never", [0.7, None], [[0.9, 0.8, 0.7], [0.9, None, None]])
    assert adamw.loss == pytest.approx(0.5)
    assert never.loss is None
    text = recipe.report.table([adamw, ours, late, never], 0)
    assert "AdamW's validation loss after training is 0.5000" in text
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[-1] for line in text.splitlines()}
    assert cells["optimizer"] == "steps to AdamW's loss"
    assert cells["AdamW"] == "25"  # 30 and 20
    assert cells["ours"] == "15"  # 10 and 20
    assert cells["late"] == "30 (1 of 2 seeds)"
    assert cells["never"] == "-"

    # Without evaluations on the way, as in old runs, or without AdamW, the table has no such column.
    only_last = [
        replace(one, runs=tuple({**run, "history": run["history"][-1:]} for run in one.runs)) for one in [adamw]
    ]
    assert "steps to" not in recipe.report.table([*only_last, ours], 0)
    assert "steps to" not in recipe.report.table([ours, late], 0)


@pytest.mark.parametrize(
    ("tried", "best", "edge"),
    [((1.0, 2.0, 4.0), 2.0, None), ((1.0, 2.0), 1.0, "least"), ((4.0, 2.0), 4.0, "largest"), ((1.0,), 1.0, None)],
)
def test_a_best_rate_at_the_edge_is_told(recipe, tried, best, edge):
    one = result(recipe, "ours", [0.3], [[0.5, 0.3, 0.3]], tried=tried, best=best)
    assert one.at_the_edge == edge
    said = f"- ours: its best learning rate, {best:g}, is the {edge} of those tried; a better one may lie beyond"
    assert (said in recipe.report.table([one], 0)) == (edge is not None)
