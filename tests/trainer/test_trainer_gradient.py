"""The gradient and the losses of a run do not depend on how its batches are cut: no optimizer is needed to see that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import run
from tiny import OLD, Gradients, arguments, needs_transformers_5
from tiny_models import EXAMPLES, MODELS, NAMES, Made, tiny
from torch import nn
from transformers import Trainer, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from hf_efcp import EFCPTrainer

LOGGED = {"abs": 5.1e-5} if OLD else {"rel": 1e-5}
CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def trained(
    folder: Path, made: Made, trainer_cls: type[Trainer] = EFCPTrainer, **settings: Any
) -> tuple[torch.Tensor, float, float]:
    """The gradient of the one step that all examples make together, its loss and that of the evaluation after it."""
    model, rows = made
    common = {
        "optim": "sgd", "learning_rate": 0.0, "max_steps": 1, "max_grad_norm": 0.0, "remove_unused_columns": False,
        "logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "per_device_eval_batch_size": 2, "prediction_loss_only": True,
    }  # fmt: skip
    gradients = Gradients()
    trainer = trainer_cls(
        model=model,
        args=arguments(folder, **{**common, **settings}),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[gradients],
    )
    trainer.train()
    logged, evaluated, _ = trainer.state.log_history
    (gradient,) = gradients.seen
    return gradient, logged["loss"], evaluated["eval_loss"]


def by_hand(made: Made) -> tuple[torch.Tensor, float]:
    model, rows = made
    loss = model.train()(**stacked(rows))["loss"]
    return gradient_of(loss, model), float(loss.detach())


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradient_of(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_two_have_the_gradient_and_the_losses_of_a_batch_of_eight(tmp_path, name):
    gradient, loss = by_hand(tiny(name))
    assert gradient.norm() > 0.1
    found, logged, evaluated = trained(tmp_path, tiny(name), **CUT)
    assert apart(found, gradient) < 1e-5
    assert logged == pytest.approx(loss, **LOGGED)
    if name != "Llama uneven":  # every batch of an evaluation weighs the same
        assert evaluated == pytest.approx(loss, rel=1e-5)


def test_it_was_tried_on_more_than_twenty_classes():
    assert len({name for name, *_ in MODELS.values()}) > 20


@needs_transformers_5
@pytest.mark.parametrize(("name", "factor"), [("T5", 4), ("BERT masked", 4), ("Wav2Vec2", 4), ("Llama", 1)])
def test_what_the_stock_trainer_makes_of_it(tmp_path, name, factor):
    gradient, loss = by_hand(tiny(name))
    found, logged, _ = trained(tmp_path, tiny(name), Trainer, **CUT)
    assert apart(found, factor * gradient) < 1e-5
    assert logged == pytest.approx(factor * loss, **LOGGED)


def test_items_that_a_model_counts_weigh_the_same_in_every_batch(tmp_path):
    gradient, _ = by_hand(tiny("Llama uneven"))
    model, rows = tiny("Llama uneven")
    means = torch.stack([by_hand((model, rows[i : i + 2]))[0] for i in range(0, EXAMPLES, 2)])
    assert apart(means.mean(0), gradient) > 0.05
    assert apart(trained(tmp_path, tiny("Llama uneven"), **CUT)[0], gradient) < 1e-5


@needs_transformers_5
def test_the_model_is_called_once_for_a_batch_and_told_the_items_of_one(tmp_path):
    model, rows = tiny("BERT masked")
    told = []

    def note(module: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> None:
        told.append(float(kwargs["num_items_in_batch"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    trained(tmp_path, (model, rows), **CUT)
    assert told == [4.0] * 8  # four batches of the step, four of the evaluation


@needs_transformers_5
@pytest.mark.parametrize("name", ["RoBERTa tags", "Llama uneven"])
def test_label_smoothing_takes_the_mean_over_all_items(tmp_path, name):
    def uneven() -> Made:
        model, rows = tiny(name)
        for i, row in enumerate(rows):
            row["labels"][: i // 2] = -100
        return model, rows

    model, rows = uneven()
    batch = stacked(rows)
    labels = batch.pop("labels")
    smoothed = LabelSmoother(0.1)(model.train()(**batch), labels, shift_labels=name == "Llama uneven")
    gradient = gradient_of(smoothed, model)
    found, logged, _ = trained(tmp_path, uneven(), label_smoothing_factor=0.1, **CUT)
    assert apart(found, gradient) < 1e-5
    assert logged == pytest.approx(float(smoothed.detach()), **LOGGED)


# Losses of one's own


class CallsOurs(EFCPTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class SaysItIsNotScaled(EFCPTrainer):
    loss_is_scaled_for_ga = False


class TakesTheMean(EFCPTrainer):
    loss_is_scaled_for_ga = False  # which older transformers do not ask for

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class DividesByAllItems(EFCPTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


@needs_transformers_5
@pytest.mark.parametrize("trainer_cls", [CallsOurs, SaysItIsNotScaled, TakesTheMean, DividesByAllItems])
def test_a_subclass_says_what_its_loss_is_as_with_the_stock_trainer(tmp_path, trainer_cls):
    gradient, loss = by_hand(tiny("BERT classes"))
    found, _, evaluated = trained(tmp_path, tiny("BERT classes"), trainer_cls, **CUT)
    assert apart(found, gradient) < 1e-5
    assert evaluated == pytest.approx(loss, rel=1e-5)


# Models in a wrapper


def adapted(name: str = "BERT classes") -> Made:
    model, rows = tiny(name)
    set_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")), rows


def test_a_peft_model_has_the_gradient_of_a_batch_of_eight(tmp_path):
    gradient, loss = by_hand(adapted())
    assert gradient.norm() > 0.1
    found, logged, evaluated = trained(tmp_path, adapted(), **CUT)
    assert apart(found, gradient) < 1e-5
    assert logged == pytest.approx(loss, **LOGGED)
    assert evaluated == pytest.approx(loss, rel=1e-5)


TWO_BY_TWO = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 1,
    "ddp_find_unused_parameters": False,
}
# A model, and whether its items are counted over all processes.
IN_PROCESSES = [
    *((name, True) for name in ("BERT masked", "Llama uneven", "penalised", "adapted")),
    *((name, False) for name in ("BERT masked", "penalised")),
]


def made(name: str) -> Made:
    return adapted() if name == "adapted" else tiny(name)


def _one_of_two_processes(rank: int, folder: str) -> list[tuple[torch.Tensor, float, float]]:
    return [
        trained(Path(folder), made(name), average_tokens_across_devices=across, **TWO_BY_TWO)
        for name, across in IN_PROCESSES
    ]


def test_two_processes_have_the_gradient_and_the_losses_of_one(tmp_path):
    for of_rank in run(_one_of_two_processes, 2, tmp_path, str(tmp_path)):
        for (name, _), (found, logged, evaluated) in zip(IN_PROCESSES, of_rank, strict=True):
            gradient, loss = by_hand(made(name))
            assert apart(found, gradient) < 1e-5
            assert logged == pytest.approx(loss, **LOGGED)
            if name != "Llama uneven":
                assert evaluated == pytest.approx(loss, rel=1e-5)
