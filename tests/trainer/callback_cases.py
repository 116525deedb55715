"""What the tests of the callback share."""

from __future__ import annotations

from typing import Any

from diagnostics_cases import OF_THE_STEP
from tiny import arguments, tiny_bert, toy_rows
from transformers import TrainerCallback

from hf_efcp import EFCPTrainer

SPARSE = {
    "optim": "sparse_mfac",
    "optim_args": "num_grads=4,density=0.2,block_size=256",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 4,
}


EVERY_STEP = {"logging_strategy": "steps", "logging_steps": 1}


OF_THE_STATE = {"error_norm", "error_share", "effective_rank", "state_bytes", "state_bytes_per_parameter"}


ALL = {f"efcp/{name}" for name in OF_THE_STEP | OF_THE_STATE | {"sampled_step", "seconds_per_step"}}


class Reporter(TrainerCallback):
    """What a reporting integration sees, by step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


def trainer_of(folder: Any, *given: TrainerCallback, **settings: Any) -> EFCPTrainer:
    args = arguments(folder, **{**SPARSE, **settings})
    return EFCPTrainer(model=tiny_bert(dropout=0.1), args=args, train_dataset=toy_rows(64), callbacks=list(given))


def ours(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name.startswith("efcp/")}


def samples(history: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The steps of the log at which a sample came out, and the steps that were sampled."""
    return [(entry["step"], entry["efcp/sampled_step"]) for entry in history if "efcp/sampled_step" in entry]
