"""The files that GLUE's server takes, letter by letter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import arguments

from hf_efcp.glue import TASKS, get_task


def trained(outputs, rank=0):
    """What `write_predictions` asks of a trainer; a split stands for its own name."""
    return SimpleNamespace(
        predict=lambda split: SimpleNamespace(predictions=outputs[split]), is_world_process_zero=lambda: rank == 0
    )


def test_the_files_have_the_names_that_the_server_knows():
    files = {file for task in TASKS.values() for file in task.test_files}
    known = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI"
    assert files == {f"{name}.tsv" for name in known.split()}
    assert get_task("mnli").test_splits == ("test_matched", "test_mismatched")
    assert {name for name, task in TASKS.items() if task.submits_names} == {"mnli", "qnli", "rte"}
    assert [name for name, task in TASKS.items() if not task.test_splits] == ["rotten_tomatoes"]


@pytest.mark.parametrize(
    ("task", "predictions", "cells"),
    [
        ("sst2", [0, 1, 1], ["0", "1", "1"]),
        ("wnli", [1, 0], ["1", "0"]),
        ("mnli", [2, 0, 1], ["contradiction", "entailment", "neutral"]),
        ("qnli", [0, 1], ["entailment", "not_entailment"]),
        ("rte", [1], ["not_entailment"]),
        ("stsb", [-0.3, 2.34567, 5.2, 4.9996], ["0.000", "2.346", "5.000", "5.000"]),
    ],
)
def test_numbers_names_and_scores(recipe, task, predictions, cells):
    expected = "index\tprediction\n" + "".join(f"{row}\t{cell}\n" for row, cell in enumerate(cells))
    assert recipe.submission.submission(get_task(task), np.array(predictions)) == expected


def test_each_test_split_gets_its_file(recipe, tmp_path):
    matched = np.array([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    outputs = {"test_matched": matched, "test_mismatched": (matched[:, ::-1], "hidden states")}
    recipe.submission.write_predictions(
        trained(outputs), get_task("mnli"), {name: name for name in outputs}, tmp_path / "a" / "b"
    )
    assert (tmp_path / "a" / "b" / "MNLI-m.tsv").read_text() == "index\tprediction\n0\tneutral\n1\tentailment\n"
    assert (tmp_path / "a" / "b" / "MNLI-mm.tsv").read_text() == "index\tprediction\n0\tneutral\n1\tcontradiction\n"
    recipe.submission.write_predictions(
        trained(outputs, rank=1), get_task("mnli"), {name: name for name in outputs}, tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_predictions_are_in_the_order_of_the_split(strategy, tmp_path, recipe):
    """Sampling by length is for training: Trainer would sort what it predicts as well."""
    rows = [{"input_ids": [5] * length, "labels": 0} for length in (3, 9, 2, 8, 4, 7, 1, 6)]

    class Lengths(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, labels=None):
            lengths = (input_ids == 5).sum(dim=1).float()
            return {"loss": self.weight.sum(), "logits": torch.stack((lengths, self.weight * lengths), dim=1)}

    def collate(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        padded = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {"input_ids": torch.tensor(padded), "labels": torch.zeros(len(batch), dtype=torch.long)}

    args = arguments(tmp_path, train_sampling_strategy=strategy, per_device_eval_batch_size=3)
    trainer = recipe.training.InOrder(model=Lengths(), args=args, eval_dataset=rows, data_collator=collate)
    for found in (
        trainer.predict(rows).predictions,
        trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluate", prediction_loss_only=False).predictions,
    ):
        assert found[:, 0].tolist() == [3, 9, 2, 8, 4, 7, 1, 6]
    assert args.train_sampling_strategy == strategy


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_diverged_model_writes_nothing(recipe, tmp_path, task):
    outputs = {"test": np.array([[1.0, 2.0], [np.nan, 0.0]])}
    with pytest.raises(ValueError, match=rf"test split of {task} are not finite, .* try a smaller learning_rate"):
        recipe.submission.write_predictions(trained(outputs), get_task(task), {"test": "test"}, tmp_path / "a")
    assert not (tmp_path / "a").exists()
