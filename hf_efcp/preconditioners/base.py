"""Preconditioners: Gram matrix of the window -> coefficients of its rows. They never touch a tensor of size `d`.

The vector that is preconditioned is, unless asked otherwise, the newest row of the window, so that the update is a
combination of the window's own rows, `u = G^T c`, and `c` depends on `K = G G^T` alone (push-through identity).
A vector `x` from outside the window needs the products `G x` as well: `u = scale x + G^T c`.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

import torch

from ..compressors import State, Window
from ..kernels import Kernels
from ..threads import one_thread

# Eigenvalues below this fraction of the largest are rounding of zero: the combination of a null vector is zero.
NULL = 1e-12


@dataclass(frozen=True)
class WindowPosition:
    """Where the window stands when an update is computed.

    Args:
        newest: Position `j` of the newest row.
        rows: Rows that were written, at most `capacity`.
        capacity: `m`.
        steps: Rows pushed since the start, this one included: `t`, from 1.
        lr: Learning rate of the step, for `trust_lr`; the largest, where parameters that share a matrix have several.
    """

    newest: int
    rows: int
    capacity: int
    steps: int
    lr: float = 0.0

    def ages(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """How many steps ago each written row was pushed, `(rows,)`, float64; the newest has age 0."""
        return (self.newest - torch.arange(self.rows, dtype=torch.float64, device=device)) % self.capacity

    def weights(self, beta1: float, device: torch.device | str = "cpu") -> torch.Tensor:
        """Adam's weights of its last gradients, `(1 - beta1) beta1^age / (1 - beta1^rows)`.

        Args:
            beta1: Decay, in [0, 1); 0 weighs the newest row alone.
            device: Where they are wanted.

        Returns:
            `(rows,)`, float64; their sum is 1.
        """
        powers = beta1 ** self.ages(device)
        return powers / powers.sum()


@dataclass(frozen=True)
class Combination:
    """An update `u = scale x + G^T c`.

    Args:
        coefficients: `c`, `(rows,)`, float64.
        scale: Factor of the dense vector `x`; 0 where there is none.
    """

    coefficients: torch.Tensor
    scale: float = 0.0

    def length(self, gram: torch.Tensor, outside: torch.Tensor) -> float:
        """`|u|`, from `|u|^2 = c^T K c + 2 scale c^T G x + scale^2 |x|^2`.

        Args:
            gram: `K`, `(rows, rows)`, float64.
            outside: `G x`, and behind it `|x|^2`; zeros where there is no `x`: `(rows + 1,)`, float64.

        Returns:
            The length; infinite where it is beyond float64.
        """
        with one_thread():
            inside = self.coefficients @ (gram @ self.coefficients + 2.0 * self.scale * outside[:-1])
            square = float(inside + self.scale * self.scale * outside[-1])  # one number: a GPU is waited for once
        length = math.sqrt(max(square, 0.0))
        return length if math.isfinite(length) else math.inf


class Preconditioner(Protocol):
    """What `EFCP` needs of a preconditioner: a frozen dataclass whose fields are its hyperparameters.

    With `uses_gram` its plans are `Combination`s, or have what those have.

    The fields are written into the parameter groups, where a user or a scheduler may change them between steps.
    `GramPreconditioner` is the base to take for a function of the Gram matrix.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    uses_gram: ClassVar[bool]

    def check(self, precondition: str, metric: str) -> None:
        """Refuse what it cannot be applied to, or in which metric, with its hyperparameters as they are."""

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors of its own that it keeps for a parameter, by their names in the state."""

    def observe(self, now: WindowPosition, window: Window, state: State, shape: torch.Size, kernels: Kernels) -> None:
        """Update what it keeps for a parameter, once the newest row is in the window."""

    def plan(self, gram: torch.Tensor | None, now: WindowPosition) -> Any:
        """What is common to all parameters, from the Gram matrix (None unless `uses_gram`)."""

    def plan_outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Any:
        """The same for a dense vector `x`, from the products `G x`."""

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c` such that `f(G^T G) x = x + G^T c`, `f(0) = 1`, for many Gram matrices at once."""

    def update(
        self,
        plan: Any,
        window: Window,
        state: State,
        shape: torch.Size,
        span: slice,
        kernels: Kernels,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """The update in a span of a parameter, `(n,)`, float32; `base` is the span of `x`."""


class GramPreconditioner:
    """Base of the preconditioners that are functions of the Gram matrix. A subclass is a frozen dataclass.

    It defines `coefficients`, and `outside` if it can precondition a vector that is not in the window.
    """

    uses_gram: ClassVar[bool] = True

    def coefficients(self, gram: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c` such that the update is `G^T c`.

        Args:
            gram: `K`, `(rows, rows)`, float64: the rows that were written.
            now: Where the window stands.

        Returns:
            `(rows,)`, float64.
        """
        raise NotImplementedError

    def outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Combination:
        """`scale` and `c` such that the update of a dense vector `x` is `scale x + G^T c`.

        Args:
            gram: `K`, as in `coefficients`.
            products: `G x`, `(rows,)`, float64.
            now: Where the window stands.

        Returns:
            The combination.

        Raises:
            TypeError: The preconditioner cannot do it.
        """
        raise TypeError(f'{type(self).__name__} cannot precondition the dense gradient: use precondition="row"')

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c` such that `f(G^T G) x = x + G^T c`, for the `f` of the preconditioner with `f(0) = 1`.

        `c = h(K) G x`, `h(mu) = (f(mu) - 1) / mu`: what the window has not seen stays as it is, and nothing grows.

        Args:
            grams: `K` of each unit, `(units, rows, rows)`, float64.
            products: `G x` of each unit, `(units, rows)`, float64.
            now: Where the window stands.

        Returns:
            `(units, rows)`, float64.

        Raises:
            TypeError: The preconditioner cannot do it.
        """
        raise TypeError(f'{type(self).__name__} has no form in AdamW\'s metric: use metric="none"')

    def check(self, precondition: str, metric: str) -> None:
        """Nothing is refused."""

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Nothing: all it needs is the Gram matrix."""
        return {}

    def observe(self, now: WindowPosition, window: Window, state: State, shape: torch.Size, kernels: Kernels) -> None:
        """Nothing: it keeps nothing."""

    def plan(self, gram: torch.Tensor | None, now: WindowPosition) -> Combination:
        """The coefficients for the newest row."""
        assert gram is not None  # uses_gram
        with one_thread():
            return Combination(self.coefficients(gram, now))

    def plan_outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Combination:
        """The combination for a dense vector."""
        with one_thread():
            return self.outside(gram, products, now)

    def update(
        self,
        plan: Combination,
        window: Window,
        state: State,
        shape: torch.Size,
        span: slice,
        kernels: Kernels,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """`scale x + G^T c`."""
        return window.combine(state, shape, span, plan.coefficients, kernels, base=base, scale=plan.scale)


def mean_squares(grams: torch.Tensor) -> torch.Tensor:
    """The mean `|row|^2` of each window."""
    return grams.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def present(spectra: torch.Tensor) -> torch.Tensor:
    """Which eigenvalues (ascending) are more than rounding of zero."""
    present: torch.Tensor = spectra > NULL * spectra[..., -1:].clamp(min=0.0)
    return present


def trusted(trust_lr: float, now: WindowPosition) -> float:
    """`trust_lr / lr`; all but infinite where a step moves nothing."""
    return trust_lr / max(now.lr, 1e-30 * trust_lr) if trust_lr else 0.0


def check_trust(trust_lr: float, metric: str) -> None:
    """Refuse a `trust_lr` without a metric.

    Args:
        trust_lr: The argument.
        metric: The metric.

    Raises:
        ValueError: There is one.
    """
    if trust_lr and metric == "none":
        raise ValueError(
            f"trust_lr={trust_lr} is compared with learning rates of AdamW, which those of the paper's rule, "
            'metric="none", are not: use relative_damp or relative_eps, or metric="adam"'
        )


def check_at_least_zero(name: str, value: float) -> None:
    """Refuse a number that is negative or not finite.

    Args:
        name: The argument.
        value: Its value.

    Raises:
        ValueError: It is.
    """
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
