"""The named optimizers: a compressor, a preconditioner, and defaults that were measured together."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch.optim.optimizer import ParamsT

from .budget import Default
from .compressors import Identity, TopK
from .diagonal import AdaGradSum, AdamMoments
from .errors import UINT4
from .lowrank import LowRank
from .optimizer import EFCP
from .preconditioners import GGT, MFAC


class Options(TypedDict, total=False):
    """What every named optimizer takes beside its own arguments; `EFCP` says what each of them is.

    What is not given depends on the metric. With one: `precondition="row"` and `beta1=0.9`, AdamW's first moment over
    the window's rows (`beta1=0` for `precondition="gradient"`), `scope="layer"`, errors and a second moment of every
    entry in int8, and a dense first moment in bfloat16. With "none", the paper's rule: `precondition="row"`, `beta1=0`,
    `scope="model"`, errors in float32.
    """

    momentum: float
    weight_decay: float
    decoupled_weight_decay: bool
    precondition: str
    scope: str
    metric_dtype: torch.dtype
    metric_beta2: float
    metric_eps: float
    momentum_dtype: torch.dtype
    error_dtype: torch.dtype
    nonfinite: str
    backend: str
    memory_budget: int | str | None


class DiagonalOptions(Options, total=False):
    """Those of the optimizers without a matrix, which take "none" only."""

    metric: str


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
        settings = _in_metric(metric, beta1, options)
        rule = MFAC(**_dampening("damp", damp, relative_damp, trust_lr, metric))
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
        settings = _in_metric(metric, beta1, options)
        rule = MFAC(**_dampening("damp", damp, relative_damp, trust_lr, metric))
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
        _refuse_error(type(self), options)
        settings = _in_metric(metric, beta1, options)
        rule = MFAC(**_dampening("damp", damp, relative_damp, trust_lr, metric))
        super().__init__(params, lr, compressor=Identity(), preconditioner=rule, num_grads=num_grads, **settings)


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
        _refuse_error(type(self), options)
        rule, settings = _ggt(eps, relative_eps, trust_lr, beta2, ridge, metric, beta1, options)
        super().__init__(params, lr, compressor=Identity(), preconditioner=rule, num_grads=num_grads, **settings)


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


_RELATIVE = {"damp": 0.01, "eps": 1e-4}  # without a metric
# In a metric: twice the best learning rate of AdamW on a BERT of 22 M parameters, the largest that it takes.
_TRUST_LR = 4e-4


def _dampening(
    name: str, absolute: float | None, relative: float | None, trust_lr: float | None, metric: str
) -> dict[str, float]:
    """The hyperparameters of a preconditioner that `damp` or `eps` stands for, all but one of them 0."""
    given = {name: absolute, f"relative_{name}": relative, "trust_lr": trust_lr}
    chosen = {key: value for key, value in given.items() if value is not None}
    if len(chosen) > 1:
        both = " and ".join(f"{key}={value}" for key, value in chosen.items())
        raise ValueError(
            f"{both} all choose the dampening: give {name}, in the units of the gradients, relative_{name}, a fraction "
            "of the window's mean, or trust_lr, a learning rate"
        )
    if not chosen:
        chosen = {f"relative_{name}": _RELATIVE[name]} if metric == "none" else {"trust_lr": _TRUST_LR}
    return {**dict.fromkeys(given, 0.0), **chosen}


def _refuse_error(cls: type, options: Any) -> None:
    if "error_dtype" in options:
        raise ValueError(f"{cls.__name__} compresses nothing, and so keeps no error: leave error_dtype out")


def _in_metric(metric: str, beta1: float | None, options: Any) -> dict[str, Any]:
    """The options of an optimizer with a matrix, with the defaults of its metric."""
    if metric == "none":
        return {"metric": metric, "beta1": beta1 or 0.0, **options}
    dense = options.get("precondition") == "gradient"
    defaults = {
        "metric": metric,
        "metric_dtype": torch.int8 if metric == "adam" else torch.float32,
        "beta1": beta1 if beta1 is not None else 0.0 if dense else 0.9,
        "scope": "layer",
        "error_dtype": torch.int8,
        "momentum_dtype": torch.bfloat16,
    }
    return {**defaults, **options}


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
    numbers = _dampening("eps", eps, relative_eps, trust_lr, metric)
    if metric == "none":
        return GGT(beta1=beta1 or 0.0, beta2=beta2, ridge=ridge, **numbers), _in_metric(metric, None, options)
    return GGT(beta2=beta2, ridge=ridge, **numbers), _in_metric(metric, beta1, options)
