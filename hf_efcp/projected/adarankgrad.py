"""AdaRankGrad: a subspace whose rank follows the gradient (Refael et al., arXiv 2410.17881)."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch.optim.optimizer import ParamsT

from ..kernels import widest
from ..layout import State
from ..leaves import Group
from . import subspace
from .base import ProjectedAdam, ProjectedOptions


class AdaRankGrad(ProjectedAdam):
    """AdaRankGrad (arXiv 2410.17881): as many directions as the gradient needs, anew once they are used up.

        Y = G Omega,  Q0 = qr(Y),  U S V^T = Q0^T G,  Q = Q0 U_1..r
        r: the smallest in [min_rank, max_rank] with |G|^2 - sum_i<=r s_i^2 <= residual |G|^2
        R = Q^T G,   theta <- theta - lr scale Q Adam(R)
        new subspace:  when |R| <= threshold |R_at_refresh|, or after max_gap steps
        T = Q_new^T Q_old,  m <- T m,  v <- (T * T) v       (entrywise squares, so that v stays at least 0)

    The condition on the rank is the paper's by its meaning: as it is printed it always gives the full rank. The paper
    does not tell its threshold; see docs/relatives.md for how this one was chosen. Shapes of the state are those of
    `max_rank`, and a number says how much of it is used. `diagnostics.measure` has the ranks.

    Args:
        params: Parameters or groups.
        lr: Learning rate; projected matrices move by `lr scale`.
        max_rank: Most directions of a subspace, at least 1. Smaller matrices are stepped as AdamW.
        min_rank: Least directions of a subspace, 1 to `max_rank`.
        residual: Fraction of `|G|^2` that a subspace may leave out, in [0, 1).
        threshold: Fraction of the projected gradient's norm at the last refresh, in [0, 1), at which the next is due.
        max_gap: Steps after which it is due in any case, at least 1.
        scale: Factor of the update of projected matrices, at least 0.
        seed: Of the random sketches, at least 0.
        **options: See `ProjectedOptions`.

    Raises:
        ValueError: A value outside its range.
        TypeError: A rank, `max_gap` or `seed` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        A gradient of rank 1:

        >>> import torch
        >>> from hf_efcp import AdaRankGrad
        >>> param = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = AdaRankGrad([param], max_rank=8)
        >>> param.grad = torch.outer(torch.ones(64), torch.arange(32.0))
        >>> optimizer.step()
        >>> optimizer.state[param]["rank"]
        1
    """

    paper: ClassVar[tuple[str, str]] = ("AdaRankGrad", "https://arxiv.org/abs/2410.17881")
    rank_name: ClassVar[str] = "max_rank"
    gap_name: ClassVar[str] = "max_gap"
    positive: ClassVar[tuple[str, ...]] = ("eps", "max_rank", "min_rank", "max_gap")
    fractions: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "residual", "threshold")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        max_rank: int = 128,
        min_rank: int = 1,
        residual: float = 0.1,
        threshold: float = 0.1,
        max_gap: int = 200,
        scale: float = 0.25,
        seed: int = 0,
        **options: Unpack[ProjectedOptions],
    ) -> None:
        tunable = {"min_rank": min_rank, "residual": residual, "threshold": threshold, "seed": seed}
        super().__init__(params, lr, rank=max_rank, scale=scale, update_gap=max_gap, tunable=tunable, **options)

    def subspace_of(
        self, gradient: torch.Tensor, left: bool, position: int, state: State, group: Group
    ) -> torch.Tensor:
        """The sketched basis, of the rank that the gradient needs; see the base class."""
        oriented = gradient if left else gradient.T
        source = subspace.generator(group["seed"], position, state["steps"])
        basis, values = subspace.sketched(oriented, group["max_rank"], source)
        # In float64: of a gradient of low rank nothing but rounding must be left over.
        wide = widest(gradient.device)
        kept = values.to(wide).square().cumsum(dim=0)
        whole = torch.linalg.vector_norm(gradient, dtype=wide).square()
        missing = int((whole - kept > max(group["residual"], _ROUNDING) * whole).sum())
        return basis[:, : min(max(missing + 1, group["min_rank"]), group["max_rank"])]

    def is_due(self, projected: torch.Tensor, state: State, group: Group) -> bool:
        """Whether the gradient in the subspace has become small, or the subspace old."""
        small = float(torch.linalg.vector_norm(projected)) <= group["threshold"] * state["norm"]
        return small or super().is_due(projected, state, group)

    def turn(self, turned: torch.Tensor, state: State) -> None:
        """`m <- T m`, `v <- (T * T) v`; see the base class."""
        state["exp_avg"].copy_(turned @ state["exp_avg"])
        state["exp_avg_sq"].copy_(turned.square() @ state["exp_avg_sq"])

    def settled(self, projected: torch.Tensor, state: State) -> None:
        """Keep `|R_at_refresh|`; see the base class."""
        state["norm"] = float(torch.linalg.vector_norm(projected))

    def _check_group(self, group: Group, shared: Group) -> None:
        super()._check_group(group, shared)
        if group["min_rank"] > group["max_rank"]:
            raise ValueError(
                f"min_rank must be at most max_rank, got min_rank={group['min_rank']}, max_rank={group['max_rank']}"
            )

    def extra_state(self, short: int, long: int, device: torch.device | str) -> dict[str, Any]:
        """`|R_at_refresh|`; see the base class."""
        return {"norm": 0.0}


_ROUNDING = 1e-6  # of |G|^2: what float32 leaves over of a gradient that the sketch holds whole
