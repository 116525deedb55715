"""M-FAC: the inverse of the damped empirical Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_fields
from .base import (
    NULL,
    Combination,
    GramPreconditioner,
    WindowPosition,
    check_at_least_zero,
    check_trust,
    mean_squares,
    present,
    trusted,
)

# Dampening, as a fraction of the mean `|row|^2`, with which float64 factors every matrix of up to millions of rows.
_DAMPED = 1e-6


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
        check_at_least_zero("damp", self.damp)
        check_at_least_zero("relative_damp", self.relative_damp)
        check_at_least_zero("trust_lr", self.trust_lr)

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
        check_trust(self.trust_lr, metric)
        papers_rule = precondition == "row" and metric == "none"
        if not papers_rule and self.damp == self.relative_damp == self.trust_lr == 0.0:
            raise ValueError(
                f'precondition="{precondition}" with metric="{metric}" needs dampening, but all of it is 0: use '
                "relative_damp=1.0, or another positive number"
            )

    def coefficients(self, gram: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c = n (n lambda I + K)^-1 e_j`; see the base class."""
        target = torch.zeros(now.rows, dtype=torch.float64, device=gram.device)
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
        return self.damp == 0.0 and self.relative_damp + trusted(self.trust_lr, now) >= _DAMPED

    def _shifts(self, grams: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`n lambda` of each matrix."""
        relative = self.relative_damp + trusted(self.trust_lr, now)
        return now.capacity * self.damp + relative * mean_squares(grams)

    def _solve(self, grams: torch.Tensor, targets: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`(n lambda I + K)^-1 target`, by Cholesky, or by `eigh` where a matrix is singular in float64."""
        shifts, damped = self._shifts(grams, now), grams.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(shifts[:, None])
        factors, failed = torch.linalg.cholesky_ex(damped)
        solved = _substituted(factors, targets)
        if self.is_definite(now):  # no number decides what is done: on a GPU, nothing has to wait for one
            return torch.where(((shifts > 0.0) & (failed == 0))[:, None], solved, 0.0)
        lost = shifts <= NULL * now.rows * mean_squares(grams)
        singular = (failed.bool() | lost).tolist()  # waited for once
        for unit in (unit for unit, is_singular in enumerate(singular) if is_singular):
            spectrum, vectors = torch.linalg.eigh(grams[unit])
            inverse = torch.where(present(spectrum), 1.0 / (spectrum + shifts[unit]), 0.0)
            solved[unit] = vectors @ (inverse * (vectors.T @ targets[unit]))
        return solved


def _substituted(factors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(L L^T)^-1 target` of many matrices."""
    columns = targets[:, :, None]
    if factors.is_cuda:  # where cholesky_solve waits for the device
        halfway = torch.linalg.solve_triangular(factors, columns, upper=False)
        solved: torch.Tensor = torch.linalg.solve_triangular(factors.mT, halfway, upper=True)
    else:
        solved = torch.cholesky_solve(columns, factors)
    return solved.squeeze(-1)
