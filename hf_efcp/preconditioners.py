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

from .checks import check_fields
from .kernels import Kernels
from .threads import one_thread
from .windows import State, Window

# Eigenvalues below this fraction of the largest are rounding of zero: the combination of a null vector is zero.
_NULL = 1e-12
# Dampening, as a fraction of the mean `|row|^2`, with which float64 factors every matrix of up to millions of rows.
_DAMPED = 1e-6


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

    def ages(self) -> torch.Tensor:
        """How many steps ago each written row was pushed, `(rows,)`, float64; the newest has age 0."""
        return (self.newest - torch.arange(self.rows, dtype=torch.float64, device="cpu")) % self.capacity

    def weights(self, beta1: float) -> torch.Tensor:
        """Adam's weights of its last gradients, `(1 - beta1) beta1^age / (1 - beta1^rows)`.

        Args:
            beta1: Decay, in [0, 1); 0 weighs the newest row alone.

        Returns:
            `(rows,)`, float64; their sum is 1.
        """
        powers = beta1 ** self.ages()
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
            gram: `K`, `(rows, rows)`, float64, CPU.
            outside: `G x`, and behind it `|x|^2`; zeros where there is no `x`: `(rows + 1,)`, float64.

        Returns:
            The length; infinite where it is beyond float64.
        """
        with one_thread():
            square = float(self.coefficients @ (gram @ self.coefficients + 2.0 * self.scale * outside[:-1]))
        square += self.scale * self.scale * float(outside[-1])
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
            gram: `K`, `(rows, rows)`, float64, CPU: the rows that were written.
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
            grams: `K` of each unit, `(units, rows, rows)`, float64, CPU.
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


@dataclass(frozen=True)
class MFAC(GramPreconditioner):
    """M-FAC: the inverse of the damped empirical Fisher matrix (Frantar et al., arXiv 2107.03356).

    `F = lambda I + (1/n) sum_i g_i g_i^T`, `u = F^-1 g_j = G^T c` with `c = n (n lambda I + K)^-1 e_j`. `n` is the
    window's capacity `m`, also while it fills: rows that were not written yet are zero.

    Args:
        damp: Dampening, at least 0, in the units of a squared gradient: the paper's `lambda`.
        relative_damp: Dampening as a fraction of the mean eigenvalue that a row brings, at least 0: `lambda = damp +
            relative_damp mean(diag K) / n`. With `damp` 0, the update of gradients that are all scaled by s is scaled
            by 1 / s and does not turn. Where `n lambda` is lost in the rounding of `K` (0, for one), directions in
            which the window has no curvature are left out, as in a pseudo-inverse.
        trust_lr: In a metric, dampening that falls with the learning rate, at least 0: `lambda` gains `trust_lr / lr
            mean(diag K) / n`. Then `lr f(mu) = lr / (1 + lr mu / (trust_lr mean))`, an implicit step: whatever `lr`, a
            direction that is as strong in the window as its mean row moves no further than AdamW moves it at
            `trust_lr`, and one that is ten times as strong a tenth of that.

    Raises:
        ValueError: A dampening is negative or not finite.
    """

    damp: float = 1e-5
    relative_damp: float = 0.0
    trust_lr: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_at_least_zero("damp", self.damp)
        _check_at_least_zero("relative_damp", self.relative_damp)
        _check_at_least_zero("trust_lr", self.trust_lr)

    def check(self, precondition: str, metric: str) -> None:
        """Refuse no dampening at all, except in the paper's rule.

        What the window has not seen of a dense vector would be divided by it, and what it has seen would be removed.

        Args:
            precondition: What is preconditioned.
            metric: The metric.

        Raises:
            ValueError: All dampening is 0, and the vector is dense or there is a metric; or there is a `trust_lr`
                without a metric.
        """
        _check_trust(self.trust_lr, metric)
        papers_rule = precondition == "row" and metric == "none"
        if not papers_rule and self.damp == self.relative_damp == self.trust_lr == 0.0:
            raise ValueError(
                f'precondition="{precondition}" with metric="{metric}" needs dampening, but all of it is 0: use '
                "relative_damp=1.0, or another positive number"
            )

    def coefficients(self, gram: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c = n (n lambda I + K)^-1 e_j`; see the base class."""
        target = torch.zeros(now.rows, dtype=torch.float64, device="cpu")
        target[now.newest] = float(now.capacity)
        return self._solve(gram[None], target[None], now)[0]

    def outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Combination:
        """`u = (x - G^T (n lambda I + K)^-1 G x) / lambda`; see the base class."""
        damp = float(self._shifts(gram, now)) / now.capacity
        if damp == 0.0:  # relative to rows that are all zero
            return Combination(torch.zeros_like(products))
        return Combination(-self._solve(gram[None], products[None], now)[0] / damp, 1.0 / damp)

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`f(mu) = 1 / (1 + mu / (n lambda))`: `c = -(n lambda I + K)^-1 G x`; see the base class."""
        return -self._solve(grams, products, now)

    def is_definite(self, now: WindowPosition) -> bool:
        """Whether no matrix but zero can be singular in float64, however the window looks.

        Args:
            now: Where the window stands.

        Returns:
            Whether the dampening that grows with the rows is enough for it.
        """
        return self.damp == 0.0 and self.relative_damp + _trusted(self.trust_lr, now) >= _DAMPED

    def _shifts(self, grams: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`n lambda` of each matrix."""
        relative = self.relative_damp + _trusted(self.trust_lr, now)
        return now.capacity * self.damp + relative * _mean_squares(grams)

    def _solve(self, grams: torch.Tensor, targets: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`(n lambda I + K)^-1 target`, by Cholesky, or by `eigh` where a matrix is singular in float64."""
        shifts, damped = self._shifts(grams, now), grams.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(shifts[:, None])
        factors, failed = torch.linalg.cholesky_ex(damped)
        solved: torch.Tensor = torch.cholesky_solve(targets[:, :, None], factors).squeeze(-1)
        if self.is_definite(now):  # no number decides what is done: on a GPU, nothing has to wait for one
            return torch.where(((shifts > 0.0) & (failed == 0))[:, None], solved, 0.0)
        lost = shifts <= _NULL * now.rows * _mean_squares(grams)
        for unit in torch.nonzero(failed.bool() | lost).flatten().tolist():
            spectrum, vectors = torch.linalg.eigh(grams[unit])
            inverse = torch.where(_present(spectrum), 1.0 / (spectrum + shifts[unit]), 0.0)
            solved[unit] = vectors @ (inverse * (vectors.T @ targets[unit]))
        return solved


@dataclass(frozen=True)
class GGT(GramPreconditioner):
    """GGT: full-matrix AdaGrad over the window (Agarwal et al., arXiv 1806.02958).

    `u = ((sum_i w_i^2 g_i g_i^T)^(1/2) + eps I)^-1 x`, `w_i = beta2^age_i`, with `x` the newest row, or with momentum
    over the window's rows, `x = (1 - beta1) sum_i beta1^age_i g_i`, which needs no buffer of size `d` and ends with the
    window. In the window's coordinates `u = G^T W f(K_w) W^-1 a`, `K_w = W K W`, `f(mu) = 1 / (sqrt(mu) + eps)`.
    Directions in which the window has nothing (`mu <= 1e-12 mu_max`) are left out.

    Args:
        eps: Dampening, at least 0, in the units of a gradient: the paper's `eps`.
        relative_eps: Dampening as a fraction of the root mean square length of a row, at least 0; `eps + relative_eps
            sqrt(mean(diag K))` takes the place of `eps`. With `eps` 0, the update of gradients that are all scaled by s
            stays the same.
        beta1: Momentum on the gradient, in [0, 1); 0 is none.
        beta2: Decay of a row's weight with its age, in (0, 1]; 1 is none. At least `beta1`, or old rows would count in
            the momentum that the matrix has forgotten.
        ridge: Added to the diagonal of `K_w`, at least 0: `f(mu) = (1 + ridge / (eps s)) / (s + eps)`, `s = sqrt(mu +
            ridge)`. The papers have none; EFCP's published code adds 1e-6. Needs `eps`, and no metric.
        trust_lr: As in `MFAC`: `eps^2` gains `trust_lr / lr` times the mean `|row|^2`.

    Raises:
        ValueError: A value outside its range.
    """

    eps: float = 1e-4
    relative_eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 1.0
    ridge: float = 0.0
    trust_lr: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_at_least_zero("eps", self.eps)
        _check_at_least_zero("relative_eps", self.relative_eps)
        _check_at_least_zero("ridge", self.ridge)
        _check_at_least_zero("trust_lr", self.trust_lr)
        if self.eps == self.relative_eps == self.trust_lr == 0.0:
            raise ValueError("eps must be a finite positive number, unless relative_eps is one; got 0.0")
        if self.ridge and not self.eps:
            raise ValueError(f"ridge={self.ridge} is in the units of a squared gradient, and so needs eps: give one")
        if not 0.0 <= self.beta1 < 1.0:
            raise ValueError(f"beta1 must be in [0, 1), got {self.beta1}")
        if not max(self.beta1, 0.0) <= self.beta2 <= 1.0 or self.beta2 == 0.0:
            raise ValueError(f"beta2 must be in (0, 1] and at least beta1 ({self.beta1}), got {self.beta2}")

    def check(self, precondition: str, metric: str) -> None:
        """Refuse momentum over the window's rows where rows are not what is preconditioned, and a ridge in a metric.

        Args:
            precondition: What is preconditioned.
            metric: The metric.

        Raises:
            ValueError: There is such a momentum or ridge, or a `trust_lr` without a metric.
        """
        _check_trust(self.trust_lr, metric)
        if self.ridge and metric != "none":
            raise ValueError(
                f"ridge={self.ridge} is that of the published code, which has no metric: use ridge=0, or "
                'metric="none" for the paper\'s rule'
            )
        if self.beta1 and (precondition != "row" or metric != "none"):
            raise ValueError(
                f"beta1={self.beta1} of GGT is momentum over the window's rows, but precondition={precondition!r} and "
                f"metric={metric!r} do not precondition it: use beta1=0"
            )

    def coefficients(self, gram: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c = W f(K_w) W^-1 a`; see the base class."""
        ages = now.ages()
        weights, spectrum, vectors = self._decompose(gram, ages)
        roots, eps = (spectrum.clamp(min=0.0) + self.ridge).sqrt(), self._eps(gram)
        inverse = 1.0 / (roots + eps)
        if self.ridge:
            inverse = inverse * (1.0 + self.ridge / (eps * roots))
        inverse = torch.where(_present(spectrum), inverse, 0.0)
        # W^-1 a in one power: apart, both factors underflow for old rows.
        target = (1.0 - self.beta1) * (self.beta1 / self.beta2) ** ages
        coefficients: torch.Tensor = weights * (vectors @ (inverse * (vectors.T @ target)))
        return coefficients

    def outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Combination:
        """`u = (x - A^T V diag(1 / (s (s + eps))) V^T A x) / eps`, `A = W G`, `A A^T = V diag(s^2) V^T`."""
        weights, spectrum, vectors = self._decompose(gram, now.ages())
        roots = (spectrum.clamp(min=0.0) + self.ridge).sqrt()
        eps = float(self._eps(gram))
        if eps == 0.0:  # relative to rows that are all zero
            return Combination(torch.zeros_like(products))
        inverse = torch.where(_present(spectrum), 1.0 / (roots * (roots + eps)), 0.0)
        coefficients = weights * (vectors @ (inverse * (vectors.T @ (weights * products))))
        return Combination(-coefficients / eps, 1.0 / eps)

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`f(mu) = (1 + mu / eps^2)^(-1/2)`: `c = W h(K_w) W G x`; see the base class."""
        weights, spectra, vectors = self._decompose(grams, now.ages())
        squares = self._eps(grams).square() + _trusted(self.trust_lr, now) * _mean_squares(grams)
        squares = squares[:, None]
        squares = torch.where(squares > 0.0, squares, 1.0)  # relative to rows that are all zero, as is the spectrum
        roots = (1.0 + spectra.clamp(min=0.0) / squares).sqrt()
        # (f - 1) / mu, where nothing cancels.
        slopes = torch.where(_present(spectra), -1.0 / (squares * roots * (1.0 + roots)), 0.0)
        turned = vectors @ (slopes[:, :, None] * (vectors.mT @ (weights * products)[:, :, None]))
        c: torch.Tensor = weights * turned.squeeze(-1)
        return c

    def _eps(self, grams: torch.Tensor) -> torch.Tensor:
        """`eps` of each matrix."""
        return self.eps + self.relative_eps * _mean_squares(grams).sqrt()

    def _decompose(self, grams: torch.Tensor, ages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`W`, and eigenvalues and eigenvectors of each `W K W`."""
        weights = self.beta2**ages
        spectra, vectors = torch.linalg.eigh(weights[:, None] * grams * weights)
        return weights, spectra, vectors


def _mean_squares(grams: torch.Tensor) -> torch.Tensor:
    """The mean `|row|^2` of each window."""
    return grams.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def _present(spectra: torch.Tensor) -> torch.Tensor:
    """Which eigenvalues (ascending) are more than rounding of zero."""
    present: torch.Tensor = spectra > _NULL * spectra[..., -1:].clamp(min=0.0)
    return present


def _trusted(trust_lr: float, now: WindowPosition) -> float:
    """`trust_lr / lr`; all but infinite where a step moves nothing."""
    return trust_lr / max(now.lr, 1e-30 * trust_lr) if trust_lr else 0.0


def _check_trust(trust_lr: float, metric: str) -> None:
    if trust_lr and metric == "none":
        raise ValueError(
            f"trust_lr={trust_lr} is compared with learning rates of AdamW, which those of the paper's rule, "
            'metric="none", are not: use relative_damp or relative_eps, or metric="adam"'
        )


def _check_at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
