"""M-FAC over Top-k, low-rank and whole gradients."""

from __future__ import annotations

from typing import Unpack

import torch
from torch.optim.optimizer import ParamsT

from ..budget import Default
from ..compressors import Identity, LowRank, TopK
from ..optimizer import EFCP
from ..preconditioners import MFAC
from .options import Options, dampening, in_metric, refuse_error


class SparseMFAC(EFCP):
    """M-FAC over a window of Top-k gradients with error feedback: EFCP's sparse variant (arXiv 2306.06098).

    With `metric="none"` this is the paper's rule, `u = (lambda I + (1/m) sum_i row_i row_i^T)^-1 row_t`, whose length
    is about `m / |row|`, at most `0.5 sqrt(m / lambda)`: a learning rate then belongs to one `num_grads`, one `damp`
    and one gradient clipping. 5e-4 is a good one at `num_grads=256, damp=1e-5`, clipping at 1.0 and a warm-up of 10 %
    of the steps (the error starts empty, so early rows are small and early updates large).

    Bytes per parameter: 17 / 16 for the error, 17 / 16 for the second moment, and `num_grads * density * (index +
    value)` for the window, 0.64 at the defaults. 2 more with `precondition="momentum"`.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, unless `metric` is "none".
        num_grads: Capacity `m` of the window, in gradients.
        density: Fraction `k / d` of each block that enters the window, in (0, 1].
        damp: Dampening `lambda` in the units of a squared gradient, as in the paper, at least 0. None, the default,
            takes `relative_damp`; giving both is an error.
        relative_damp: Dampening without `damp`: `m lambda` as a fraction of the mean `|row|^2` in the window, at least
            0. None, the default, takes `trust_lr`, or 0.01 where `metric` is "none".
        trust_lr: Dampening that falls with the learning rate, at least 0: `relative_damp = trust_lr / lr`, so that no
            direction of the window moves further than AdamW would move it at `trust_lr`; see `MFAC`. None, the
            default, is 4e-4, unless another dampening is given.
        block_size: Entries `B_d` of a Top-k block, 1 to 65,536.
        value_dtype: How the window stores values: float32, bfloat16, or int8 with a bfloat16 scale for each row and
            4,096 entries of the parameters.
        metric: "adam", AdamW's metric; "factored", the same with a second moment of rows and columns, near 0 bytes; or
            "none", the paper's rule.
        beta1: Decay of the first moment, in [0, 1), in a metric; see `EFCP`.
        **options: See `Options`.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` or `block_size` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        The paper's rule:

        >>> import torch
        >>> from hf_efcp import SparseMFAC
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = SparseMFAC(layer.parameters(), lr=5e-4, metric="none", num_grads=256, damp=1e-5)
        >>> layer(torch.ones(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["damp"]
        1e-05
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(16),
        density: float = 0.01,
        damp: float | None = None,
        relative_damp: float | None = None,
        trust_lr: float | None = None,
        block_size: int = 4096,
        value_dtype: torch.dtype = torch.bfloat16,
        metric: str = "adam",
        beta1: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        compressor = TopK(density, block_size, value_dtype)
        settings = in_metric(metric, beta1, options)
        rule = MFAC(**dampening("damp", damp, relative_damp, trust_lr, metric))
        super().__init__(params, lr, compressor=compressor, preconditioner=rule, num_grads=num_grads, **settings)


class LowRankMFAC(EFCP):
    """M-FAC over a window of low-rank gradients with error feedback: EFCP's low-rank variant (arXiv 2306.06098).

    Every matrix of a row is `P Q^T` of rank `rank`; see `LowRank` for the compression and `EFCP` for the step. The
    defaults are AdamW's metric and AdamW's first moment over the window's rows, with a matrix for each tensor:

        u = D^-1/2 (I + lr / trust_lr F / mu)^-1 sum_i w_i row_i,   F = sum_i row_i row_i^T,   mu = mean |row_i|^2

    Bytes per parameter: 17 / 16 for the error, 17 / 16 for the second moment, and `num_grads * rank * (1 / rows + 1 /
    cols) * 2` for the window of a `(rows, cols)` matrix; about 2.5 in all for a BERT at the defaults, and 1.5 with
    `metric="factored"`. 2 more with `precondition="momentum"`. A step costs `2 num_grads * rank` operations per
    parameter for the combination.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, unless `metric` is "none".
        num_grads: Capacity `m` of the window, in gradients.
        rank: Rank `rho` of a row, at least 1.
        damp: As for `SparseMFAC`.
        relative_damp: As for `SparseMFAC`.
        trust_lr: As for `SparseMFAC`.
        value_dtype: How the window stores factors, float32 or bfloat16.
        seed: Of the vectors that the compression starts from, at least 0.
        metric: "adam", AdamW's metric; "factored", the same with a second moment of rows and columns, near 0 bytes; or
            "none", the paper's rule.
        beta1: Decay of the first moment, in [0, 1), in a metric; see `EFCP`.
        **options: See `Options`.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads`, `rank` or `seed` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import LowRankMFAC
        >>> layer = torch.nn.Linear(256, 256)
        >>> optimizer = LowRankMFAC(layer.parameters(), lr=2e-4)
        >>> layer(torch.ones(4, 256)).square().sum().backward()
        >>> optimizer.step()
        >>> round(optimizer.memory()["error"] / 256**2, 2)  # bytes per parameter
        1.07
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(16),
        rank: int = 4,
        damp: float | None = None,
        relative_damp: float | None = None,
        trust_lr: float | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        metric: str = "adam",
        beta1: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        compressor = LowRank(rank, value_dtype, seed)
        settings = in_metric(metric, beta1, options)
        rule = MFAC(**dampening("damp", damp, relative_damp, trust_lr, metric))
        super().__init__(params, lr, compressor=compressor, preconditioner=rule, num_grads=num_grads, **settings)


class DenseMFAC(EFCP):
    """M-FAC as published (arXiv 2107.03356), over a window of whole gradients: what compression is judged against.

    Bytes per parameter: `4 num_grads` for the window, and what metric and momentum take.

    Args:
        params: Parameters or groups.
        lr: Learning rate: AdamW's, unless `metric` is "none".
        num_grads: Capacity `m` of the window, in gradients.
        damp: As for `SparseMFAC`.
        relative_damp: As for `SparseMFAC`.
        trust_lr: As for `SparseMFAC`.
        metric: "adam", AdamW's metric; "factored", the same with a second moment of rows and columns, near 0 bytes; or
            "none", the paper's rule.
        beta1: Decay of the first moment, in [0, 1), in a metric; see `EFCP`.
        **options: See `Options`.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import DenseMFAC
        >>> layer = torch.nn.Linear(10, 10)
        >>> optimizer = DenseMFAC(layer.parameters(), lr=2e-4, num_grads=8)
        >>> layer(torch.ones(4, 10)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.memory()["values"] == 4 * 8 * 110
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        num_grads: int = Default(16),
        damp: float | None = None,
        relative_damp: float | None = None,
        trust_lr: float | None = None,
        metric: str = "adam",
        beta1: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        refuse_error(type(self), options)
        settings = in_metric(metric, beta1, options)
        rule = MFAC(**dampening("damp", damp, relative_damp, trust_lr, metric))
        super().__init__(params, lr, compressor=Identity(), preconditioner=rule, num_grads=num_grads, **settings)
