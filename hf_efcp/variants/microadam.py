"""Adam over a short window of Top-k gradients."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import TopK
from ..diagonal import AdamMoments
from ..errors import UINT4
from ..optimizer import EFCP


class MicroAdam(EFCP):
    """Adam whose moments are rebuilt from a short window of Top-k gradients, with error feedback (arXiv 2405.15593).

    `m = (1 - beta1) / (1 - beta1^t) sum_i beta1^age_i row_i`, `v` likewise with `beta2` and the rows squared,
    `u = m / (sqrt(v) + eps)`; see `EFCP` for the step and for what groups may set. Entries that no row of the window
    has do not move, so that a step touches at most `num_grads * density` of the entries. Scaling the gradients changes
    nothing but the weight of `eps`, and learning rates are those of AdamW.

    Bytes per parameter: `num_grads * density * (index + value)` for the window (0.4 at the defaults: 2 + 2 bytes an
    entry), and 9 / 16 for the error in 4 bits with a float32 scale for every 64 entries. AdamW takes 8.

    Rounding the error to 4 bits is unbiased but is not fed back itself: what was given and what came out are equal in
    expectation, not to the bit. The rounding depends on the positions of the parameters in the optimizer.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        num_grads: Capacity `m` of the window, in gradients.
        density: Fraction `k / d` of each block that enters the window, in (0, 1].
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: What is added to the root of the second moment, positive.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536.
        value_dtype: How the window stores values, float32, bfloat16 or int8 (see `TopK`).
        error_dtype: How the error is kept: `torch.uint4` (4 bits), int8, bfloat16 or float32.
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True for AdamW's decay, False for L2 regularisation.
        update_scale: "tensor": learning rates are AdamW's; "none": the paper's length.
        update_rms: Root mean square of an update where `update_scale` is "tensor", positive.
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
        num_grads: int = Default(10),
        density: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype = UINT4,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        update_scale: str = "tensor",
        update_rms: float = 1.0,
        nonfinite: str = "raise",
        backend: str = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            compressor=TopK(density, block_size, value_dtype),
            preconditioner=AdamMoments(beta1, beta2, eps),
            num_grads=num_grads,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            update_scale=update_scale,
            update_rms=update_rms,
            error_dtype=error_dtype,
            nonfinite=nonfinite,
            backend=backend,
            memory_budget=memory_budget,
        )
