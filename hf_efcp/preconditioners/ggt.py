"""GGT: full-matrix AdaGrad over the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_fields
from .base import (
    Combination,
    GramPreconditioner,
    WindowPosition,
    check_at_least_zero,
    check_trust,
    mean_squares,
    present,
    trusted,
)


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
        check_at_least_zero("eps", self.eps)
        check_at_least_zero("relative_eps", self.relative_eps)
        check_at_least_zero("ridge", self.ridge)
        check_at_least_zero("trust_lr", self.trust_lr)
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
        check_trust(self.trust_lr, metric)
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
        ages = now.ages(gram.device)
        weights, spectrum, vectors = self._decompose(gram, ages)
        roots, eps = (spectrum.clamp(min=0.0) + self.ridge).sqrt(), self._eps(gram)
        inverse = 1.0 / (roots + eps)
        if self.ridge:
            inverse = inverse * (1.0 + self.ridge / (eps * roots))
        inverse = torch.where(present(spectrum), inverse, 0.0)
        # W^-1 a in one power: apart, both factors underflow for old rows.
        target = (1.0 - self.beta1) * (self.beta1 / self.beta2) ** ages
        coefficients: torch.Tensor = weights * (vectors @ (inverse * (vectors.T @ target)))
        return coefficients

    def outside(self, gram: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> Combination:
        """`u = (x - A^T V diag(1 / (s (s + eps))) V^T A x) / eps`, `A = W G`, `A A^T = V diag(s^2) V^T`."""
        weights, spectrum, vectors = self._decompose(gram, now.ages(gram.device))
        roots = (spectrum.clamp(min=0.0) + self.ridge).sqrt()
        eps = float(self._eps(gram))
        if eps == 0.0:  # relative to rows that are all zero
            return Combination(torch.zeros_like(products))
        inverse = torch.where(present(spectrum), 1.0 / (roots * (roots + eps)), 0.0)
        coefficients = weights * (vectors @ (inverse * (vectors.T @ (weights * products))))
        return Combination(-coefficients / eps, 1.0 / eps)

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`f(mu) = (1 + mu / eps^2)^(-1/2)`: `c = W h(K_w) W G x`; see the base class."""
        weights, spectra, vectors = self._decompose(grams, now.ages(grams.device))
        squares = self._eps(grams).square() + trusted(self.trust_lr, now) * mean_squares(grams)
        squares = squares[:, None]
        squares = torch.where(squares > 0.0, squares, 1.0)  # relative to rows that are all zero, as is the spectrum
        roots = (1.0 + spectra.clamp(min=0.0) / squares).sqrt()
        # (f - 1) / mu, where nothing cancels.
        slopes = torch.where(present(spectra), -1.0 / (squares * roots * (1.0 + roots)), 0.0)
        turned = vectors @ (slopes[:, :, None] * (vectors.mT @ (weights * products)[:, :, None]))
        c: torch.Tensor = weights * turned.squeeze(-1)
        return c

    def _eps(self, grams: torch.Tensor) -> torch.Tensor:
        """`eps` of each matrix."""
        return self.eps + self.relative_eps * mean_squares(grams).sqrt()

    def _decompose(self, grams: torch.Tensor, ages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`W`, and eigenvalues and eigenvectors of each `W K W`."""
        weights = self.beta2**ages
        spectra, vectors = torch.linalg.eigh(weights[:, None] * grams * weights)
        return weights, spectra, vectors
