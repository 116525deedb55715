"""What a comparison needs beside the package's optimizers: the default without its direction, and without feedback.

Importing this puts them into `hf_efcp.OPTIMIZERS`, which is how an optimizer of one's own gets a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hf_efcp import EFCP, OPTIMIZERS
from hf_efcp.compressors import Job, LowRank
from hf_efcp.kernels import Kernels
from hf_efcp.preconditioners import MFAC, WindowPosition

DEFAULTS: dict[str, Any] = {  # of `LowRankMFAC`; a test compares them
    "num_grads": 16,
    "metric": "adam",
    "metric_dtype": torch.int8,
    "beta1": 0.9,
    "momentum_dtype": torch.bfloat16,
    "error_dtype": torch.int8,
    "scope": "layer",
}


@dataclass(frozen=True)
class OnlyShortened(MFAC):
    """M-FAC whose update has the length that the matrix gives it, in the metric, and the direction of the moment."""

    def shorten(self, grams: torch.Tensor, products: torch.Tensor, now: WindowPosition) -> torch.Tensor:
        """`c` such that `x + G^T c` is as long as with the matrix and parallel to `x = G^T w`, for each Gram matrix."""
        weights = now.weights(DEFAULTS["beta1"])
        turned = super().shorten(grams, products, now) + weights
        lengths = [(c * (grams @ c[:, :, None]).squeeze(-1)).sum(dim=1) for c in (turned, weights.expand_as(turned))]
        shortened, whole = (length.clamp(min=torch.finfo(torch.float64).tiny).sqrt() for length in lengths)
        c: torch.Tensor = (shortened / whole - 1.0)[:, None] * weights
        return c


class ShortenedAdamW(EFCP):
    """`LowRankMFAC` at its defaults with the direction off: the moment, shortened as much as the matrix shortens it.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        **options: Of `EFCP`.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-4, **options: Any) -> None:
        rule = OnlyShortened(damp=0.0, trust_lr=4e-4)
        super().__init__(params, lr, compressor=LowRank(), preconditioner=rule, **{**DEFAULTS, **options})


@dataclass(frozen=True)
class WithoutFeedback(LowRank):
    """Low-rank compression that drops what it leaves out, so that the next gradient is compressed alone."""

    def compress(self, jobs: Sequence[Job], kernels: Kernels) -> None:
        """`row = P Q^T`, `error = 0`."""
        super().compress(jobs, kernels)
        for job in jobs:
            assert job.error is not None  # low rank is not lossless
            job.error.zero_()


class ForgetfulMFAC(EFCP):
    """`LowRankMFAC` at its defaults without error feedback.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        **options: Of `EFCP`.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-4, **options: Any) -> None:
        rule = MFAC(damp=0.0, trust_lr=4e-4)
        super().__init__(params, lr, compressor=WithoutFeedback(), preconditioner=rule, **{**DEFAULTS, **options})


OPTIMIZERS["shortened_adamw"] = ShortenedAdamW
OPTIMIZERS["forgetful_mfac"] = ForgetfulMFAC
