"""LORENZA in a Trainer: its ascent before the first backward pass of a step, and back after the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..projected import LORENZA


class Uphill:
    """The backward passes of one step: the first one climbs, and after the last one the parameters are back.

    Clipping, GradScaler and the optimizer's own step then find them as they were, whether the step is taken or not.

    Args:
        trainer: The trainer.
        batches: All batches of the step.
        items: The items in them, as the trainer counts them.
    """

    def __init__(self, trainer: Any, batches: list[Any], items: torch.Tensor | int | None) -> None:
        self._trainer, self._batches, self._items = trainer, batches, items
        self._stack = ExitStack()
        self._climbed = False

    @contextmanager
    def of(self, optimizer: LORENZA, model: nn.Module) -> Iterator[None]:
        """Hold one backward pass where the ascent has led.

        Args:
            optimizer: The optimizer.
            model: The model, wrapped or not.

        Yields:
            Nothing.
        """
        try:
            if not self._climbed:
                self._climbed = True
                self._stack.enter_context(optimizer.ascent(lambda: self._loss(model)))
            yield
        except BaseException:
            self._stack.close()
            raise
        if self._trainer.accelerator.sync_gradients:
            self._stack.close()

    def _loss(self, model: nn.Module) -> float:
        """The loss of all batches; a constant factor is of no matter."""
        trainer, total = self._trainer, 0.0
        model.train()
        for batch in self._batches:
            with trainer.compute_loss_context_manager():
                inputs = trainer._prepare_inputs(batch)
                total += float(trainer.compute_loss(model, inputs, num_items_in_batch=self._items).mean())
        return total
