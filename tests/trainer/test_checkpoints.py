"""Incomplete and foreign checkpoints, and what a resume warns of."""

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from resume_cases import FILES, SETTINGS
from states import assert_same
from tiny import arguments, tiny_bert, toy_rows
from transformers import TrainerCallback

from hf_efcp import EFCPTrainer


class Start(TrainerCallback):
    """Remembers the step that training starts at, and the optimizer's state then."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.state = copy.deepcopy(kwargs["optimizer"].state_dict()["state"])


def trainer(folder, **changes):
    args = arguments(folder, per_device_train_batch_size=4, **{**SETTINGS, **changes})
    run = EFCPTrainer(model=tiny_bert(seed=1), args=args, train_dataset=toy_rows(32), callbacks=[start := Start()])
    run.start = start
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_complete_checkpoint_is_taken_and_the_others_are_warned_about(folder, caplog):
    cut(folder / "checkpoint-8" / "trainer_state.json")
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    (folder / "checkpoint-100x").mkdir()
    run = trainer(folder)
    with caplog.at_level(logging.WARNING, logger="hf_efcp"):
        run.train(resume_from_checkpoint=True)
    assert run.start.step == 4
    first, second = (record.getMessage() for record in caplog.records if record.name == "hf_efcp.trainer.checkpoints")
    assert f"{folder}/checkpoint-8 is incomplete and was skipped: {folder}/checkpoint-8/trainer_state.json is" in first
    assert f"{folder}/checkpoint-6/optimizer.pt is missing" in second
    saved = torch.load(folder / "checkpoint-4" / "optimizer.pt")["state"]
    assert_same(saved, run.start.state)


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_needed_is_looked_at(folder, caplog, name):
    for step, spoil in ((6, cut), (8, Path.unlink)):
        spoil(folder / f"checkpoint-{step}" / name)
    run = trainer(folder)
    with caplog.at_level(logging.WARNING, logger="hf_efcp"):
        run.train(resume_from_checkpoint=True)
    assert run.start.step == 4
    assert len([record for record in caplog.records if record.name == "hf_efcp.trainer.checkpoints"]) == 2


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("spoil", [cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_an_incomplete_checkpoint_that_is_asked_for_is_refused(folder, name, spoil):
    path = folder / "checkpoint-6" / name
    spoil(path)
    lacks = "has no weights of a model" if not path.exists() and name == "model.safetensors" else f"{name} is"
    with pytest.raises(ValueError, match=f"checkpoint-6.*{lacks}.*training would not go on where it stopped"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_no_complete_checkpoint_is_an_error(folder):
    for step in (2, 4, 6, 8):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="none of the 4 checkpoints in .* is complete: .*checkpoint-8/optimizer.pt is"):
        trainer(folder).train(resume_from_checkpoint=True)
    for step in (2, 4, 6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # Trainer's own words
        trainer(folder).train(resume_from_checkpoint=True)


def test_stock_optimizers_resume_as_with_the_parent(folder):
    (folder / "checkpoint-8" / "optimizer.pt").unlink()
    run = trainer(folder, optim="sgd", optim_args=None, max_steps=9)
    run.train(resume_from_checkpoint=True)
    assert (run.start.step, run.state.global_step) == (8, 9)


def test_a_damage_inside_the_optimizer_file_is_seen(folder):
    """In the second moment, where neither torch.load nor the shapes of tensors would notice."""
    path = folder / "checkpoint-8" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    moment = torch.load(path)["state"][0]["second_moment"]
    found = data.find(moment.numpy().tobytes())
    assert found > 0
    data[found + 6] ^= 0x40
    path.write_bytes(bytes(data))
    assert not torch.equal(torch.load(path)["state"][0]["second_moment"], moment)
    for asked in (True, str(folder / "checkpoint-8")):
        with pytest.raises(ValueError, match="checkpoint-8/optimizer.pt is damaged .the checksum of its entry .*data/"):
            trainer(folder, max_steps=9).train(resume_from_checkpoint=asked)


def test_sharded_weights_are_looked_at(folder):
    model = tiny_bert()
    for step in (6, 8):
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="10KB")
        assert len(list(checkpoint.glob("model-*"))) > 1
    cut(max((folder / "checkpoint-8").glob("model-*")))
    run = trainer(folder)
    run.train(resume_from_checkpoint=True)
    assert run.start.step == 6
    index = json.loads((folder / "checkpoint-6" / "model.safetensors.index.json").read_text())
    (folder / "checkpoint-6" / min(index["weight_map"].values())).unlink()
    with pytest.raises(ValueError, match="checkpoint-6/model-00001.* is missing"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_checkpoint_is_incomplete_while_it_is_overwritten(folder, monkeypatch):
    """Weights of a new run beside the optimizer of an old one must not pass for a checkpoint."""
    for step in (2, 6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run = trainer(folder, save_strategy="steps", save_steps=4)
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", lambda output_dir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    with pytest.raises(ValueError, match="none of the 1 checkpoints .*checkpoint-4/optimizer.pt is missing"):
        trainer(folder).train(resume_from_checkpoint=True)


def test_checkpoints_of_other_optimizers_and_settings_are_refused(folder):
    with pytest.raises(ValueError, match="made with num_grads=3, this optimizer has num_grads=5") as caught:
        trainer(folder, optim_args="num_grads=5,density=0.1,block_size=1024").train(resume_from_checkpoint=True)
    assert any("checkpoint-8" in note for note in caught.value.__notes__)
    shutil.rmtree(folder)
    stock = trainer(folder, optim="adamw_torch", optim_args=None, save_strategy="steps", save_steps=4)
    stock.train()
    with pytest.raises(
        ValueError, match=r"written by (torch\.optim\.Adam or )?torch\.optim\.AdamW, and this optimizer is SparseMFAC"
    ):
        trainer(folder).train(resume_from_checkpoint=True)


def test_a_stock_optimizer_refuses_our_checkpoint_in_words(folder):
    """And goes on with its own."""
    for optim, name in (("adamw_torch", "AdamW"), ("sgd", "SGD")):
        with pytest.raises(ValueError, match=f"checkpoint-8 was written by .* hf_efcp, and this optimizer is {name}"):
            trainer(folder, optim=optim, optim_args=None).train(resume_from_checkpoint=True)
    shutil.rmtree(folder)
    trainer(folder, optim="sgd", optim_args=None, save_strategy="steps", save_steps=4).train()
    trainer(folder, optim="sgd", optim_args=None, max_steps=9).train(resume_from_checkpoint=True)


def test_resuming_warns_of_what_the_user_has_changed_and_of_nothing_else(folder):
    def caught(**changes):
        run = trainer(folder, **{"max_steps": 9, "warmup_steps": 3, **changes})
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            run.train(resume_from_checkpoint=True)
        return [str(warning.message) for warning in record if "settings of the checkpoint" in str(warning.message)]

    assert caught() == caught(lr_scheduler_type="cosine") == []
    options = SETTINGS["optim_args"]
    (message,) = caught(learning_rate=3e-4, weight_decay=0.2, optim_args=f"{options},damp=1e-3,momentum=0.5")
    given = "lr=0.0003 (in the checkpoint 0.0001), momentum=0.5 (in the checkpoint 0.0), weight_decay=0.2 (in the "
    given += "checkpoint 0.0), damp=0.001 (in the checkpoint 0.0), trust_lr=0.0 (in the checkpoint 0.0004). To use"
    assert f"those that were given: {given}" in message
    assert message.count("lr=0.0003") == 1  # of two groups


def test_a_window_that_training_cannot_fill_is_warned_of(tmp_path, caplog):
    def warned(**changes):
        caplog.clear()
        run = trainer(tmp_path, save_strategy="no", **changes)
        run.train()
        texts = [text for text in caplog.messages if "the window will never be full" in text]
        return run.optimizer.optimizer.memory()["total"], texts

    exact, texts = warned(optim_args="num_grads=8,density=0.1,block_size=1024")
    assert texts == []
    more, (text,) = warned(optim_args="num_grads=11,density=0.1,block_size=1024")
    assert text == (
        "num_grads=11, but there are only 8 training steps: the window will never be full. num_grads=8 holds as many "
        f"gradients, and takes {more - exact:,} bytes less"
    )
    assert more > exact


def test_nothing_of_an_earlier_run_is_left_in_a_checkpoint(folder):
    checkpoint = folder / "checkpoint-8"
    expected = {path.name for path in checkpoint.iterdir()}
    tiny_bert().save_pretrained(checkpoint, max_shard_size="10KB")  # and in one piece, from before
    for name in ("adapter_model.safetensors", "scaler.pt", "optimizer.bin", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(b"old")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (checkpoint / name).mkdir()
        (checkpoint / name / "old").write_bytes(b"old")
    assert len(list(checkpoint.iterdir())) > len(expected) + 7
    trainer(folder, save_strategy="steps", save_steps=8).train()
    assert {path.name for path in checkpoint.iterdir()} == expected
    trainer(folder, save_strategy="steps", save_steps=8, save_only_model=True).train()
    assert {path.name for path in checkpoint.iterdir()} & set(FILES) == {"model.safetensors", "trainer_state.json"}
