"""`EFCPTrainer`: exact resumes, skipped steps, and what cannot work."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import arguments, parameters, tiny_bert, toy_rows, train
from trainer_cases import SPARSE, distance
from transformers import (
    TrainerCallback,
)

from hf_efcp import EFCP, EFCPTrainer, SparseMFAC
from hf_efcp.compressors import TopK
from hf_efcp.preconditioners import MFAC


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
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
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
