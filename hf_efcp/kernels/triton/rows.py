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
_NOTHING = torch.empty(0, device="cpu")


@dataclass
class Row:
    """A tensor, or a run of equal blocks of one: what stands in its row of the table.

    Args:
        gradient: Contiguous.
        theta: Contiguous.
        state: Tensors by their column: "error", "second", "left", and so on; those of a run begin where it does.
        places: Numbers by their column.
        numbers: By their column; 0 where `advance` writes them.
    """

    gradient: torch.Tensor
    theta: torch.Tensor
    state: dict[str, torch.Tensor]
    places: dict[str, int]
    numbers: dict[str, float]

    def integers(self) -> list[int]:
        """The row."""
        found = [0] * len(_PLACES)
        for name, place in self.places.items():
            found[_PLACES[name]] = place
        for name, tensor in self.state.items():
            found[_PLACES[name]] = tensor.data_ptr()
        found[_GRADIENT], found[_GRADIENT_CODE] = self.gradient.data_ptr(), shared.CODES[self.gradient.dtype]
        found[_THETA], found[_THETA_CODE] = self.theta.data_ptr(), shared.CODES[self.theta.dtype]
        return found

    def release(self) -> None:
        """Keep numbers only: a row outlives the step that it was made in, and its tensors need not."""
        self.gradient = self.theta = _NOTHING
        self.state = {}


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


@dataclass(frozen=True)
class Sums:
    """Sums that a launch has made of parts of units.

    Args:
        partial: `(tasks, capacity * parts)`, float64.
        bounds: Where the tasks of each unit begin, and where the last ends, `(units + 1,)`.
        parts: How many stand side by side for a row of the window.
    """

    partial: torch.Tensor
    bounds: torch.Tensor
    parts: int = 1
