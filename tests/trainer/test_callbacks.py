"""`EFCPCallback` in the Trainer: what is logged, when, at what cost, and that training does not notice."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callback_cases import ALL, EVERY_STEP, SPARSE, Reporter, ours, samples, trainer_of
from diagnostics_cases import OF_THE_STEP
from tiny import Gradients, arguments, parameters, tiny_bert, toy_rows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_efcp import EFCPCallback, EFCPTrainer
from hf_efcp.trainer import callbacks


@pytest.mark.parametrize("by_hand", [True, False])
def test_the_values_reach_reporters_and_the_history(tmp_path, by_hand):
    """Also a reporter that comes before the callback, as Trainer's own do."""
    reporter = Reporter()
    given = (reporter, EFCPCallback(every=2)) if by_hand else (reporter,)
    steps = {} if by_hand else {"efcp_diagnostics_steps": 2}
    trainer = trainer_of(tmp_path, *given, max_steps=5, **EVERY_STEP, **steps)
    output = trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [set(ours(entry)) for entry in logged] == [
        ALL if step in (2, 4) else {"efcp/seconds_per_step"} for step in (1, 2, 3, 4, 5)
    ]
    assert samples(trainer.state.log_history) == [(2, 2), (4, 4)]
    assert [(step, ours(logs)) for step, logs in reporter.seen if "loss" in logs] == [
        (entry["step"], ours(entry)) for entry in logged
    ]
    assert all(type(value) in (int, float) and math.isfinite(value) for entry in logged for value in entry.values())
    assert ours(output.metrics) == {}
    found = ours(logged[3])
    assert found["efcp/state_bytes"] == trainer.optimizer.optimizer.memory()["total"]
    assert 0 < found["efcp/scaling_p05"] < found["efcp/scaling_p50"] < found["efcp/scaling_p95"]
    assert 0 < found["efcp/error_share"] < 1
    assert 1 < found["efcp/effective_rank"] < 4


def test_what_is_logged_is_what_happened(tmp_path):
    """The clipped gradient of accumulated batches, and the parameters that are not excluded."""
    gradients: list[torch.Tensor] = []
    thetas: list[torch.Tensor] = []

    class Witness(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            chosen = [p for name, p in kwargs["model"].named_parameters() if "embeddings" not in name]
            gradients.append(torch.cat([p.grad.flatten() for p in chosen]).double())
            thetas.append(torch.cat([p.detach().flatten() for p in chosen]).double())

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_pre_optimizer_step(args, state, control, **kwargs)

    trainer = trainer_of(
        tmp_path, Witness(), EFCPCallback(every=3), max_steps=3, gradient_accumulation_steps=2, max_grad_norm=0.125,
        lr_scheduler_type="constant", weight_decay=0.0, optim_args="num_grads=4,density=0.2,exclude=embeddings",
        **EVERY_STEP,
    )  # fmt: skip
    trainer.train()
    found = ours(trainer.state.log_history[2])
    g, u = gradients[-1], (thetas[-2] - thetas[-1]) / 1e-3
    assert found["efcp/sampled_step"] == 3
    assert found["efcp/gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-6)
    assert found["efcp/gradient_norm"] < 0.125
    assert found["efcp/update_norm"] == pytest.approx(float(u.norm()), rel=1e-6)
    assert found["efcp/cosine"] == pytest.approx(float(torch.cosine_similarity(g, u, dim=0)), rel=1e-6)
    assert 0 < found["efcp/cosine"] < 0.99
    assert torch.equal(gradients[-2], gradients[-1])


@pytest.mark.parametrize(
    ("logging", "expected"),
    [
        ({"logging_strategy": "steps", "logging_steps": 4}, [(4, 3), (8, 6), (10, 9)]),  # the last one before the end
        ({"logging_strategy": "steps", "logging_steps": 9}, [(9, 9)]),  # of three the newest, and none twice
        ({"logging_strategy": "no"}, [(10, 9)]),
    ],
)
def test_samples_wait_for_the_next_log(tmp_path, logging, expected):
    trainer = trainer_of(tmp_path, max_steps=10, efcp_diagnostics_steps=3, **logging)
    output = trainer.train()
    history = trainer.state.log_history
    assert samples(history) == expected
    assert "train_loss" in history[-1]
    assert ours(history[-1]) == {}
    assert ours(output.metrics) == {}


def test_an_evaluation_takes_no_sample(tmp_path):
    args = arguments(
        tmp_path, max_steps=4, efcp_diagnostics_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=4,
        logging_strategy="steps", **SPARSE,
    )  # fmt: skip
    trainer = EFCPTrainer(model=tiny_bert(), args=args, train_dataset=toy_rows(16), eval_dataset=toy_rows(4))
    trainer.train()
    assert [ours(entry) for entry in trainer.state.log_history if "eval_loss" in entry] == [{}, {}]
    assert samples(trainer.state.log_history) == [(4, 4)]


def test_seconds_are_the_mean_over_all_steps_since_the_last_log(tmp_path, monkeypatch):
    """A clock of which every reading takes longer: the step number s takes 2 s - 1 seconds."""
    readings: list[int] = []

    def clock() -> float:
        readings.append(len(readings))
        return float((len(readings) // 2) ** 2)

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=clock))
    trainer = trainer_of(tmp_path, EFCPCallback(every=4), max_steps=6, logging_strategy="steps", logging_steps=3)
    trainer.train()
    found = [entry["efcp/seconds_per_step"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == [(1 + 3 + 5) / 3, (7 + 9 + 11) / 3]
    assert len(readings) == 2 * 6


class Operations(TorchDispatchMode):
    """The entries of all that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.entries += result.numel() if isinstance(result, torch.Tensor) else 1
        return result


def test_only_sampled_steps_compute_anything(tmp_path):
    work: dict[int, int] = {}

    class Spied(EFCPCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with Operations() as spy:
                super().on_pre_optimizer_step(args, state, control, **kwargs)
            work[state.global_step + 1] = spy.entries

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with Operations() as spy:
                super().on_optimizer_step(args, state, control, **kwargs)
            work[state.global_step + 1] += spy.entries

        def take(self, logs: dict[str, float]) -> dict[str, float]:
            with Operations() as spy:
                values = super().take(logs)
            assert spy.entries == 0
            return values

    trainer = trainer_of(tmp_path, Spied(every=3), max_steps=8, **EVERY_STEP)
    trainer.train()
    count = sum(param.numel() for param in trainer.model.parameters())
    assert sorted(work) == list(range(1, 9))
    assert [step for step, entries in work.items() if entries] == [3, 6]
    assert min(work[3], work[6]) > count


def test_training_does_not_notice(tmp_path):
    def run(*given: TrainerCallback) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[float]]:
        gradients = Gradients()
        trainer = trainer_of(
            tmp_path, gradients, *given, max_steps=9, gradient_accumulation_steps=2, **EVERY_STEP,
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return parameters(trainer.model), gradients.seen, losses

    plain, watched = run(), run(EFCPCallback(every=2))
    assert {name for name in plain[0] if not torch.equal(plain[0][name], watched[0][name])} == set()
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))
    assert plain[2] == watched[2]
    start = parameters(tiny_bert())
    assert all(not torch.equal(plain[0][name], start[name]) for name in start)


def test_a_skipped_step_has_no_update(tmp_path):
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == 2:
                next(kwargs["model"].parameters()).grad[0] = float("nan")

    trainer = trainer_of(
        tmp_path, EFCPCallback(every=1), Spoil(), max_steps=3, max_grad_norm=0.0, **EVERY_STEP,
        optim_args="num_grads=4,nonfinite=skip", save_strategy="steps", save_steps=3, logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer.train()
    logged = [set(ours(entry)) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [ALL, ALL - {f"efcp/{name}" for name in OF_THE_STEP}, ALL]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    written = [value for entry in state["log_history"] for value in ours(entry).values()]
    assert len(written) == 3 * len(ALL) - len(OF_THE_STEP)
    assert all(math.isfinite(value) for value in written)


def test_a_second_training_starts_afresh(tmp_path):
    trainer = trainer_of(tmp_path, EFCPCallback(every=2), max_steps=2, **EVERY_STEP)
    trainer.train()
    trainer.train()
    assert samples(trainer.state.log_history) == [(2, 2)]
    found = [entry["efcp/seconds_per_step"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 2
