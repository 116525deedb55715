"""GGT over Top-k, low-rank and whole gradients."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import Identity, LowRank, TopK
from ..optimizer import EFCP
from ..preconditioners import GGT
from .options import Options, dampening, in_metric, refuse_error


class SparseGGT(EFCP):
    """Full-matrix AdaGrad over a window of Top-k gradients with error feedback (arXiv 2306.06098, 1806.02958).

    With `metric="none"`, `u = ((sum_i beta2^(2 age_i) row_i row_i^T)^(1/2) + eps I)^-1 row_t`. A model's update is then
    at most 1 long, and about that for rows that differ and are much longer than `eps`: the learning rate is the
    distance that a step moves all parameters together, of the order of 0.1, not of 1e-4. A row shorter than 1e-6 of the
    longest in the window makes no update.

    In AdamW's metric `f(mu) = (1 + mu / eps^2)^(-1/2)`; as in M-FAC, what the window has not seen stays as it is.

    Bytes per parameter: as `SparseMFAC`.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, unless `metric` is "none".
        num_grads: Capacity `m` of the window, in gradients.
        density: Fraction `k / d` of each block that enters the window, in (0, 1].
        eps: `eps` in the units of a gradient, as in the paper, positive. None, the default, takes `relative_eps`;
            giving both is an error.
        relative_eps: `eps` without `eps`: a fraction of the root mean square of `|row|` in the window, positive. None,
            the default, takes `trust_lr`, or 1e-4 where `metric` is "none".
        trust_lr: As for `SparseMFAC`: `relative_eps^2 = trust_lr / lr`.
        beta2: Decay of a row's weight with its age, in (0, 1].
        ridge: What is added to the Gram matrix, at least 0; 1e-6 is the published code's (see `GGT`). Needs `eps` and
            `metric="none"`.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536.
        value_dtype: How the window stores values: float32, bfloat16, or int8 with a bfloat16 scale for each row and
            4,096 entries of the parameters.
        metric: "adam", AdamW's metric; "factored", the same with a second moment of rows and columns, near 0 bytes; or
            "none", the paper's rule.
        beta1: Decay of the first moment, in [0, 1); see `EFCP` in a metric, and `GGT` without one.
        **options: See `Options`.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` or `block_size` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        The paper's rule, whose first step is `lr` long:

        >>> import torch
        >>> from hf_efcp import SparseGGT
        >>> param = torch.nn.Parameter(torch.zeros(100))
        >>> optimizer = SparseGGT([param], lr=0.1, metric="none", density=0.5)
        >>> param.grad = torch.arange(100.0)
        >>> optimizer.step()
        >>> round(float(param.norm()), 3)
        0.1
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(16),
        density: float = 0.01,
        eps: float | None = None,
        relative_eps: float | None = None,
        trust_lr: float | None = None,
        beta2: float = 1.0,
        ridge: float = 0.0,
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.bfloat16,
        metric: str = "adam",
        beta1: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        compressor = TopK(density, block_size, value_dtype)
        rule, settings = _ggt(eps, relative_eps, trust_lr, beta2, ridge, metric, beta1, options)
        super().__init__(params, lr, compressor=compressor, preconditioner=rule, num_grads=num_grads, **settings)


class LowRankGGT(EFCP):
    """Full-matrix AdaGrad over a window of low-rank gradients with error feedback (arXiv 2306.06098, 1806.02958).

    See `SparseGGT` for the update and `LowRankMFAC` for the bytes.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, unless `metric` is "none".
        num_grads: Capacity `m` of the window, in gradients.
        rank: Rank `rho` of a row, at least 1.
        eps: As for `SparseGGT`.
        relative_eps: As for `SparseGGT`.
        trust_lr: As for `SparseGGT`.
        beta2: Decay of a row's weight with its age, in (0, 1].
        ridge: What is added to the Gram matrix, at least 0; 1e-6 is the published code's (see `GGT`). Needs `eps` and
            `metric="none"`.
        value_dtype: How the window stores factors, float32 or bfloat16.
        seed: Of the vectors that the compression starts from, at least 0.
        metric: "adam", AdamW's metric; "factored", the same with a second moment of rows and columns, near 0 bytes; or
            "none", the paper's rule.
        beta1: As for `SparseGGT`.
        **options: See `Options`.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads`, `rank` or `seed` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import LowRankGGT
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = LowRankGGT(layer.parameters(), lr=2e-4, num_grads=8, rank=2)
        >>> layer(torch.ones(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["rank"]
        2
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(16),
        rank: int = 4,
        eps: float | None = None,
        relative_eps: float | None = None,
        trust_lr: float | None = None,
        beta2: float = 1.0,
        ridge: float = 0.0,
        value_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        metric: str = "adam",
        beta1: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        compressor = LowRank(rank, value_dtype, seed)
        rule, settings = _ggt(eps, relative_eps, trust_lr, beta2, ridge, metric, beta1, options)
        super().__init__(params, lr, compressor=compressor, preconditioner=rule, num_grads=num_grads, **settings)


class DenseGGT(EFCP):
    """GGT as published (arXiv 1806.02958), over a window of whole gradients: what compression is judged against.

    See `SparseGGT` for the update. Bytes per parameter: `4 num_grads` for the window, and what metric and momentum
    take.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, unless `metric` is "none".
        num_grads: Capacity `m` of the window, in gradients.
        eps: As for `SparseGGT`.
        relative_eps: As for `SparseGGT`.
        trust_lr: As for `SparseGGT`.
        beta2: Decay of a row's weight with its age, in (0, 1].
        ridge: What is added to the Gram matrix, at least 0; 1e-6 is the published code's (see `GGT`). Needs `eps` and
            `metric="none"`.
        metric: "adam", AdamW's metric; "factored", the same with a second moment of rows and columns, near 0 bytes; or
            "none", the paper's rule.
        beta1: As for `SparseGGT`.
        **options: See `Options`.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import DenseGGT
        >>> param = torch.nn.Parameter(torch.zeros(100))
        >>> optimizer = DenseGGT([param], lr=0.1, metric="none")
        >>> param.grad = torch.arange(100.0)
        >>> optimizer.step()
        >>> round(float(param.norm()), 3)  # the first step is `lr` long
        0.1
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(16),
        eps: float | None = None,
        relative_eps: float | None = None,
        trust_lr: float | None = None,
        beta2: float = 1.0,
        ridge: float = 0.0,
        metric: str = "adam",
        beta1: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        refuse_error(type(self), options)
        rule, settings = _ggt(eps, relative_eps, trust_lr, beta2, ridge, metric, beta1, options)
        super().__init__(params, lr, compressor=Identity(), preconditioner=rule, num_grads=num_grads, **settings)


def _ggt(
    eps: float | None,
    relative_eps: float | None,
    trust_lr: float | None,
    beta2: float,
    ridge: float,
    metric: str,
    beta1: float | None,
    options: Any,
) -> tuple[GGT, dict[str, Any]]:
    """The preconditioner and the options of a GGT, whose `beta1` is the window's without a metric."""
    numbers = dampening("eps", eps, relative_eps, trust_lr, metric)
    if metric == "none":
        return GGT(beta1=beta1 or 0.0, beta2=beta2, ridge=ridge, **numbers), in_metric(metric, None, options)
    return GGT(beta2=beta2, ridge=ridge, **numbers), in_metric(metric, beta1, options)
