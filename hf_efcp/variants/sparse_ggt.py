"""GGT over a window of Top-k gradients."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import top_k
from ..optimizer import EFCP
from ..preconditioners import GGT
from ..schedules import Schedule, dampening


class SparseGGT(EFCP):
    """Full-matrix AdaGrad over a window of Top-k gradients with error feedback (arXiv 2306.06098, 1806.02958).

    `u = ((sum_i beta2^(2 age_i) row_i row_i^T)^(1/2) + eps I)^-1 row_t`; see `EFCP` for the step and for what groups
    may set. The direction of an update is GGT's; its length is AdamW's, as in `SparseMFAC`. With `update_scale="none"`
    a model's update is at most 1 long, and about that for rows that differ and are much longer than `eps`, at any
    `num_grads` and scale of the gradients: the learning rate is then the distance that a step moves all parameters
    together, of the order of 0.1, not of 1e-4. A row shorter than 1e-6 of the longest in the window makes no update.

    Bytes per parameter: as `SparseMFAC`.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        num_grads: Capacity `m` of the window, in gradients.
        density: Fraction `k / d` of each block that enters the window, in (0, 1].
        eps: `eps` in the units of a gradient, as in the paper, positive; a number, or a function of the number of steps
            so far. None, the default, takes `relative_eps`.
        relative_eps: `eps` without `eps`: a fraction of the root mean square of `|row|` in the window, positive.
        beta1: Momentum on the gradient, over the rows of the window, in [0, 1); at most `beta2`.
        beta2: Decay of a row's weight with its age, in (0, 1].
        selection: "block" for Top-k in each block, "global" for Top-k over all parameters at once, as in the paper's
            pseudocode: 6 bytes an entry, slower, and all parameters must be there at the first step.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536; without effect on global Top-k.
        value_dtype: How the window stores values: float32, bfloat16, or int8 with a bfloat16 scale for each row and
            4,096 entries of the parameters (not with global Top-k).
        error_dtype: How the error is kept: float32, bfloat16, int8 or `torch.uint4` (4 bits). Below float32 it is
            rounded stochastically: sums are right in expectation, no longer to the bit.
        momentum: Heavy-ball factor of the update, in [0, 1).
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True for AdamW's decay, False for L2 regularisation.
        update_scale: "tensor": learning rates are AdamW's; "none": the paper's length.
        update_rms: Root mean square of an update where `update_scale` is "tensor", positive.
        precondition: "row" for the compressed row, "gradient" for the dense gradient (without `beta1`).
        nonfinite: "raise" an error at a gradient with NaN or infinity, or "skip" the step and count it.
        backend: "auto", "reference" or "numba".
        memory_budget: Instead of `num_grads`, what all state may take: "8B/param", "300MB", "2GiB" or an int of bytes.
            Takes the largest window that fits.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` or `block_size` is not an int, or a parameter has a dtype that is not supported.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-5,
        *,
        num_grads: int = Default(32),
        density: float = 0.01,
        eps: Schedule | None = None,
        relative_eps: float = 1e-4,
        beta1: float = 0.0,
        beta2: float = 1.0,
        selection: str = "block",
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype = torch.float32,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        update_scale: str = "tensor",
        update_rms: float = 1.0,
        precondition: str = "row",
        nonfinite: str = "raise",
        backend: str = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        numbers, schedules = dampening("eps", eps, relative_eps)
        super().__init__(
            params,
            lr,
            compressor=top_k(selection, density, block_size, value_dtype),
            preconditioner=GGT(beta1=beta1, beta2=beta2, **numbers),
            num_grads=num_grads,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            error_dtype=error_dtype,
            update_scale=update_scale,
            update_rms=update_rms,
            precondition=precondition,
            schedules=schedules,
            nonfinite=nonfinite,
            backend=backend,
            memory_budget=memory_budget,
        )
