"""M-FAC over a window of Top-k gradients."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import top_k
from ..optimizer import EFCP
from ..preconditioners import MFAC
from ..schedules import Schedule, dampening


class SparseMFAC(EFCP):
    """M-FAC over a window of Top-k gradients with error feedback: EFCP's sparse variant (arXiv 2306.06098).

    `u = (lambda I + (1/m) sum_i row_i row_i^T)^-1 row_t`; see `EFCP` for the step and for what groups may set.

    The direction of an update is M-FAC's; its length is AdamW's, tensor by tensor (`update_scale="tensor"`, see
    `EFCP`), so that AdamW's learning rates and schedules fit, at any `num_grads` and dampening. With
    `update_scale="none"`, the paper's rule, a model's update is about `m / |row|` long, at most `0.5 sqrt(m / lambda)`:
    scaling the gradients by s divides it by s, and a learning rate belongs to one `num_grads`, one `damp` and one
    gradient clipping. 5e-4 is a good one at the default window with `damp=1e-5`, clipping at 1.0 and a warm-up of 10 %
    of the steps (the error starts empty, so early rows are small and early updates large).

    Bytes per parameter: `num_grads * density * (index + value)` for the window (10 at the defaults: 2 + 2 bytes an
    entry), 4 for the error (9 / 16 in 4 bits), 4 for momentum unless it is 0, and `8 num_grads^2` in all for the Gram
    matrix.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        num_grads: Capacity `m` of the window, in gradients.
        density: Fraction `k / d` of each block that enters the window, in (0, 1].
        damp: Dampening `lambda` in the units of a squared gradient, as in the paper, at least 0; a number, or a
            function of the number of steps so far. None, the default, takes `relative_damp`.
        relative_damp: Dampening without `damp`: `m lambda` as a fraction of the mean `|row|^2` in the window, at least
            0.
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
        precondition: "row" for the compressed row, "gradient" for the dense gradient.
        divide_by: What the sum over the window is divided by while it fills: "capacity" or "rows".
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
        num_grads: int = Default(256),
        density: float = 0.01,
        damp: Schedule | None = None,
        relative_damp: float = 0.01,
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
        divide_by: str = "capacity",
        nonfinite: str = "raise",
        backend: str = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        numbers, schedules = dampening("damp", damp, relative_damp)
        super().__init__(
            params,
            lr,
            compressor=top_k(selection, density, block_size, value_dtype),
            preconditioner=MFAC(divide_by=divide_by, **numbers),
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
