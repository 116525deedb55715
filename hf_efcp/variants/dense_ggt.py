"""GGT without compression."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import Identity
from ..optimizer import EFCP
from ..preconditioners import GGT
from ..schedules import Schedule, dampening


class DenseGGT(EFCP):
    """GGT as published (arXiv 1806.02958), over a window of whole gradients: what compression is judged against.

    `u = ((sum_i beta2^(2 age_i) g_i g_i^T)^(1/2) + eps I)^-1 g_t`; see `EFCP` for the step and `SparseGGT` for the
    length of an update. Bytes per parameter: `4 num_grads`, so that the default window is small.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, while `update_scale` is "tensor".
        num_grads: Capacity `m` of the window, in gradients.
        eps: `eps` in the units of a gradient, as in the paper, positive; a number, or a function of the number of steps
            so far. None, the default, takes `relative_eps`.
        relative_eps: `eps` without `eps`: a fraction of the root mean square of `|row|` in the window, positive.
        beta1: Momentum on the gradient, over the rows of the window, in [0, 1); at most `beta2`.
        beta2: Decay of a row's weight with its age, in (0, 1].
        momentum: Heavy-ball factor of the update, in [0, 1).
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True for AdamW's decay, False for L2 regularisation.
        update_scale: "tensor": learning rates are AdamW's; "none": the paper's length.
        update_rms: Root mean square of an update where `update_scale` is "tensor", positive.
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
        eps: Schedule | None = None,
        relative_eps: float = 1e-4,
        beta1: float = 0.0,
        beta2: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        update_scale: str = "tensor",
        update_rms: float = 1.0,
        nonfinite: str = "raise",
        memory_budget: int | str | None = None,
    ) -> None:
        numbers, schedules = dampening("eps", eps, relative_eps)
        super().__init__(
            params,
            lr,
            compressor=Identity(),
            preconditioner=GGT(beta1=beta1, beta2=beta2, **numbers),
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
