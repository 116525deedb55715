"""A Trainer that creates EFCP optimizers by name and gives the optimizer the true gradient."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from . import checkpoints, setups
from .callbacks import EFCPCallback
from .factory import create_optimizer, efcp_name, parse_optim_args
from .optimizer import EFCP

logger = logging.getLogger(__name__)

# Heads whose loss is a mean over their own batch, by what the names of their classes have in common.
_MEAN_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")


class EFCPTrainer(Trainer):
    """`transformers.Trainer` for EFCP optimizers; all that is not named here is as in the parent.

    - `args.optim` may be a key of `hf_efcp.OPTIMIZERS`, with its options in `args.optim_args`. As in the parent,
      `optimizers` and `optimizer_cls_and_kwargs` come before it.
    - The gradient is that of the mean loss, with any optimizer. Trainer believes of every model that takes keyword
      arguments that its loss is already divided by the number of items in all accumulated batches of all processes.
      The classification, multiple-choice and question-answering heads take the mean over their own batch, and their
      gradient came out too large by the accumulation steps and the number of processes. The steps and processes are
      now averaged, each with the same weight. A `compute_loss_func` is left to its author.
    - What an EFCP optimizer cannot do is refused at construction: DeepSpeed, FSDP version 1, float16 parameters
      under fp16. FSDP version 2 is Trainer's default and works.
    - Checkpoints are written file by file. `train(resume_from_checkpoint=True)` takes the newest complete one and
      warns about newer ones; a given one that is incomplete is refused, where the parent would go on with an empty
      window without a word. Stock optimizers are resumed as by the parent, but not from a checkpoint of ours.
    - Steps that `nonfinite="skip"` left out are in the logs as `skipped_steps`, with a warning at the end.
    - The values of an `EFCPCallback` are in the logs. `efcp_diagnostics_steps` of the arguments adds one, unless there
      is one.

    Args:
        *args: As in `transformers.Trainer`.
        **kwargs: As in `transformers.Trainer`.

    Raises:
        ValueError: If an EFCP optimizer is asked for where it cannot work.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is None and _takes_own_mean(self._module()):
            self.model_accepts_loss_kwargs = False
        self._efcp = self._asks_for_efcp()
        if self._efcp:
            setups.refuse_what_cannot_work(self)
        self._add_diagnostics(getattr(self.args, "efcp_diagnostics_steps", 0))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer that the arguments ask for, unless there is one.

        Args:
            model: The model whose parameters are optimized; None takes the trainer's.

        Returns:
            The optimizer, which is also `self.optimizer`.
        """
        name = efcp_name(self.args.optim)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and name is not None:
            self.optimizer = create_optimizer(
                name,
                self._module() if model is None else model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                **parse_optim_args(name, self.args.optim_args),
            )
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the scheduler, as the parent does, and warn of a window that training is too short to fill.

        Args:
            num_training_steps: The number of training steps.
            optimizer: The optimizer; None takes the trainer's.

        Returns:
            What the parent returns.
        """
        if ours := self._efcp_optimizer():
            num_grads = ours.param_groups[0]["num_grads"]
            if num_grads > num_training_steps > 0:
                sizes = [ours.planned_memory(count)["total"] for count in (num_grads, num_training_steps)]
                logger.warning(
                    "num_grads=%d, but there are only %d training steps: the window will never be full. num_grads=%d "
                    "holds as many gradients, and takes %s bytes less",
                    num_grads,
                    num_training_steps,
                    num_training_steps,
                    f"{sizes[0] - sizes[1]:,}",
                )
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as the parent does.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest complete one in `args.output_dir`.
            *args: The parent's further arguments.
            **kwargs: The parent's further arguments.

        Returns:
            What the parent returns.

        Raises:
            ValueError: If the checkpoint, or every checkpoint, is incomplete.
        """
        if self._efcp and resume_from_checkpoint:
            resume_from_checkpoint = checkpoints.choose(self, resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if skipped := self._skipped_steps():
            logger.warning(
                "%d of %d steps were skipped because gradients were NaN or infinite", skipped, output.global_step
            )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, as the parent does, with the steps that were skipped so far if there are any, and with diagnostics.

        Args:
            logs: The values.
            start_time: When training started.
        """
        if skipped := self._skipped_steps():
            logs["skipped_steps"] = skipped
        for callback in self._diagnostics():
            values = callback.take(logs)
            if "loss" in logs:
                logs.update(values)
            elif values:
                super().log(values)  # not into the summary, which train() returns
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._efcp:
            checkpoints.invalidate(self, self._get_output_dir(trial=trial))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self._efcp_optimizer()
        try:
            if checkpoint and optimizer and self.is_fsdp_enabled:
                checkpoints.check_settings(checkpoint, self, optimizer)
            elif checkpoint and not optimizer:
                checkpoints.refuse_ours(checkpoint, type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__)
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:
            error.add_note(f"raised while the optimizer was loaded from {checkpoint}")
            raise

    def _add_diagnostics(self, every: int) -> None:
        if not every or self._diagnostics():
            return
        if self._efcp:
            self.add_callback(EFCPCallback(every))
        else:
            logger.warning("efcp_diagnostics_steps=%d has no effect: the optimizer is not one of hf_efcp", every)

    def _diagnostics(self) -> list[EFCPCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EFCPCallback)]

    def _efcp_optimizer(self) -> EFCP | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        return optimizer if isinstance(optimizer, EFCP) else None

    def _skipped_steps(self) -> int:
        optimizer = self._efcp_optimizer()
        return optimizer.skipped_steps if optimizer else 0

    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)  # the parent types it as optional; after construction it never is None

    def _asks_for_efcp(self) -> bool:
        if self.optimizer is not None:
            return isinstance(self.optimizer, EFCP)
        if self.optimizer_cls_and_kwargs is not None:
            given = self.optimizer_cls_and_kwargs[0]
            return isinstance(given, type) and issubclass(given, EFCP)
        return efcp_name(self.args.optim) is not None


def _takes_own_mean(model: nn.Module) -> bool:
    # All modules, to look through whatever wraps the head: PEFT's models, the user's own.
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return any(head in name for name in classes for head in _MEAN_HEADS)
