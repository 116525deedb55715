from __future__ import annotations

import logging
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from ranks import leave
from tiny import arguments, needs_transformers_5, parameters, tiny_bert, toy_rows, train
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_efcp
from hf_efcp import EFCP, EFCPTrainer, SparseMFAC
from hf_efcp.compressors import TopK
from hf_efcp.preconditioners import MFAC

# The paper's rule: AdamW's metric makes steps of what is rounding only, the gradient of a key's bias.
SPARSE = {
    "optim": "sparse_mfac",
    "optim_args": "num_grads=4,density=0.2,block_size=256,metric=none,damp=1e-3",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
}
# The head's two rows have opposite gradients: which entry of a pair Top-k keeps is up to the last bit.
WITHOUT_TIES = {**SPARSE, "optim_args": SPARSE["optim_args"] + ",exclude=classifier"}
ONE_BATCH = {"per_device_train_batch_size": 16}
ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[name] - b[name]).float().flatten() for name in a]).norm())


# The true gradient


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


# Creating the optimizer


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


# The model card


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


# Resuming


def interrupted(folder: Path, dtype: torch.dtype, **kwargs: Any) -> tuple[dict[str, torch.Tensor], Path]:
    """Train 12 steps; return the parameters, and a folder that holds the checkpoint of step 8 only."""
    model = tiny_bert(dropout=0.1, dtype=dtype)
    args = arguments(folder / "whole", save_strategy="steps", save_steps=8, **resumable(), **kwargs)
    train(args, model, toy_rows(40))
    (folder / "cut").mkdir()
    shutil.move(folder / "whole" / "checkpoint-8", folder / "cut" / "checkpoint-8")
    return parameters(model), folder / "cut"


def resumable() -> dict[str, Any]:
    options = "num_grads=3,density=0.1,block_size=1024,momentum=0.5,exclude=word_embeddings"
    return {"max_steps": 12, "optim": "sparse_mfac", "optim_args": options, "weight_decay": 0.01, "learning_rate": 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, dtype):
    expected, folder = interrupted(tmp_path, dtype)
    stored = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
    model = tiny_bert(seed=1, dropout=0.1, dtype=dtype)
    trainer = EFCPTrainer(model=model, args=arguments(folder, **resumable()), train_dataset=toy_rows(40))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    found = parameters(model)
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()
    assert {p.dtype for p in found.values()} == {dtype}

    # Not because nothing happened: the four steps move the parameters, and with an empty window they move elsewhere.
    start = tiny_bert(dtype=dtype).from_pretrained(folder / "checkpoint-8", dtype=dtype)
    assert distance(found, parameters(start)) > 1e-3
    for state in stored["state"].values():
        if "values" in state:
            state["values"].zero_()
    torch.save(stored, folder / "checkpoint-8" / "optimizer.pt")
    other = tiny_bert(seed=1, dropout=0.1, dtype=dtype)
    trainer = EFCPTrainer(model=other, args=arguments(folder, **resumable()), train_dataset=toy_rows(40))
    trainer.train(resume_from_checkpoint=True)
    assert distance(found, parameters(other)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_checkpoint_holds_the_window_with_its_dtypes(tmp_path, dtype):
    _, folder = interrupted(tmp_path, dtype)
    stored = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
    model = tiny_bert(dtype=dtype)
    trainer = EFCPTrainer(model=model, args=arguments(folder, **resumable()), train_dataset=toy_rows(40))
    optimizer = trainer.create_optimizer()
    optimizer.load_state_dict(stored)
    for found in (stored, optimizer.state_dict()):
        adamw, *window = sorted(found["state"].values(), key=lambda state: "indices" in state)
        assert {name: value.dtype for name, value in adamw.items()} == {
            "step": torch.float32,
            "exp_avg": dtype,
            "exp_avg_sq": dtype,
        }
        assert len(window) == len(parameters(model)) - 1
        for state in window:
            assert {name: value.dtype for name, value in state.items() if torch.is_tensor(value)} == {
                "indices": torch.uint8,  # bytes
                "values": torch.bfloat16,
                "error": torch.int8,
                "error_scale": torch.float32,
                "second_moment": torch.int8,
                "second_moment_scale": torch.float32,
                "momentum": torch.float32,
                "gram": torch.float64,
            }
            assert state["gram"].shape == (3, 3)
            assert bool((state["gram"].diagonal() > 0).all())
            assert (state["pushed"], state["gradients"]) == (8, 8)
    for position, state in stored["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(optimizer.state_dict()["state"][position][name], value, rtol=0, atol=0)


# Steps that are left out


def test_skipped_steps_are_logged_and_counted_at_the_end(tmp_path, caplog):
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (2, 3):
                next(kwargs["model"].parameters()).grad[0] = float("nan")

    def run(*callbacks: TrainerCallback) -> list[dict[str, Any]]:
        model = tiny_bert()
        optimizer = EFCP(
            model.parameters(), 1e-3, compressor=TopK(0.1, 256), preconditioner=MFAC(1e-3), num_grads=3,
            nonfinite="skip",
        )  # fmt: skip
        args = arguments(tmp_path, max_steps=6, logging_strategy="steps", logging_steps=1, max_grad_norm=0.0)
        trainer = EFCPTrainer(
            model=model, args=args, train_dataset=toy_rows(64), optimizers=(optimizer, None), callbacks=list(callbacks)
        )
        with caplog.at_level(logging.WARNING, logger="hf_efcp"):
            trainer.train()
        return trainer.state.log_history

    assert all("skipped_steps" not in entry for entry in run())
    assert [record for record in caplog.records if record.name.startswith("hf_efcp")] == []
    history = run(Spoil())
    assert [entry.get("skipped_steps") for entry in history] == [None, None, 1, 2, 2, 2, 2]
    (record,) = [record for record in caplog.records if record.name == "hf_efcp.trainer.trainer"]
    assert record.getMessage() == "2 of 6 steps were skipped because gradients were NaN or infinite"


# What cannot work


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("deepspeed", "DeepSpeed, which hands them flattened parameters: train on .*DDP.*FSDP version 2"),
        ("fsdp", "FSDP version 1, which hands them flattened parameters: use version 2"),
    ],
)
def test_flattened_parameters_are_refused_for_efcp_only(tmp_path, monkeypatch, plugin, message):
    original = EFCPTrainer.create_accelerator_and_postprocess

    def pretend(self: EFCPTrainer) -> None:
        original(self)
        setattr(self, f"is_{plugin}_enabled", True)
        self.accelerator = Pretended(self.accelerator)

    class Pretended:
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1, state_dict_type=""))

        def __init__(self, accelerator: Any) -> None:
            self.accelerator = accelerator

        def __getattr__(self, name: str) -> Any:
            return getattr(self.accelerator, name)

    monkeypatch.setattr(EFCPTrainer, "create_accelerator_and_postprocess", pretend)
    with pytest.raises(ValueError, match=message):
        EFCPTrainer(model=tiny_bert(), args=arguments(tmp_path, **SPARSE))
    with pytest.raises(ValueError, match=message):
        EFCPTrainer(model=tiny_bert(), args=arguments(tmp_path), optimizer_cls_and_kwargs=(SparseMFAC, {}))
    EFCPTrainer(model=tiny_bert(), args=arguments(tmp_path, optim="sgd"))


def test_a_model_that_was_distributed_while_it_was_loaded_is_refused(tmp_path, monkeypatch):
    model = tiny_bert()
    monkeypatch.setattr(type(model), "is_distributed_loading_by_transformers", True, raising=False)
    with pytest.raises(ValueError, match="that from_pretrained has distributed .*: load it whole and train on"):
        EFCPTrainer(model=model, args=arguments(tmp_path, **SPARSE))


def test_float16_parameters_under_fp16_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fp16=True cannot train float16 parameters, got 41 such as bert\.emb"):
        EFCPTrainer(model=tiny_bert(dtype=torch.float16), args=arguments(tmp_path, fp16=True, **SPARSE))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_float32_parameters(tmp_path, precision):
    model = tiny_bert()
    before = parameters(model)
    args = arguments(tmp_path, max_steps=6, **{precision: True}, **SPARSE)
    _, gradients = train(args, model, toy_rows(48))
    assert {g.dtype for g in gradients} == {torch.float32}
    assert distance(parameters(model), before) > 0.01
    assert all(bool(p.isfinite().all()) for p in model.parameters())
