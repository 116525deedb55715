"""Trainers and loops that know nothing of the package: every block of docs/trainers.md, with tiny models."""

import re
from pathlib import Path

import pytest
import torch
from tiny import needs_transformers_5, save_tiny_bert, tiny_bert, toy_rows
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from hf_efcp import EFCP, EFCPTrainer, EFCPTrainingArguments, LowRankMFAC, create_optimizer, for_trainer

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BLOCKS = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    for section in PAGE.read_text().split("\n## ")[1:]
}


def run(title, number=0, **names):
    """A block of a section of the page, and the names that it leaves behind."""
    exec(compile(BLOCKS[title][number], f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_page_has_these_blocks():
    assert {title: len(blocks) for title, blocks in BLOCKS.items()} == {
        "transformers' own Trainers": 2,
        "TRL": 2,
        "sentence-transformers": 1,
        "PEFT": 1,
        "Accelerate": 1,
        "A loop of your own": 1,
        "Lightning": 1,
        "Optuna": 1,
        "TensorBoard, Weights & Biases, trackio": 1,
    }


@needs_transformers_5
def test_trainer_of_transformers():
    model = tiny_bert()
    start = flat(model)
    left = run("transformers' own Trainers", model=model, dataset=toy_rows(32))
    optimizer = left["trainer"].optimizer.optimizer
    assert type(optimizer) is LowRankMFAC
    assert optimizer.param_groups[0]["num_grads"] == 8
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert optimizer.param_groups[0]["initial_lr"] == 2e-4
    assert (flat(model) - start).norm() > 0


@needs_transformers_5
def test_a_trainer_of_ours_knows_the_optimizer_of_the_factory():
    args = EFCPTrainingArguments("out", max_steps=2, save_steps=1, use_cpu=True, efcp_diagnostics_steps=1)
    made = {"args": args, "train_dataset": toy_rows(32), "optimizer_cls_and_kwargs": for_trainer("lowrank-mfac", args)}
    trainer = EFCPTrainer(model=tiny_bert(), **made)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is LowRankMFAC
    assert any("efcp/cosine" in row for row in trainer.state.log_history)
    Path("out", "checkpoint-2", "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-2/optimizer.pt is missing"):
        EFCPTrainer(model=tiny_bert(), **made).train(resume_from_checkpoint="out/checkpoint-2")


@needs_transformers_5
def test_it_steps_as_a_loop_of_ones_own():
    """Trainer's parameters go the way of the same optimizer in a loop."""
    ends = []
    for by_hand in (False, True):
        model, data = tiny_bert(), toy_rows(16)
        args = TrainingArguments("out", learning_rate=1e-3, max_steps=3, lr_scheduler_type="constant", max_grad_norm=0)
        args.per_device_train_batch_size, args.use_cpu = 16, True
        if by_hand:
            optimizer = create_optimizer("lowrank_mfac", model, lr=1e-3)
            batch = stacked(data)
            for _ in range(3):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
        else:
            Trainer(
                model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=for_trainer("lowrank_mfac", args)
            ).train()
        ends.append(flat(model))
    moved = (ends[0] - flat(tiny_bert())).norm()
    assert moved > 0
    assert (ends[0] - ends[1]).norm() < 1e-2 * moved  # the batch in another order


@needs_transformers_5
def test_seq2seq_trainer():
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    start = flat(model)
    data = [{"input_ids": [3, 4, 5], "labels": [5, 4, 1]}] * 16
    left = run("transformers' own Trainers", 1, t5=model, translations=data)
    assert left["trainer"].optimizer.optimizer is left["optimizer"]
    assert (flat(model) - start).norm() > 0


@needs_transformers_5
def test_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    word = Transformer(str(save_tiny_bert(tmp_path / "tiny")))
    encoder = SentenceTransformer(modules=[word, Pooling(word.get_word_embedding_dimension())], device="cpu")
    start = flat(encoder)
    left = run("sentence-transformers", encoder=encoder)
    assert isinstance(left["trainer"].optimizer.optimizer, LowRankMFAC)
    assert (flat(encoder) - start).norm() > 0


def test_peft():
    pytest.importorskip("peft")
    left = run("PEFT", model=tiny_bert())
    adapted, optimizer = left["adapted"], left["optimizer"]
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable)
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    before = torch.cat([p.detach().reshape(-1) for p in trainable])
    batch = toy_rows(8)
    inputs = stacked(batch)
    for _ in range(2):
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (torch.cat([p.detach().reshape(-1) for p in trainable]) - before).norm() > 0
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)


def test_accelerate():
    model, rows = tiny_bert(), toy_rows(8)
    start = flat(model)
    batch = stacked(rows)
    left = run("Accelerate", model=model, batches=[batch] * 3)
    assert isinstance(left["optimizer"].optimizer, EFCP)
    assert left["optimizer"].param_groups[0]["lr"] == pytest.approx(2e-4 * 0.7)
    assert (flat(left["model"]) - start).norm() > 0


def test_a_loop_of_ones_own():
    model = tiny_bert()
    start = flat(model)
    left = run("A loop of your own", model=model, batches=[stacked(toy_rows(8))] * 3)
    assert (flat(model) - start).norm() > 0
    assert left["optimizer"].state_dict()["state"][0]["pushed"] == 3


def test_transformers_4_takes_no_factory(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(
        RuntimeError, match=r"this is 4.57.1: give them optimizers=\(create_optimizer\('microadam', model"
    ):
        for_trainer("microadam", TrainingArguments("out"))


@needs_transformers_5
def test_what_does_not_fit_is_refused():
    args = TrainingArguments("out")
    with pytest.raises(TypeError, match="given in optim_args and as arguments: num_grads"):
        for_trainer("lowrank_mfac", args, "num_grads=4", num_grads=8)
    with pytest.raises(ValueError, match="unknown optimizer 'adamw'"):
        for_trainer("adamw", args)
    with pytest.raises(ValueError, match="optim_args: lr does not belong here, use learning_rate"):
        for_trainer("lowrank_mfac", args, "lr=1e-3")


def test_names_of_ours_are_refused_where_only_transformers_own_are_known():
    """Neither trains with another optimizer; the page has both, with the way out."""
    with pytest.raises(ValueError, match="lowrank_mfac is not a valid OptimizerNames"):
        TrainingArguments("out", optim="lowrank_mfac")
    args = EFCPTrainingArguments("out", optim="lowrank_mfac", use_cpu=True)
    with pytest.raises(ValueError, match="cannot instantiate unsupported optimizer: lowrank_mfac"):
        Trainer(model=tiny_bert(), args=args, train_dataset=toy_rows(8)).train()
