"""Diagonal rules: updates that each entry computes from its own rows in the window. They need no Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..checks import check_fields
from ..compressors import State, Window
from ..kernels import Kernels, widest
from .base import WindowPosition

_FLOAT32 = torch.finfo(torch.float32)


class DiagonalPreconditioner:
    """Base of the rules that never see the Gram matrix. A subclass is a frozen dataclass.

    It defines `plan` and `update`, and `allocate` if it keeps something for a parameter.
    """

    uses_gram: ClassVar[bool] = False

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Nothing: all it needs is the window."""
        return {}

    def observe(self, now: WindowPosition, window: Window, state: State, shape: torch.Size, kernels: Kernels) -> None:
        """Nothing: all it needs is the window."""

    def check(self, precondition: str, metric: str) -> None:
        """Refuse all but the window's rows: the rule is made of them, entry by entry.

        Args:
            precondition: What is preconditioned.
            metric: The metric.

        Raises:
            ValueError: It is something else.
        """
        name = type(self).__name__
        if metric != "none":
            raise ValueError(f'{name} has no matrix that a metric could be for, got metric={metric!r}: use "none"')
        if precondition != "row":
            raise ValueError(f'{name} is made of the window\'s rows, got precondition={precondition!r}: use "row"')

    def plan_outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Any:
        """Never called: see `check`."""
        raise NotImplementedError

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """Never called: see `check`."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamMoments(DiagonalPreconditioner):
    """MicroAdam's rule: Adam's two moments, rebuilt from the window's rows (Modoranu et al., arXiv 2405.15593).

    `m = (1 - beta1) / (1 - beta1^t) sum_i beta1^age_i row_i`, `v` likewise with `beta2` and the rows squared,
    `u = m / (sqrt(v) + eps)`, at step `t`. Entries that no row of the window has stay where they are. While nothing
    has left the window and nothing is compressed, this is Adam with its bias corrections.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: What is added to the root of the second moment, positive.

    Raises:
        ValueError: A value outside its range.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_fields(self)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {beta}")
        _check_positive("eps", self.eps)

    def plan(self, gram: torch.Tensor | None, now: WindowPosition) -> tuple[torch.Tensor, torch.Tensor]:
        """The coefficients of the rows in `m`, and those of their squares in `v`.

        Args:
            gram: Not used.
            now: Where the window stands.

        Returns:
            Twice `(rows,)`, float64.
        """
        ages = now.ages()
        first, second = ((1.0 - b) / (1.0 - b**now.steps) * b**ages for b in (self.beta1, self.beta2))
        return first, second

    def update(
        self,
        plan: tuple[torch.Tensor, torch.Tensor],
        window: Window,
        state: State,
        shape: torch.Size,
        span: slice,
        kernels: Kernels,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """`u = m / (sqrt(v) + eps)` in a span.

        Args:
            plan: The coefficients.
            window: The window.
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of the window's.
            kernels: The backend.
            base: Not used.

        Returns:
            `(n,)`, float32.
        """
        m = window.combine(state, shape, span, plan[0], kernels)
        v = window.combine(state, shape, span, plan[1], kernels, squared=True)
        return m.div_(_root_(v).add_(self.eps))


@dataclass(frozen=True)
class AdaGradSum(DiagonalPreconditioner):
    """AdaGrad's rule on the newest row: `s += row^2`, `u = row / (sqrt(s) + eps)`.

    The sum over all rows since the start is 4 bytes per parameter. The window is read for the newest row only.

    Args:
        eps: What is added to the root of the sum, positive.

    Raises:
        ValueError: `eps` is not positive.
    """

    eps: float = 1e-10

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("eps", self.eps)

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """The sum of squares, zeros.

        Args:
            shape: Shape of the parameter.
            device: Where.

        Returns:
            `{"sum": ...}`, float32.
        """
        return {"sum": torch.zeros(shape, dtype=torch.float32, device=device)}

    def observe(self, now: WindowPosition, window: Window, state: State, shape: torch.Size, kernels: Kernels) -> None:
        """`s += row^2`.

        Args:
            now: Where the window stands.
            window: The window.
            state: The parameter's tensors; `sum` is updated.
            shape: Shape of the parameter.
            kernels: The backend.
        """
        total = state["sum"].view(-1)
        newest = self.plan(None, now).to(total.device, widest(total.device))
        for span in window.spans(shape, total.device):
            squares = window.combine(state, shape, span, newest, kernels, squared=True)
            # A square beyond float32 saturates: infinity in the state would be there for ever.
            total[span].add_(squares).clamp_(max=_FLOAT32.max)

    def plan(self, gram: torch.Tensor | None, now: WindowPosition) -> torch.Tensor:
        """The coefficients that pick the newest row.

        Args:
            gram: Not used.
            now: Where the window stands.

        Returns:
            `(rows,)`, float64.
        """
        newest = torch.zeros(now.rows, dtype=torch.float64, device="cpu")
        newest[now.newest] = 1.0
        return newest

    def update(
        self,
        plan: torch.Tensor,
        window: Window,
        state: State,
        shape: torch.Size,
        span: slice,
        kernels: Kernels,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """`u = row / (sqrt(s) + eps)` in a span; `s` has the row already.

        Args:
            plan: The coefficients.
            window: The window.
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of the window's.
            kernels: The backend.
            base: Not used.

        Returns:
            `(n,)`, float32.
        """
        root = _root_(state["sum"].view(-1)[span].clone())
        row = window.combine(state, shape, span, plan, kernels)
        # As s >= row^2, u is at most 1 without the clamp as well, unless the sum has saturated.
        return row.div_(root.add_(self.eps)).clamp_(-1.0, 1.0)


def _root_(squares: torch.Tensor) -> torch.Tensor:
    """Square roots, in place. Most entries are zero, whose root takes the CPU twenty times as long as any other."""
    return squares.clamp_(min=_FLOAT32.tiny).sqrt_()


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name} must be a finite positive number, got {value}")
