"""AdaGrad and Adam on Top-k gradients: no matrix."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import TopK
from ..errors import UINT4
from ..optimizer import EFCP
from ..preconditioners import AdaGradSum, AdamMoments
from .options import DiagonalOptions


class SparseAdaGrad(EFCP):
    """AdaGrad on Top-k gradients with error feedback: the diagonal of EFCP's theory (arXiv 2306.06098, appendix).

    `s += row_t^2`, `u = row_t / (sqrt(s) + eps)`. The paper's theory analyses this case; as an optimizer it saves
    nothing over AdaGrad but what would be communicated. It has no matrix: of `Options`, `metric`, `precondition` and
    `scope` cannot be set, and the window is one row.

    Bytes per parameter: 4 for the sum, 4 for the error, 4 for momentum unless it is 0, and `density * (index + value)`
    for the one row.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdaGrad's.
        density: Fraction `k / d` of each block that is kept, in (0, 1].
        eps: What is added to the root of the sum, positive.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536.
        value_dtype: How the row stores values, float32, bfloat16 or int8 (see `TopK`).
        **options: See `Options`; `metric` is "none".

    Raises:
        ValueError: A value outside its range, or an option that it has no use for.
        TypeError: `block_size` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import SparseAdaGrad
        >>> param = torch.nn.Parameter(torch.zeros(100))
        >>> optimizer = SparseAdaGrad([param], lr=0.5, density=0.1)
        >>> param.grad = torch.arange(100.0)
        >>> optimizer.step()
        >>> param.min().item(), int((param != 0).sum())  # the ten largest entries move by `lr`
        (-0.5, 10)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        density: float = 0.01,
        eps: float = 1e-10,
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.float32,
        **options: Unpack[DiagonalOptions],
    ) -> None:
        if options.get("memory_budget") is not None:
            raise ValueError("memory_budget chooses the window, but SparseAdaGrad keeps one row: leave it out")
        compressor, rule = TopK(density, block_size, value_dtype), AdaGradSum(eps)
        super().__init__(params, lr, compressor=compressor, preconditioner=rule, num_grads=1, **options)


class MicroAdam(EFCP):
    """Adam whose moments are rebuilt from a short window of Top-k gradients, with error feedback (arXiv 2405.15593).

    `m = (1 - beta1) / (1 - beta1^t) sum_i beta1^age_i row_i`, `v` likewise with `beta2` and the rows squared,
    `u = m / (sqrt(v) + eps)`. Entries that no row of the window has do not move, so that a step touches at most
    `num_grads * density` of the entries. Scaling the gradients changes nothing but the weight of `eps`. It has no
    matrix: of `Options`, `metric`, `precondition` and `scope` cannot be set.

    Bytes per parameter: `num_grads * density * (index + value)` for the window (0.4 at the defaults: 2 + 2 bytes an
    entry), and 9 / 16 for the error in 4 bits with a float32 scale for every 64 entries. AdamW takes 8.

    Rounding the error to 4 bits is unbiased but is not fed back itself: what was given and what came out are equal in
    expectation, not to the bit. The rounding depends on the positions of the parameters in the optimizer.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        num_grads: Capacity `m` of the window, in gradients.
        density: Fraction `k / d` of each block that enters the window, in (0, 1].
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: What is added to the root of the second moment, positive.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536.
        value_dtype: How the window stores values, float32, bfloat16 or int8 (see `TopK`).
        **options: See `Options`; `error_dtype` is `torch.uint4` (4 bits) unless it is given.

    Raises:
        ValueError: A value outside its range, an option that it has no use for, or a budget that no window fits.
        TypeError: `num_grads` or `block_size` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import MicroAdam
        >>> param = torch.nn.Parameter(torch.zeros(100))
        >>> optimizer = MicroAdam([param], lr=0.5, density=0.1)
        >>> param.grad = torch.arange(100.0)
        >>> optimizer.step()
        >>> int((param != 0).sum())  # the ten largest entries
        10
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(10),
        density: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.bfloat16,
        **options: Unpack[DiagonalOptions],
    ) -> None:
        compressor, rule = TopK(density, block_size, value_dtype), AdamMoments(beta1, beta2, eps)
        settings: Any = {"error_dtype": UINT4, **options}
        super().__init__(params, lr, compressor=compressor, preconditioner=rule, num_grads=num_grads, **settings)
