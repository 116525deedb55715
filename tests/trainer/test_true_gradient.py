"""`EFCPTrainer` gives the true gradient and loss, however batches are cut."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import leave
from tiny import arguments, needs_transformers_5, parameters, tiny_bert, toy_rows, train
from torch import nn
from trainer_cases import SPARSE, distance
from transformers import (
    Trainer,
)

from hf_efcp import EFCPTrainer

# The head's two rows have opposite gradients: which entry of a pair Top-k keeps is up to the last bit.
WITHOUT_TIES = {**SPARSE, "optim_args": SPARSE["optim_args"] + ",exclude=classifier"}


ONE_BATCH = {"per_device_train_batch_size": 16}


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize("max_steps", [1, 3])
def test_accumulated_batches_give_the_gradient_and_the_step_of_one_batch(tmp_path, max_steps):
    def run(**batches: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], float]:
        model = tiny_bert()
        before = parameters(model)
        args = arguments(tmp_path, max_steps=max_steps, max_grad_norm=0.0, **WITHOUT_TIES, **batches)
        _, gradients = train(args, model, toy_rows(64))
        after = parameters(model)
        return gradients, after, distance(after, before)

    gradients, theta, moved = run(**ONE_BATCH)
    accumulated_gradients, accumulated_theta, _ = run(**ACCUMULATED)
    assert len(gradients) == len(accumulated_gradients) == max_steps
    assert (gradients[0] - accumulated_gradients[0]).norm() < 1e-5 * gradients[0].norm()
    assert moved > 0.01
    assert distance(theta, accumulated_theta) < 1e-2 * moved


@needs_transformers_5
@pytest.mark.parametrize(("trainer_cls", "factor"), [(Trainer, 4.0), (EFCPTrainer, 1.0)])
def test_the_stock_trainer_inflates_the_gradient_and_ours_does_not(tmp_path, trainer_cls, factor):
    def gradient(**batches: int) -> torch.Tensor:
        args = arguments(tmp_path, optim="sgd", max_steps=1, max_grad_norm=0.0, **batches)
        return train(args, tiny_bert(), toy_rows(16), trainer_cls=trainer_cls)[1][0]

    one = gradient(**ONE_BATCH)
    assert gradient(**ACCUMULATED).norm() / one.norm() == pytest.approx(factor, rel=1e-4)


class Wrapped(nn.Module):
    """A user's wrapper: takes keyword arguments, so that Trainer believes of it that it scales its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_bert()

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


@needs_transformers_5
@pytest.mark.parametrize("model", [Wrapped, lambda: tiny_bert(type("Mine", (type(tiny_bert()),), {}))])
def test_the_gradient_is_true_for_models_that_transformers_does_not_know(tmp_path, model):
    def gradient(**batches: int) -> torch.Tensor:
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, remove_unused_columns=False, **SPARSE, **batches)
        return train(args, model(), toy_rows(16))[1][0]

    one = gradient(**ONE_BATCH)
    assert one.norm() > 0.01
    assert (gradient(**ACCUMULATED) - one).norm() < 1e-4 * one.norm()


def test_the_last_shorter_group_of_batches_is_averaged_too(tmp_path):
    args = {"num_train_epochs": 1, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.0}
    accumulated = train(arguments(tmp_path, **args, **ACCUMULATED), tiny_bert(), toy_rows(24))[1]
    one = train(arguments(tmp_path, **args, **ONE_BATCH), tiny_bert(), toy_rows(24))[1]
    assert len(one) == len(accumulated) == 2
    for a, b in zip(accumulated, one, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


@needs_transformers_5
def test_a_loss_of_ones_own_is_left_alone(tmp_path):
    def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        assert num_items_in_batch == 16
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, **SPARSE, **ACCUMULATED)
    trainer, (gradient,) = train(args, tiny_bert(), toy_rows(16), compute_loss_func=summed)
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, **SPARSE, **ONE_BATCH)
    one = train(args, tiny_bert(), toy_rows(16))[1][0]
    assert trainer.model_accepts_loss_kwargs is True
    assert (gradient - one).norm() < 1e-4 * one.norm()


def test_the_evaluation_loss_is_the_mean(tmp_path):
    model, rows = tiny_bert(), toy_rows(16)
    args = arguments(tmp_path, per_device_eval_batch_size=4, **SPARSE)
    found = EFCPTrainer(model=model, args=args, eval_dataset=rows).evaluate()["eval_loss"]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        assert found == pytest.approx(float(model(**batch).loss), rel=1e-5)


def _one_of_two_processes(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    args = arguments(
        Path(folder) / "out",
        max_steps=3,
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        ddp_find_unused_parameters=False,
        **WITHOUT_TIES,
    )
    trainer, gradients = train(args, tiny_bert(), toy_rows(64))
    assert args.world_size == 2
    found = {
        "gradients": gradients,
        "theta": parameters(trainer.model),
        "loss": trainer.evaluate(toy_rows(16))["eval_loss"],
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave()


def test_two_processes_take_the_step_of_one_and_stay_equal(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two_processes, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first["theta"][name], second["theta"][name]) for name in first["theta"])

    model = tiny_bert()
    before = parameters(model)
    trainer, gradients = train(
        arguments(tmp_path, max_steps=3, max_grad_norm=0.0, **WITHOUT_TIES, **ONE_BATCH), model, toy_rows(64)
    )
    moved = distance(parameters(model), before)
    assert moved > 0.01
    assert (first["gradients"][0] - gradients[0]).norm() < 1e-4 * gradients[0].norm()
    assert distance(first["theta"], parameters(model)) < 1e-2 * moved
    assert first["loss"] == pytest.approx(trainer.evaluate(toy_rows(16))["eval_loss"], rel=1e-2)
