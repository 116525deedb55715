"""What a launch has to know of a tensor, and of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import shared

_PLACES = {name: place for place, name in enumerate(shared.COLUMNS)}
_GRADIENT, _GRADIENT_CODE, _THETA, _THETA_CODE = (
    _PLACES[name] for name in ("gradient", "gradient_code", "theta", "theta_code")
)


@dataclass
class Row:
    """A tensor, or a run of equal blocks of one: what stands in its row of the table. Tensors that are absent are None.

    Args:
        gradient: Flat and contiguous.
        theta: Flat and contiguous.
        state: Tensors by their column: "error", "second", "left", and so on; those of a run begin where it does.
        places: Numbers by their column.
        numbers: By their column.
    """

    gradient: torch.Tensor
    theta: torch.Tensor
    state: dict[str, torch.Tensor]
    places: dict[str, int]
    numbers: dict[str, float]

    def integers(self) -> list[int]:
        """The row."""
        found = [0] * len(_PLACES)  # and no dictionaries: the device waits while hundreds of rows are made
        for name, place in self.places.items():
            found[_PLACES[name]] = place
        for name, tensor in self.state.items():
            found[_PLACES[name]] = tensor.data_ptr()
        found[_GRADIENT], found[_GRADIENT_CODE] = self.gradient.data_ptr(), shared.CODES[self.gradient.dtype]
        found[_THETA], found[_THETA_CODE] = self.theta.data_ptr(), shared.CODES[self.theta.dtype]
        return found


@dataclass(frozen=True)
class Settings:
    """What kernels are compiled for, and numbers that are one for all tensors.

    Args:
        stored: Code of the errors: 0 float32, 1 bfloat16, 3 int8, 4 4 bits.
        values: Code of the window's values.
        metric: Code of the second moment; 5 for no metric.
        coupled: Whether weight decay is added to gradients.
        beta2: Decay of the second moment.
        eps: Of the metric.
        capacity: Of the window.
        rank: Of a low-rank row; 0 for sparse ones.
        block_size: Of sparse rows.
        outside: Whether a dense vector is preconditioned, and no row.
        moment: Code of the first moment that it is; 5 for the gradient.
        beta1: Decay of the first moment.
    """

    stored: int
    values: int
    metric: int
    coupled: bool
    beta2: float
    eps: float
    capacity: int
    rank: int = 0
    block_size: int = 0
    outside: bool = False
    moment: int = 5
    beta1: float = 0.0

    @property
    def vector(self) -> dict[str, Any]:
        """What a kernel has to know that makes the dense vector."""
        return {"MOMENT": self.moment, "METRIC": self.metric, "COUPLED": self.coupled}

    @property
    def reading(self) -> dict[str, Any]:
        """What a kernel has to know that makes an accumulator."""
        return {"STORED": self.stored, "METRIC": self.metric, "COUPLED": self.coupled}
