"""The projected optimizers in the Trainer: LORENZA's closure is made there, diagnostics and cards know them."""

import math

import pytest
import torch
from problems import flat
from ranks import run as run_ranks
from relatives import build, decaying
from tiny import arguments, needs_transformers_5, tiny_bert, toy_rows, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_efcp import LORENZA, AdaRankGrad, EFCPTrainer, GaLore, create_optimizer, for_trainer
from hf_efcp.diagnostics import measure, snapshot
from hf_efcp.projected import ProjectedAdam
from hf_efcp.trainer import card, compatibility

UPHILL = {
    "optim": "lorenza", "optim_args": "rank=4,scale=1,update_gap=3,rho=0.5,mu=0.1,probes=2", "learning_rate": 2e-3,
    "max_steps": 6, "lr_scheduler_type": "constant",
}  # fmt: skip


class Weights(TrainerCallback):
    """Weights when a step begins, and before the optimizer's own."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append([flat(kwargs["model"].parameters())])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen[-1].append(flat(kwargs["model"].parameters()))


def trained(folder, model=None, rows=None, callbacks=(), **settings):
    model = tiny_bert() if model is None else model
    args = arguments(folder, **{**UPHILL, "per_device_train_batch_size": 8, **settings})
    trainer = EFCPTrainer(model=model, args=args, train_dataset=rows or toy_rows(64), callbacks=list(callbacks))
    trainer.train()
    return trainer, flat(model.parameters())


def moved(end):
    return (end - flat(tiny_bert().parameters())).norm()


def test_it_is_the_loop_of_ones_own(tmp_path):
    """Clipping, which comes between ascent and step, included."""
    rows = toy_rows(8)
    _, end = trained(tmp_path, rows=rows, max_grad_norm=0.05)
    model = tiny_bert().train()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    # Its groups, for random numbers go by the positions of the parameters.
    settings = dict(lr=2e-3, rank=4, scale=1.0, update_gap=3, rho=0.5, mu=0.1, probes=2)
    optimizer = create_optimizer("lorenza", model, **settings)
    for _ in range(6):
        with optimizer.ascent(lambda: model(**batch).loss):
            model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert (flat(model.parameters()) - end).norm() < 2e-3 * moved(end)
    _, without = trained(tmp_path, rows=rows, max_grad_norm=0.05, optim_args="rank=4,scale=1,update_gap=3,rho=0")
    assert (without - end).norm() > 2e-2 * moved(end)


def test_accumulation_is_one_large_batch(tmp_path):
    _, whole = trained(tmp_path)
    _, cut = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (whole - cut).norm() < 5e-3 * moved(whole)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 3}], ids=str)
def test_clipping_and_the_step_see_the_weights_as_they_were(tmp_path, settings):
    watch = Weights()
    trained(tmp_path, tiny_bert(dropout=0.1), callbacks=[watch], **settings)
    assert len(watch.seen) == 6
    for begin, before in watch.seen:
        assert torch.equal(begin, before)
    assert not torch.equal(watch.seen[0][0], watch.seen[-1][0])


def test_an_error_in_a_backward_pass_leaves_the_weights_as_they_were(tmp_path, monkeypatch):
    model, watch = tiny_bert(), Weights()

    def broken(*args, **kwargs):
        if len(watch.seen) == 3:
            assert not torch.equal(flat(model.parameters()), watch.seen[2][0])
            raise KeyboardInterrupt
        return backward(*args, **kwargs)

    args = arguments(tmp_path, **UPHILL, per_device_train_batch_size=8)
    trainer = EFCPTrainer(model=model, args=args, train_dataset=toy_rows(64), callbacks=[watch])
    backward = trainer.accelerator.backward
    monkeypatch.setattr(trainer.accelerator, "backward", broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(flat(model.parameters()), watch.seen[2][0])


REPLICAS = {
    "lorenza": UPHILL["optim_args"],
    "galore": "rank=4,scale=1,update_gap=10",  # one subspace: the signs of the next hang on the last bit
    "adarankgrad": "max_rank=4,scale=1,max_gap=3,residual=0.2",
    "natural_galore": "rank=4,scale=1,update_gap=10,history=3",
}


def _replica(rank, folder):
    return {
        optim: trained(f"{folder}/{rank}/{optim}", optim=optim, optim_args=options, per_device_train_batch_size=4)[1]
        for optim, options in REPLICAS.items()
    }


def test_replicas_are_one_process_with_their_batches(tmp_path):
    first, second = run_ranks(_replica, 2, tmp_path, str(tmp_path))
    for optim, options in REPLICAS.items():
        assert torch.equal(first[optim], second[optim])
        _, alone = trained(tmp_path / "alone", optim=optim, optim_args=options)
        assert (alone - first[optim]).norm() < 5e-3 * moved(alone)


def plain_arguments(folder):
    return TrainingArguments(str(folder), use_cpu=True, max_steps=2, report_to="none", save_strategy="no")


@needs_transformers_5
def test_a_factory_for_a_plain_trainer_is_refused_with_the_way_out(tmp_path):
    args = plain_arguments(tmp_path)
    with pytest.raises(ValueError, match="lorenza evaluates the loss before .*use EFCPTrainer"):
        for_trainer("lorenza", args)
    _, options = for_trainer("lorenza", args, "rho=0,rank=4")
    assert options["rank"] == 4


def test_a_plain_trainer_is_refused_with_the_way_out(tmp_path):
    args = plain_arguments(tmp_path)
    model = tiny_bert()
    start = flat(model.parameters())
    trainer = Trainer(
        model=model, args=args, train_dataset=toy_rows(16), optimizers=(LORENZA(model.parameters(), rank=4), None)
    )
    with pytest.raises(ValueError, match=r"needs step\(closure\), .*use EFCPTrainer in the place of Trainer"):
        trainer.train()
    assert torch.equal(flat(model.parameters()), start)


def test_fsdp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(EFCPTrainer, "is_fsdp_enabled", True, raising=False)
    monkeypatch.setattr("hf_efcp.trainer.trainer.Trainer.__init__", lambda self, *args, **kwargs: None)
    trainer = EFCPTrainer.__new__(EFCPTrainer)
    trainer.is_deepspeed_enabled = False
    with pytest.raises(ValueError, match="GaLore and its relatives project whole matrices, which FSDP shards"):
        compatibility.refuse_what_cannot_work(trainer, issubclass(GaLore, ProjectedAdam))


@pytest.mark.parametrize("optim", ["galore", "adarankgrad", "natural_galore", "lorenza"])
def test_diagnostics_are_in_the_logs_and_training_is_the_same(tmp_path, optim):
    capacity = "max_rank" if optim == "adarankgrad" else "rank"
    settings = {"optim": optim, "optim_args": f"{capacity}=4,scale=1", "max_steps": 4, "logging_strategy": "steps",
                "logging_steps": 2}  # fmt: skip
    watched, end = trained(tmp_path, efcp_diagnostics_steps=2, **settings)
    _, plain = trained(tmp_path, **settings)
    assert torch.equal(end, plain)
    first = watched.state.log_history[0]
    assert first["efcp/sampled_step"] == 2
    assert 1 <= first["efcp/subspace_rank"] <= 4
    assert 0.0 < first["efcp/energy_kept"] <= 1.0
    assert first["efcp/refreshes"] == 1
    assert first["efcp/update_norm"] > 0.0
    assert first["efcp/state_bytes"] == watched.optimizer.optimizer.memory()["total"]


def test_diagnostics_of_known_subspaces():
    """A gradient of two equal directions in a subspace of one of them, which then turns by a right angle."""
    param = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = GaLore([param], lr=0.1, rank=1, scale=0.5, update_gap=2)
    first, second = torch.zeros(6, 5), torch.zeros(6, 5)
    first[0, 0], second[1, 1] = 1.0, 1.0
    found = []
    for gradient in (2 * first, first + second, 3 * second):
        param.grad = gradient
        before = snapshot(optimizer)
        optimizer.step()
        found.append(measure(optimizer, before))
    assert [values["energy_kept"] for values in found] == pytest.approx([1.0, 0.5, 1.0])
    assert [values["subspace_turn"] for values in found] == pytest.approx([0.0, 0.0, 1.0])
    assert [values["refreshes"] for values in found] == [1, 1, 2]
    assert found[0]["update_norm"] == pytest.approx(0.5, rel=1e-4)
    assert found[0]["cosine"] == pytest.approx(1.0)
    assert not math.isnan(found[2]["cosine"])


def test_rank_in_the_diagnostics_is_the_mean():
    source = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(12, 9)) for _ in range(2)]
    optimizer = AdaRankGrad(params, max_rank=4, residual=1e-3)
    for param, rank in zip(params, (1, 4), strict=True):
        param.grad = decaying((12, 9), source, rank)
    before = snapshot(optimizer)
    optimizer.step()
    assert measure(optimizer, before)["subspace_rank"] == 2.5


def test_the_card_names_the_paper():
    optimizer = build("adarankgrad", tiny_bert().parameters())
    text = card.describe(optimizer)
    assert "`AdaRankGrad` of hf_efcp" in text
    assert "an implementation of [AdaRankGrad](https://arxiv.org/abs/2410.17881)" in text
    assert "- max_rank: 3" in text
    assert "projected" not in text


@pytest.mark.parametrize("optim", ["galore", "lorenza"])
def test_checkpoints_of_others_are_refused_in_words(tmp_path, optim):
    rows = toy_rows(16)
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8}
    train(arguments(tmp_path, optim=optim, optim_args="rank=4", max_steps=2, **settings), tiny_bert(), rows)
    for other, message in (
        (
            "natural_galore",
            f"was written by {'GaLore' if optim == 'galore' else 'LORENZA'}, and this optimizer is Natur",
        ),
        ("lowrank_mfac", "another optimizer of hf_efcp, .* and this optimizer is LowRankMFAC"),
        ("adamw_torch", "by an optimizer of hf_efcp, and this optimizer is AdamW"),
    ):
        args = arguments(tmp_path, optim=other, max_steps=4, **settings)
        with pytest.raises(ValueError, match=message):
            EFCPTrainer(model=tiny_bert(), args=args, train_dataset=rows).train(resume_from_checkpoint=True)
