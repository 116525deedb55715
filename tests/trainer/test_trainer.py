"""`EFCPTrainer`: which optimizer it creates, that it learns, and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from tiny import arguments, parameters, tiny_bert, toy_rows, train
from trainer_cases import SPARSE, distance
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_efcp
from hf_efcp import EFCPTrainer, SparseMFAC


def test_the_arguments_decide_the_optimizer(tmp_path):
    args = arguments(
        tmp_path,
        optim="sparse-mfac",
        optim_args="num_grads=5,density=0.5,value_dtype=float32,exclude=embeddings,exclude_lr=2e-5",
        weight_decay=0.1,
    )
    optimizer = EFCPTrainer(model=tiny_bert(), args=args).create_optimizer()
    assert type(optimizer) is SparseMFAC
    settings = [(g["num_grads"], g["density"], g["value_dtype"]) for g in optimizer.param_groups]
    assert settings == [(5, 0.5, "float32")] * 4
    found = [(g["preconditioned"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(True, 1e-4, 0.1), (True, 1e-4, 0.0), (False, 2e-5, 0.1), (False, 2e-5, 0.0)]


def test_excluded_parameters_train_and_the_scheduler_scales_both_rates(tmp_path):
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append([g["lr"] for g in kwargs["optimizer"].param_groups])

    model = tiny_bert()
    before = parameters(model)
    args = arguments(
        tmp_path, max_steps=4, learning_rate=1e-3, warmup_steps=2, optim="sparse_mfac",
        optim_args="num_grads=4,density=0.2,exclude=word_embeddings|classifier,exclude_lr=1e-4",
    )  # fmt: skip
    trainer = EFCPTrainer(model=model, args=args, train_dataset=toy_rows(32), callbacks=[Rates()])
    trainer.train()
    factors = [0.0, 0.5, 1.0, 0.5]
    expected = [[f * lr for lr in (1e-3, 1e-3, 1e-4, 1e-4)] for f in factors]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
    embeddings = (
        parameters(model)["bert.embeddings.word_embeddings.weight"] - before["bert.embeddings.word_embeddings.weight"]
    )
    # Adam moves an entry by at most about its rate per step, and rates of the other groups are ten times larger.
    assert 1e-4 < float(embeddings.abs().max()) < 2.1e-4
    assert trainer.optimizer.optimizer.memory()["total"] > 0


@pytest.mark.parametrize(("optim", "expected"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_stock_names_are_trainers_business(tmp_path, optim, expected):
    model = tiny_bert()
    before = parameters(model)
    trainer, _ = train(arguments(tmp_path, optim=optim, max_steps=2, learning_rate=0.01), model, toy_rows(16))
    assert type(trainer.optimizer.optimizer) is expected
    assert distance(parameters(model), before) > 1e-4


def test_what_is_given_comes_before_the_arguments(tmp_path):
    model = tiny_bert()
    given = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = EFCPTrainer(model=model, args=arguments(tmp_path, **SPARSE), optimizers=(given, None))
    assert trainer.create_optimizer() is given
    pair = (SparseMFAC, {"lr": 0.25, "num_grads": 3})
    trainer = EFCPTrainer(model=model, args=arguments(tmp_path, optim="sgd"), optimizer_cls_and_kwargs=pair)
    assert [(g["lr"], g["num_grads"]) for g in trainer.create_optimizer().param_groups] == [(0.25, 3)] * 2


def test_plain_arguments_with_the_name_set_afterwards(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3)
    args.optim = "sparse_mfac"
    optimizer = EFCPTrainer(model=tiny_bert(), args=args).create_optimizer()
    assert type(optimizer) is SparseMFAC
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}


def test_the_plain_trainer_takes_the_class(tmp_path):
    model = tiny_bert()
    before = parameters(model)
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=6, weight_decay=0.1, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    pair = (SparseMFAC, {"lr": 1e-3, "num_grads": 4, "density": 0.1})
    trainer = Trainer(model=model, args=args, train_dataset=toy_rows(48), optimizer_cls_and_kwargs=pair)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is SparseMFAC
    assert [(g["initial_lr"], g["num_grads"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (1e-3, 4, 0.1),
        (1e-3, 4, 0.0),
    ]
    after = parameters(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("optim", "options", "rate"),
    [
        ("lowrank_mfac", "trust_lr=4e-3", 4e-3),
        ("sparse_mfac", "num_grads=32,density=0.1,trust_lr=2e-3", 2e-3),
        ("lowrank_ggt", "metric=factored", 2e-3),
    ],
)
def test_the_model_learns(tmp_path, optim, options, rate):
    args = arguments(tmp_path, num_train_epochs=6, learning_rate=rate, optim=optim, optim_args=options)
    model, rows = tiny_bert(), toy_rows(128)
    start = EFCPTrainer(model=model, args=args, eval_dataset=rows).evaluate()["eval_loss"]
    trainer, _ = train(args, model, rows)
    assert trainer.evaluate(rows)["eval_loss"] < 0.7 * start


def test_two_epochs_with_loader_workers_and_numba_move_every_parameter(tmp_path):
    model = tiny_bert(dropout=0.1)
    before = parameters(model)
    args = arguments(
        tmp_path, num_train_epochs=2, dataloader_num_workers=2, optim="sparse_mfac",
        optim_args="num_grads=4,density=0.05,backend=numba",
    )  # fmt: skip
    trainer, gradients = train(args, model, toy_rows(48))
    assert trainer.optimizer.optimizer.backend == "numba"
    assert len(gradients) == 12
    still = [name for name, p in parameters(model).items() if torch.equal(p, before[name])]
    assert still == []


def card_of(trainer: EFCPTrainer, **given: Any) -> tuple[ModelCardData, str]:
    trainer.create_model_card(**given)
    text = Path(trainer.args.output_dir, "README.md").read_text()
    return ModelCard(text).data, text.partition("## Training procedure")[2]


def trained_with(folder: Path, way: str) -> EFCPTrainer:
    model = tiny_bert()
    settings: dict[str, Any] = {"num_grads": 3, "density": 0.25, "block_size": 256, "metric": "none", "damp": 0.125}
    given: dict[str, Any] = {}
    arguments_of = {"optim": "adamw_torch"}
    if way == "optimizers":
        given["optimizers"] = (SparseMFAC(model.parameters(), 0.25, **settings), None)
    elif way == "optimizer_cls_and_kwargs":
        given["optimizer_cls_and_kwargs"] = (SparseMFAC, {"lr": 0.25, **settings})
    else:
        options = ",".join(f"{key}={value}" for key, value in settings.items())
        arguments_of = {"optim": "sparse_mfac", "optim_args": options, "learning_rate": 0.25}
    return train(arguments(folder, max_steps=2, **arguments_of), model, toy_rows(16), **given)[0]


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs", "optim"])
def test_the_model_card_describes_the_optimizer_however_it_was_given(tmp_path, way):
    trainer = trained_with(tmp_path, way)
    data, text = card_of(trainer)
    assert data.tags == ["generated_from_trainer", "hf_efcp"]
    numel = sum(p.numel() for p in trainer.model.parameters())
    each = trainer.optimizer.optimizer.memory()["total"] / numel
    assert f"`SparseMFAC` of hf_efcp {hf_efcp.__version__}" in text
    assert "(https://arxiv.org/abs/2306.06098)" in text
    assert f"{each:.2f} bytes of state per parameter" in text
    settings = ("lr: 0.25", "num_grads: 3", "density: 0.25", "block_size: 256", "damp: 0.125", "error_dtype: float32")
    for setting in (*settings, "metric: none", "weight_decay: 0.0", "learning_rate: 0.25"):
        assert text.count(f"\n- {setting}\n") == 1
    assert "adam" not in text.lower()
    assert text.index("### Training hyperparameters") < text.index("### Optimizer") < text.index("### Framework")
    assert card_of(trainer) == (data, text)  # once more is not twice as long
    assert trainer.args.optim in ("adamw_torch", "sparse_mfac")


def test_the_model_card_keeps_tags_and_names_what_is_excluded_and_where_groups_differ(tmp_path):
    args = arguments(
        tmp_path, optim="microadam", optim_args="exclude=embeddings,exclude_lr=2e-5", weight_decay=0.1, max_steps=1
    )
    trainer, _ = train(args, tiny_bert(), toy_rows(16))
    data, text = card_of(trainer, tags="mine")
    assert data.tags == ["mine", "generated_from_trainer", "hf_efcp"]
    assert "`MicroAdam` of hf_efcp" in text
    assert "\n- weight_decay: 0.1 or 0.0\n" in text
    excluded = sum(p.numel() for name, p in trainer.model.named_parameters() if "embeddings" in name)
    assert f"not preconditioned: {excluded:,} parameters, stepped as AdamW would at lr 2e-05" in text


def test_the_model_card_of_an_adapter_which_peft_writes_once_more(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    trainer, _ = train(arguments(tmp_path, optim="lowrank_mfac", max_steps=1), model, toy_rows(16))
    trainer.save_model()
    data, text = card_of(trainer)
    assert data.library_name == "peft"
    assert {"lora", "hf_efcp"} < set(data.tags)
    assert text.count("`LowRankMFAC` of hf_efcp") == 1


def test_the_model_card_of_a_stock_optimizer_is_the_parents(tmp_path):
    args = arguments(tmp_path, optim="sgd", max_steps=1)
    ours = card_of(train(args, tiny_bert(), toy_rows(16))[0])
    assert ours == card_of(train(args, tiny_bert(), toy_rows(16), trainer_cls=Trainer)[0])
    assert ours[0].tags == ["generated_from_trainer"]
    assert "- optimizer: Use " in ours[1]
