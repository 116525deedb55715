"""Diagnostics of an EFCP optimizer in Trainer's logs."""

from __future__ import annotations

import logging
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..diagnostics import Snapshot, measure, refuse_shards, snapshot
from ..family import AnyOptimizer

logger = logging.getLogger(__name__)


class EFCPCallback(TrainerCallback):
    """Logs what preconditioning does to the gradient, as `efcp/...`, wherever Trainer logs.

    Every `every` steps it measures one: it copies the parameters before the step and compares after it. The values
    come out at Trainer's next logging step, with the number of the step that they belong to; of several samples since
    the last logging step the newest. A sample that is left over at the end of training gets an entry of its own before
    the summary. Training is the same to the bit with and without it, on other steps it only reads the clock, and for a
    sample it needs as much memory again as the parameters, and up to 8 bytes per parameter more for the quantiles.

    - All that `hf_efcp.diagnostics.measure` returns, such as `efcp/cosine` and `efcp/scaling_p50`.
    - `efcp/sampled_step`: the step that was measured. One that was skipped has no update to measure.
    - `efcp/seconds_per_step`: seconds from before to after the optimizer's step, mean over all steps since the last
      logging step. On a GPU it is the time to start the work, for nothing waits for its end.

    `EFCPTrainer` puts the values into its logs, and adds the callback by itself if `efcp_diagnostics_steps` is given.
    Another Trainer shows its callbacks a log one after the other: there the values are in `log_history`, and only what
    comes after this callback reports them, as the progress log does.

    Args:
        every: Steps from one sample to the next, at least 1.

    Raises:
        ValueError: `every` is below 1.
        TypeError: `every` is not an int.

    Examples:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=20, **small))
        >>> dataset = [{"input_ids": [number, 3, 4], "labels": number % 2} for number in range(16)]
        >>> quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 2, "disable_tqdm": True}
        >>> from hf_efcp import EFCPCallback, EFCPTrainer, EFCPTrainingArguments
        >>> args = EFCPTrainingArguments("out", optim="lowrank_mfac", max_steps=2, **quiet)
        >>> trainer = EFCPTrainer(model=model, args=args, train_dataset=dataset, callbacks=[EFCPCallback(every=2)])
        >>> output = trainer.train()  # Trainer prints what it logs
        {'loss': ..., 'efcp/cosine': ...}
        {'train_runtime': ...}
        >>> trainer.state.log_history[0]["efcp/sampled_step"]
        2
    """

    def __init__(self, every: int = 50) -> None:
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every must be an int, got {every!r}")
        if every < 1:
            raise ValueError(f"every is the number of steps from one sample to the next, at least 1; got {every}")
        self.every = every
        self._warned = False
        self._before: Snapshot | None = None
        self._sample: dict[str, float] = {}
        self._seconds, self._steps, self._start = 0.0, 0, 0.0

    def take(self, logs: dict[str, float]) -> dict[str, float]:
        """What to log together with some values of Trainer's; it is handed out once.

        Args:
            logs: The values. Those of a logging step have a "loss", the summary of the training a "train_loss".

        Returns:
            The newest sample and the seconds; nothing with other logs, or if the summary has no sample to wait for.
        """
        if "loss" not in logs and not ("train_loss" in logs and self._sample):
            return {}
        values = dict(self._sample)
        if self._steps:
            values["seconds_per_step"] = self._seconds / self._steps
        self._reset()
        return {f"efcp/{name}": value for name, value in values.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an optimizer that cannot be measured.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: The optimizer, among others.
        """
        refuse_shards(_efcp(kwargs["optimizer"]))
        self._before = None  # of a training that broke off
        self._reset()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the parameters, if this step is measured, and start the clock.

        Args:
            args: Not used.
            state: Trainer's state.
            control: Not used.
            **kwargs: The optimizer, among others.
        """
        if (state.global_step + 1) % self.every == 0:
            self._before = snapshot(_efcp(kwargs["optimizer"]))
        self._start = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, and measure if this step is measured.

        Args:
            args: Not used.
            state: Trainer's state.
            control: Not used.
            **kwargs: The optimizer, among others.
        """
        self._seconds += time.perf_counter() - self._start
        self._steps += 1
        if self._before is not None:
            values = measure(_efcp(kwargs["optimizer"]), self._before)
            self._sample = {"sampled_step": state.global_step + 1, **values}
            self._before = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put into the log what no `EFCPTrainer` has taken before.

        Args:
            args: Not used.
            state: Trainer's state.
            control: Not used.
            logs: What is logged.
            **kwargs: Not used.
        """
        values = self.take(logs or {})
        if not values or logs is None:
            return
        logs.update(values)
        state.log_history[-1].update(values)
        if not self._warned:
            self._warned = True
            logger.warning(
                "this Trainer does not take the values of EFCPCallback into its logs, and callbacks that come before "
                "it do not report them: use EFCPTrainer"
            )

    def _reset(self) -> None:
        self._sample = {}
        self._seconds, self._steps = 0.0, 0


def _efcp(optimizer: Any) -> AnyOptimizer:
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    if not isinstance(inner, AnyOptimizer):
        raise TypeError(
            f"EFCPCallback measures the optimizers of hf_efcp, but this Trainer has {type(inner).__name__}: give it "
            'one, for example optim="sparse_mfac", or leave the callback out'
        )
    return inner
