"""AdaGrad over Top-k gradients."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..compressors import TopK
from ..diagonal import AdaGradSum
from ..optimizer import EFCP


class SparseAdaGrad(EFCP):
    """AdaGrad over Top-k gradients with error feedback: the diagonal case of EFCP (arXiv 2306.06098).

    `s += row_t^2`, `u = row_t / (sqrt(s) + eps)`; see `EFCP` for the step and for what groups may set. The paper's
    theory analyses this case; as an optimizer it saves nothing over AdaGrad but what would be communicated.

    Bytes per parameter: 4 for the sum, 4 for the error, 4 for momentum unless it is 0, and `density * (index + value)`
    for the one row.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        density: Fraction `k / d` of each block that is kept, in (0, 1].
        eps: What is added to the root of the sum, positive.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536.
        value_dtype: How the row stores values, float32, bfloat16 or int8 (see `TopK`).
        momentum: Heavy-ball factor of the update, in [0, 1).
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True for AdamW's decay, False for L2 regularisation.
        update_scale: "tensor": learning rates are AdamW's; "none": the paper's length.
        update_rms: Root mean square of an update where `update_scale` is "tensor", positive.
        nonfinite: "raise" an error at a gradient with NaN or infinity, or "skip" the step and count it.
        backend: "auto", "reference" or "numba".

    Raises:
        ValueError: A value outside its range.
        TypeError: `block_size` is not an int, or a parameter has a dtype that is not supported.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-5,
        *,
        density: float = 0.01,
        eps: float = 1e-10,
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.float32,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        update_scale: str = "tensor",
        update_rms: float = 1.0,
        nonfinite: str = "raise",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            compressor=TopK(density, block_size, value_dtype),
            preconditioner=AdaGradSum(eps),
            num_grads=1,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            update_scale=update_scale,
            update_rms=update_rms,
            nonfinite=nonfinite,
            backend=backend,
        )
