"""Preconditioners: Gram matrix of the window -> coefficients of its rows. They never touch a tensor of size `d`.

The vector that is preconditioned is the newest row of the window, so the update is a combination of the window's own
rows, `u = G^T c`, and `c` depends on `K = G G^T` alone (push-through identity).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

import torch

# Eigenvalues below this fraction of the largest are rounding of zero: the combination of a null vector is zero.
_NULL = 1e-12


class Preconditioner(Protocol):
    """What `EFCP` needs of a preconditioner: a frozen dataclass whose fields are its hyperparameters.

    The fields are written into the parameter groups, where a user or a scheduler may change them between steps.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def coefficients(self, gram: torch.Tensor, newest: int, capacity: int) -> torch.Tensor:
        """`c`, `(rows,)`, float64, such that the update is `G^T c`."""


@dataclass(frozen=True)
class MFAC:
    """M-FAC: the inverse of the damped empirical Fisher matrix (Frantar et al., arXiv 2107.03356).

    `F = lambda I + (1/m) sum_i g_i g_i^T`, `u = F^-1 g_j = G^T c` with `c = m (m lambda I + K)^-1 e_j`. `m` is the
    window's capacity, also while it fills: rows that were not written yet are zero.

    Args:
        damp: Dampening `lambda`, at least 0. Where `m lambda` is lost in the rounding of `K` (0, for one), directions
            in which the window has no curvature are left out, as in a pseudo-inverse.

    Raises:
        ValueError: `damp` is negative or not finite.
    """

    damp: float = 1e-5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damp) and self.damp >= 0.0):
            raise ValueError(f"damp must be a finite number of at least 0, got {self.damp}")

    def coefficients(self, gram: torch.Tensor, newest: int, capacity: int) -> torch.Tensor:
        """`c = m (m lambda I + K)^-1 e_j`, by Cholesky, or by `eigh` where the matrix is singular in float64.

        Args:
            gram: `K`, `(rows, rows)`, float64, CPU: the rows that were written.
            newest: `j`, position of the newest row.
            capacity: `m`.

        Returns:
            `c`, `(rows,)`, float64.
        """
        shift = capacity * self.damp
        target = torch.zeros(gram.shape[0], 1, dtype=torch.float64)
        target[newest] = float(capacity)
        with _one_thread():
            if shift > _NULL * float(gram.trace()):
                damped = gram.clone()
                damped.diagonal().add_(shift)
                factor, failed = torch.linalg.cholesky_ex(damped)
                if not failed:
                    solution: torch.Tensor = torch.cholesky_solve(target, factor)
                    return solution.squeeze(1)
            spectrum, vectors = torch.linalg.eigh(gram)
            # Clamping also serves a K that is zero: its largest eigenvalue is rounding, or zero itself.
            inverse = torch.where(spectrum > _NULL * spectrum[-1].clamp(min=0.0), 1.0 / (spectrum + shift), 0.0)
            projected: torch.Tensor = vectors * inverse @ (vectors.T @ target)
            return projected.squeeze(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's bits depend on its number of threads; replicas with different numbers must stay equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
