"""A Trainer that creates EFCP optimizers by name and gives the optimizer the true gradient."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import TrainOutput

from ..factory import OPTIMIZERS, create_optimizer, efcp_name, parse_optim_args
from ..family import AnyOptimizer
from ..optimizer import EFCP
from ..projected import LORENZA, ProjectedAdam
from . import card, checkpoints, compatibility
from .any_trainer import OptimizerFactory
from .callbacks import EFCPCallback
from .uphill import Uphill

logger = logging.getLogger(__name__)


class EFCPTrainer(Trainer):
    """`transformers.Trainer` for EFCP optimizers; all that is not named here is as in the parent.

    - `args.optim` may be a key of `hf_efcp.OPTIMIZERS`, with its options in `args.optim_args`. As in the parent,
      `optimizers` and `optimizer_cls_and_kwargs` come before it.
    - The gradient is that of the mean loss, with any optimizer and any model. Trainer believes of every model that
      takes keyword arguments that its loss is divided by `num_items_in_batch`, the number of items in all accumulated
      batches of all processes. Most heads that are not language models take the mean over their own batch instead, and
      their gradient came out too large by the accumulation steps and the number of processes. Here what a model
      divides by that number is, as in the parent, the mean over all those items; all else in its loss is averaged over
      steps and processes, each with the same weight. A `compute_loss_func`, and a `compute_loss` that does not call
      this one, are left to their author, who says in `loss_is_scaled_for_ga` what the loss is (in older transformers,
      with `model_accepts_loss_kwargs = False` that it is the mean of a batch).
    - What an EFCP optimizer cannot do is refused at construction: DeepSpeed, FSDP version 1, float16 parameters
      under fp16. FSDP version 2 is Trainer's default and works.
    - Checkpoints are written file by file. `train(resume_from_checkpoint=True)` takes the newest complete one and
      warns about newer ones; a given one that is incomplete is refused, where the parent would go on with an empty
      window without a word. Stock optimizers are resumed as by the parent, but not from a checkpoint of ours.
    - LORENZA evaluates the loss of all accumulated batches by itself, before the first of their backward passes.
    - The model card has a section on the optimizer, however it was given, and the tag `hf_efcp`.
    - Steps that `nonfinite="skip"` left out are in the logs as `skipped_steps`, with a warning at the end.
    - The values of an `EFCPCallback` are in the logs. `efcp_diagnostics_steps` of the arguments adds one, unless there
      is one.

    Args:
        *args: As in `transformers.Trainer`.
        **kwargs: As in `transformers.Trainer`.

    Raises:
        ValueError: If an EFCP optimizer is asked for where it cannot work.

    Examples:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=20, **small))
        >>> dataset = [{"input_ids": [number, 3, 4], "labels": number % 2} for number in range(16)]
        >>> quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        >>> from hf_efcp import EFCPTrainer, EFCPTrainingArguments
        >>> args = EFCPTrainingArguments("out", optim="lowrank_mfac", max_steps=2, **quiet)
        >>> trainer = EFCPTrainer(model=model, args=args, train_dataset=dataset)
        >>> output = trainer.train()  # Trainer prints its summary
        {'train_runtime': ...}
        >>> output.global_step
        2
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Whether there is one label less than tokens in a row: the parent of transformers 5 knows it by the name
        # "...ForCausalLM" only, that of transformers 4 not at all.
        self._parent_counts = hasattr(self, "_loss_shifts_labels")
        self._loss_shifts_labels = getattr(self, "_loss_shifts_labels", False) or _is_causal(_unadapted(self._module()))
        asked = self._asked_for()
        self._efcp = issubclass(asked, AnyOptimizer)
        if self._efcp:
            compatibility.refuse_what_cannot_work(self, issubclass(asked, ProjectedAdam))
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
        return super().create_optimizer(*(() if model is None else (model,)))  # transformers 4 has no argument

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
        ours = self._efcp_optimizer()
        if isinstance(ours, EFCP):
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Collect the batches of a step, as the parent does.

        Args:
            *args: The parent's arguments.
            **kwargs: The parent's arguments.

        Returns:
            What the parent returns.
        """
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._uphill = Uphill(self, batches, items)
        return batches, items

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One backward pass, as the parent's; with LORENZA where its ascent has led.

        Args:
            model: The model, wrapped or not.
            *args: The parent's further arguments.
            **kwargs: The parent's further arguments.

        Returns:
            What the parent returns.
        """
        optimizer = self._bare_optimizer()
        if not isinstance(optimizer, LORENZA):
            return super().training_step(model, *args, **kwargs)
        with self._uphill.of(optimizer, model):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute a batch's share of the loss of a step.

        With `n` items, a model's loss is `a / n + b`: `a` is a sum over items that the model counts (language models),
        `b` a mean over the batch (BERT's heads) or a penalty, and mixtures of experts have both. Only the model knows
        which. Told of `n / batches` items, those of one batch on average, its loss is right for one batch whatever `a`
        and `b` are, and that loss over the number of batches is the share, `a / n + b / batches`.

        Args:
            model: The model, wrapped or not.
            inputs: The batch.
            return_outputs: Whether to return what the model returned, too.
            num_items_in_batch: The number of items in all batches of the step, or None if they were not counted.

        Returns:
            The loss, with the outputs if they are asked for.
        """
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
        devices = self._devices_counted()
        items_of_one = torch.as_tensor(num_items_in_batch) / (steps * devices)
        loss, outputs = super().compute_loss(model, inputs, True, items_of_one)
        # The parent's `training_step` divides by the steps where it was told that `compute_loss` does not.
        divided = hasattr(Trainer, "loss_is_scaled_for_ga") and self.loss_is_scaled_for_ga is False
        loss = loss / (devices if divided else steps * devices)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        if self._loss_shifts_labels and not self._parent_counts and batch_samples and "labels" in batch_samples[0]:
            batch_samples = [{"labels": batch["labels"][..., 1:]} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card as the parent does, which knows the optimizer by `args.optim` only, and describe it.

        Args:
            *args: The parent's arguments.
            **kwargs: The parent's arguments.
        """
        optimizer = self._efcp_optimizer()
        if optimizer is None:
            super().create_model_card(*args, **kwargs)
            return
        own, self.args = self.args, copy.copy(self.args)
        self.args.optim = ""  # the parent then leaves it out
        self.args.learning_rate = card.learning_rate(optimizer)
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args = own
        if self.is_world_process_zero():
            card.add_optimizer(Path(cast(str, self.args.output_dir), "README.md"), optimizer)

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
                checkpoints.refuse_ours(checkpoint, type(self._bare_optimizer()).__name__)
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:
            error.add_note(f"raised while the optimizer was loaded from {checkpoint}")
            raise

    def _devices_counted(self) -> int:
        # On how many devices the items were counted, which is also what the parent multiplies the loss by.
        if not self.args.average_tokens_across_devices:
            return 1
        return int(self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes // self.get_tp_size())

    def _add_diagnostics(self, every: int) -> None:
        if not every or self._diagnostics():
            return
        if self._efcp:
            self.add_callback(EFCPCallback(every))
        else:
            logger.warning("efcp_diagnostics_steps=%d has no effect: the optimizer is not one of hf_efcp", every)

    def _diagnostics(self) -> list[EFCPCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EFCPCallback)]

    def _efcp_optimizer(self) -> AnyOptimizer | None:
        optimizer = self._bare_optimizer()
        return optimizer if isinstance(optimizer, AnyOptimizer) else None

    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it

    def _skipped_steps(self) -> int:
        optimizer = self._efcp_optimizer()
        return optimizer.skipped_steps if optimizer else 0

    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)  # the parent types it as optional; after construction it never is None

    def _asked_for(self) -> type:
        """The class of the optimizer that was given or named; `object` where that is not one of ours."""
        if self.optimizer is not None:
            return type(self._bare_optimizer())
        asked = self.args.optim
        if self.optimizer_cls_and_kwargs is not None:
            given: Any
            given, options = self.optimizer_cls_and_kwargs  # which may hold a factory; the parent knows of classes
            if given is not OptimizerFactory:
                return given if isinstance(given, type) else object
            asked = options["name"]
        name = efcp_name(asked)
        return object if name is None else OPTIMIZERS[name]


def _unadapted(model: Any) -> Any:
    """The model in PEFT's wrapper, or the model."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model.base_model.model if type(model).__name__ == "PeftMixedModel" else model


def _is_causal(model: nn.Module) -> bool:
    # A language model without "ForCausalLM" in its name, such as GPT2LMHeadModel, or a subclass of one.
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return decoder and any(base.__name__ in names for base in type(model).__mro__)
