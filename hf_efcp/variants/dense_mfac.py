"""M-FAC without compression."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import Identity
from ..optimizer import EFCP
from ..preconditioners import MFAC
from ..schedules import Schedule, dampening


class DenseMFAC(EFCP):
    """M-FAC as published (arXiv 2107.03356), over a window of whole gradients: what compression is judged against.

    `u = (lambda I + (1/m) sum_i g_i g_i^T)^-1 g_t`; see `EFCP` for the step and `SparseMFAC` for the length of an
    update. Bytes per parameter: `4 num_grads`, so that the default window is small.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        num_grads: Capacity `m` of the window, in gradients.
        damp: Dampening `lambda` in the units of a squared gradient, as in the paper, at least 0; a number, or a
            function of the number of steps so far. None, the default, takes `relative_damp`.
        relative_damp: Dampening without `damp`: `m lambda` as a fraction of the mean `|row|^2` in the window, at least
            0.
        momentum: Heavy-ball factor of the update, in [0, 1).
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True for AdamW's decay, False for L2 regularisation.
        update_scale: "tensor": learning rates are AdamW's; "none": the paper's length.
        update_rms: Root mean square of an update where `update_scale` is "tensor", positive.
        divide_by: What the sum over the window is divided by while it fills: "capacity" or "rows".
        nonfinite: "raise" an error at a gradient with NaN or infinity, or "skip" the step and count it.
        memory_budget: Instead of `num_grads`, what all state may take: "8B/param", "300MB", "2GiB" or an int of bytes.
            Takes the largest window that fits.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` is not an int, or a parameter has a dtype that is not supported.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-5,
        *,
        num_grads: int = Default(32),
        damp: Schedule | None = None,
        relative_damp: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        update_scale: str = "tensor",
        update_rms: float = 1.0,
        divide_by: str = "capacity",
        nonfinite: str = "raise",
        memory_budget: int | str | None = None,
    ) -> None:
        numbers, schedules = dampening("damp", damp, relative_damp)
        super().__init__(
            params,
            lr,
            compressor=Identity(),
            preconditioner=MFAC(divide_by=divide_by, **numbers),
            num_grads=num_grads,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            update_scale=update_scale,
            update_rms=update_rms,
            schedules=schedules,
            nonfinite=nonfinite,
            memory_budget=memory_budget,
        )
