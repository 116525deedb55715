"""TRL, Lightning, Optuna and the trackers: the blocks of docs/trainers.md that need a package of their own."""

import math
import sys
from pathlib import Path

import pytest
import torch
from test_any_trainer import flat, inside, run  # noqa: F401  # a folder of one's own
from tiny import needs_transformers_5, save_tiny_bert, tiny_bert, toy_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from hf_efcp import LowRankMFAC


@pytest.fixture
def chat(tmp_path):
    """A tokenizer, and a Llama of two layers."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "words"))
    tokenizer.eos_token = "[SEP]"
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    return tokenizer, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids))


@pytest.mark.parametrize("number", [pytest.param(0, marks=needs_transformers_5, id="SFT"), pytest.param(1, id="DPO")])
def test_trl(chat, number):
    pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer, llama = chat
    llama.save_pretrained("llama")  # DPO loads its reference from where the model came from
    llama = LlamaForCausalLM.from_pretrained("llama")
    start = flat(llama)
    texts = Dataset.from_dict({"text": ["good film the plot"] * 16})
    pairs = {"prompt": ["the film"] * 16, "chosen": [" good"] * 16, "rejected": [" bad"] * 16}
    left = run("TRL", number, llama=llama, tokenizer=tokenizer, texts=texts, pairs=Dataset.from_dict(pairs))
    optimizer = left["trainer"].optimizer.optimizer
    assert type(optimizer) is LowRankMFAC
    assert next(iter(optimizer.state.values()))["pushed"] == 2
    assert (flat(llama) - start).norm() > 0


def test_lightning_trains_and_resumes(tmp_path):
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)
    model = tiny_bert()
    start = flat(model)
    left = run("Lightning", model=model, dataset=toy_rows(32))
    optimizer = left["trainer"].optimizers[0]
    assert type(optimizer) is LowRankMFAC
    assert next(iter(optimizer.state.values()))["pushed"] == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4 * (1 + math.cos(math.pi / 100)) / 2)  # one epoch
    assert (flat(model) - start).norm() > 0

    left["trainer"].save_checkpoint(tmp_path / "half.ckpt")
    ends = []
    for checkpoint in (None, str(tmp_path / "half.ckpt")):
        module = left["Lit"](tiny_bert())
        quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(max_epochs=2, gradient_clip_val=1.0, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(toy_rows(32), batch_size=8), ckpt_path=checkpoint)
        assert trainer.optimizers[0].state[next(module.parameters())]["pushed"] == 8
        ends.append(flat(module))
    assert torch.equal(*ends)
    assert (ends[0] - flat(model)).norm() > 0


def test_optuna_searches_the_window():
    pytest.importorskip("optuna")
    left = run("Optuna", dataset=toy_rows(16), make_model=lambda: tiny_bert())
    best, trainer = left["best"], left["trainer"]
    assert set(best.hyperparameters) == {"num_grads", "learning_rate"}
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-3
    assert math.isfinite(best.objective)
    last = trainer.optimizer.optimizer.param_groups[0]
    assert last["num_grads"] in (4, 8)
    assert trainer.args.optim_args == f"num_grads={last['num_grads']}"


def logged(tracker):
    return run("TensorBoard, Weights & Biases, trackio", model=tiny_bert(), dataset=toy_rows(32), tracker=tracker)


def test_tensorboard_gets_the_diagnostics(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    logged("tensorboard")
    # transformers 4 does not read the variable, and writes beside the checkpoints.
    (events,) = {path.resolve() for place in (tmp_path, Path.cwd()) for path in place.rglob("events.out.tfevents.*")}
    board = EventAccumulator(str(events.parent)).Reload()
    cosines = board.Scalars("train/efcp/cosine")
    assert [point.step for point in cosines] == [2, 4]
    assert all(-1 <= point.value <= 1 for point in cosines)
    assert len(board.Scalars("train/loss")) == 2


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged("wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/global_step"] == 4
    assert -1 <= summary["train/efcp/cosine"] <= 1


def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    # It reads the variable TRACKIO_DIR when it is imported, and that was TRL's doing perhaps.
    for name, module in list(sys.modules.items()):
        if name.startswith("trackio.") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "runs")
    logged("trackio")
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(b"efcp/cosine" in path.read_bytes() for path in files)
