"""Who adds `EFCPCallback`, and what it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from callback_cases import ALL, EVERY_STEP, Reporter, ours, samples, trainer_of
from tiny import arguments, parameters, tiny_bert, toy_rows
from transformers import Trainer, TrainingArguments

from hf_efcp import EFCPCallback, EFCPTrainer, SparseMFAC


def test_the_one_that_is_given_stays_alone(tmp_path, caplog):
    callback = EFCPCallback(every=7)
    trainer = trainer_of(tmp_path, callback, efcp_diagnostics_steps=2)
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, EFCPCallback)] == [callback]
    assert caplog.messages == []
    trainer = trainer_of(tmp_path)
    assert not any(isinstance(c, EFCPCallback) for c in trainer.callback_handler.callbacks)


def test_an_optimizer_that_is_given_is_measured_under_plain_arguments(tmp_path):
    model = tiny_bert()
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, disable_tqdm=True, logging_steps=2, report_to=[],
        save_strategy="no",
    )  # fmt: skip
    optimizer = SparseMFAC(model.parameters(), lr=1e-3, num_grads=4)
    trainer = EFCPTrainer(
        model=model, args=args, train_dataset=toy_rows(16), callbacks=[EFCPCallback(2)], optimizers=(optimizer, None)
    )
    trainer.train()
    assert samples(trainer.state.log_history) == [(2, 2)]


def test_a_stock_optimizer_by_name_trains_without(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_efcp"):
        trainer = trainer_of(
            tmp_path, optim="sgd", optim_args=None, efcp_diagnostics_steps=1, max_steps=2, **EVERY_STEP
        )
        trainer.train()
    assert caplog.messages == ["efcp_diagnostics_steps=1 has no effect: the optimizer is not one of hf_efcp"]
    assert all(ours(entry) == {} for entry in trainer.state.log_history)


def test_the_plain_trainer_says_what_it_cannot_do(tmp_path, caplog):
    before, after = Reporter(), Reporter()
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=5, disable_tqdm=True, logging_steps=2, report_to=[],
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=tiny_bert(), args=args, train_dataset=toy_rows(40), callbacks=[before, EFCPCallback(2), after],
        optimizer_cls_and_kwargs=(SparseMFAC, {"lr": 1e-3, "num_grads": 4}),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "hf_efcp"):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "hf_efcp.trainer.callbacks"]
    assert message.endswith("callbacks that come before it do not report them: use EFCPTrainer")
    assert samples(trainer.state.log_history) == [(2, 2), (4, 4)]
    assert [set(ours(logs)) for _, logs in before.seen] == [set(), set(), set()]
    assert [set(ours(logs)) for _, logs in after.seen] == [ALL, ALL, set()]


def test_another_optimizer_is_refused_before_the_first_step(tmp_path):
    model = tiny_bert()
    start = parameters(model)
    args = arguments(tmp_path, optim="adamw_torch", max_steps=1)
    trainer = EFCPTrainer(model=model, args=args, train_dataset=toy_rows(8), callbacks=[EFCPCallback()])
    with pytest.raises(TypeError, match='optimizers of hf_efcp, but this Trainer has AdamW: .*optim="sparse_mfac"'):
        trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in parameters(model).items())


def test_shards_are_refused_before_the_first_step(sharded):
    optimizer = SparseMFAC([sharded])
    with pytest.raises(ValueError, match=r"need whole parameters, but FSDP has sharded them.*turn the diagnostics off"):
        EFCPCallback().on_train_begin(None, None, None, optimizer=SimpleNamespace(optimizer=optimizer))


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_every_is_a_positive_int(every, error):
    with pytest.raises(error, match=f"every .*{every}"):
        EFCPCallback(every)


def test_a_negative_number_of_steps_is_found_at_construction(tmp_path):
    with pytest.raises(ValueError, match="efcp_diagnostics_steps is the number of steps.*or 0 for none; got -1"):
        arguments(tmp_path, efcp_diagnostics_steps=-1)
