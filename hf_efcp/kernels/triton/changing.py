"""What changes from step to step: counters, which the device advances, and what the host sends where it is another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ... import graphs
from .advance import GROUPS
from .launch import upload

_NEVER = -1e30  # for the logarithm of 0: times 0 it is no NaN


def logarithm(beta: float) -> float:
    """The logarithm of a decay.

    Args:
        beta: In [0, 1).

    Returns:
        It, or a number so low that every power but the first is 0.
    """
    return math.log(beta) if beta else _NEVER


class Changing:
    """Counters, addresses and hyperparameters on the device.

    Args:
        counters: Rows pushed by each unit, behind them the gradients that each parameter has had.
        unit_groups: For each unit, which groups its parameters are in: 1 or 0.
        device: Where.
        last: What was there before. Counters stay where they are if there are as many: a graph counts there.
    """

    def __init__(
        self,
        counters: Sequence[int],
        unit_groups: Sequence[Sequence[int]],
        device: torch.device,
        last: Changing | None = None,
    ) -> None:
        self._device = device
        self._sent: dict[str, tuple[NDArray[Any], torch.Tensor]] = {}
        self.counters = upload(np.array(counters, np.int64), device)
        if last is not None and len(last.counters) == len(counters):
            self.counters = last.counters.copy_(self.counters)
        self.unit_groups = upload(np.array(unit_groups, np.int64), device)
        self.addresses = torch.empty(0, dtype=torch.int64, device=device)
        self.hyper = torch.empty(0, dtype=torch.float64, device=device)

    def advance(
        self, addresses: list[int], optimizer: list[float], groups: Sequence[Sequence[float | torch.Tensor]]
    ) -> None:
        """Count a step, and send what is not there yet.

        Args:
            addresses: Of the gradient and the parameter of each row, one after the other.
            optimizer: Numbers of the whole optimizer, in the order that `advance.py` names them in.
            groups: Hyperparameters of each group; a tensor is read on the device, in every step anew.
        """
        self.addresses = self._send("addresses", np.array(addresses, np.int64))
        given = [value for group in groups for value in group]
        # No hyperparameter is below 0: a number that takes the place of a tensor is another, and is sent.
        numbers = optimizer + [-1.0 if isinstance(value, torch.Tensor) else float(value) for value in given]
        self.hyper = self._send("hyper", np.array(numbers, np.float64))
        for place, value in enumerate(given):
            if isinstance(value, torch.Tensor):
                self.hyper[GROUPS.value + place].copy_(value.reshape(()))
        self.counters.add_(1)

    def _send(self, name: str, array: NDArray[Any]) -> torch.Tensor:
        if graphs.is_captured(self._device):
            return upload(array, self._device)  # the graph's own
        known = self._sent.get(name)
        if known is None or not np.array_equal(known[0], array):
            known = self._sent[name] = array, upload(array, self._device)
        return known[1]
