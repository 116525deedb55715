"""A Trainer that creates EFCP optimizers by name and gives the optimizer the true gradient."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from .factory import create_optimizer, efcp_name, parse_optim_args
from .optimizer import EFCP

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
    - What an EFCP optimizer cannot do is refused at construction: DeepSpeed, FSDP, float16 parameters under fp16.
    - `train` refuses a checkpoint without the optimizer's state, which the parent would start afresh without a word.

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
            self._refuse_what_cannot_work()

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as the parent does.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one in `args.output_dir`.
            *args: The parent's further arguments.
            **kwargs: The parent's further arguments.

        Returns:
            What the parent returns.

        Raises:
            FileNotFoundError: If the checkpoint lacks the state of the optimizer or the scheduler.
        """
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            if self._efcp and last and not os.path.isfile(os.path.join(last, name)):
                raise FileNotFoundError(
                    f"{last} has no {name}: training would go on with an empty window of gradients. Resume from "
                    "another checkpoint, or load the model from this one and train without resume_from_checkpoint."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)  # the parent types it as optional; after construction it never is None

    def _asks_for_efcp(self) -> bool:
        if self.optimizer is not None:
            return isinstance(self.optimizer, EFCP)
        if self.optimizer_cls_and_kwargs is not None:
            given = self.optimizer_cls_and_kwargs[0]
            return isinstance(given, type) and issubclass(given, EFCP)
        return efcp_name(self.args.optim) is not None

    def _refuse_what_cannot_work(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "EFCP optimizers do not work with DeepSpeed, which hands them flattened parameters: train without it, "
                "on one device or with torchrun (DDP)"
            )
        if self.args.fsdp or self.is_fsdp_enabled or self.is_distributed_loading_by_transformers:
            raise ValueError(
                "EFCP optimizers do not support FSDP or other sharded parameters yet: train on one device or with "
                "torchrun (DDP)"
            )
        half = [name for name, p in self._module().named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if half and self.args.mixed_precision == "fp16":
            raise ValueError(
                f"fp16=True cannot train float16 parameters, got {len(half)} such as {half[0]}: load the model with "
                "dtype=torch.float32 (fp16=True or bf16=True then give mixed precision) or dtype=torch.bfloat16"
            )


def _takes_own_mean(model: nn.Module) -> bool:
    # All modules, to look through whatever wraps the head: PEFT's models, the user's own.
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return any(head in name for name in classes for head in _MEAN_HEADS)
