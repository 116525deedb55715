"""GGT over a window of low-rank gradients."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..lowrank import LowRank
from ..optimizer import EFCP
from ..preconditioners import GGT
from ..schedules import Schedule, dampening


class LowRankGGT(EFCP):
    """Full-matrix AdaGrad over a window of low-rank gradients with error feedback (arXiv 2306.06098, 1806.02958).

    `u = ((sum_i beta2^(2 age_i) row_i row_i^T)^(1/2) + eps I)^-1 row_t`, every matrix of a row `P Q^T` of rank `rank`;
    see `EFCP` for the step and for what groups may set, `LowRank` for the compression and `SparseGGT` for the length
    of an update. Bytes per parameter and operations: as `LowRankMFAC`.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        num_grads: Capacity `m` of the window, in gradients.
        rank: Rank `rho` of a row, at least 1.
        eps: `eps` in the units of a gradient, as in the paper, positive; a number, or a function of the number of steps
            so far. None, the default, takes `relative_eps`.
        relative_eps: `eps` without `eps`: a fraction of the root mean square of `|row|` in the window, positive.
        beta1: Momentum on the gradient, over the rows of the window, in [0, 1); at most `beta2`.
        beta2: Decay of a row's weight with its age, in (0, 1].
        value_dtype: How the window stores factors, float32 or bfloat16.
        scope: "model", one preconditioner over all parameters, or "layer", one for each parameter.
        seed: Of the vectors that the compression starts from, at least 0.
        momentum: Heavy-ball factor of the update, in [0, 1).
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True for AdamW's decay, False for L2 regularisation.
        update_scale: "tensor": learning rates are AdamW's; "none": the paper's length.
        update_rms: Root mean square of an update where `update_scale` is "tensor", positive.
        precondition: "row" for the compressed row, "gradient" for the dense gradient (without `beta1`).
        nonfinite: "raise" an error at a gradient with NaN or infinity, or "skip" the step and count it.
        memory_budget: Instead of `num_grads`, what all state may take: "8B/param", "300MB", "2GiB" or an int of bytes.
            Takes the largest window that fits.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads`, `rank` or `seed` is not an int, or a parameter has a dtype that is not supported.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-5,
        *,
        num_grads: int = Default(32),
        rank: int = 4,
        eps: Schedule | None = None,
        relative_eps: float = 1e-4,
        beta1: float = 0.0,
        beta2: float = 1.0,
        value_dtype: torch.dtype = torch.bfloat16,
        scope: str = "model",
        seed: int = 0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        update_scale: str = "tensor",
        update_rms: float = 1.0,
        precondition: str = "row",
        nonfinite: str = "raise",
        memory_budget: int | str | None = None,
    ) -> None:
        numbers, schedules = dampening("eps", eps, relative_eps)
        super().__init__(
            params,
            lr,
            compressor=LowRank(rank, value_dtype, seed),
            preconditioner=GGT(beta1=beta1, beta2=beta2, **numbers),
            num_grads=num_grads,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            update_scale=update_scale,
            update_rms=update_rms,
            precondition=precondition,
            scope=scope,
            schedules=schedules,
            nonfinite=nonfinite,
            memory_budget=memory_budget,
        )
