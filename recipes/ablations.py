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
from hf_efcp.compressors import Job
from hf_efcp.kernels import Kernels
from hf_efcp.lowrank import LowRank
from hf_efcp.preconditioners import MFAC, Combination
from hf_efcp.windows import State, Window

DEFAULTS: dict[str, Any] = {  # of `LowRankMFAC`; a test compares them
    "num_grads": 16,
    "metric": "adam",
    "precondition": "momentum",
    "beta1": 0.9,
    "momentum_dtype": torch.bfloat16,
    "error_dtype": torch.int8,
    "scope": "layer",
}


@dataclass(frozen=True)
class OnlyShortened(MFAC):
    """M-FAC whose update has the length that the matrix gives it, in the metric, and the direction of `x`.

    The length is that of a span, 262,144 entries or a row: large matrices have several. So this control has a little
    more of the matrix than one length for a tensor.
    """

    def update(
        self,
        plan: Combination,
        window: Window,
        state: State,
        shape: torch.Size,
        span: slice,
        kernels: Kernels,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """`|x + G^T c| / |x|` times `x`."""
        assert base is not None  # the dense vector is preconditioned
        turned = super().update(plan, window, state, shape, span, kernels, base)
        length = torch.linalg.vector_norm(base).clamp(min=torch.finfo(torch.float32).tiny)
        factor: torch.Tensor = torch.linalg.vector_norm(turned) / length
        return base * factor


class ShortenedAdamW(EFCP):
    """`LowRankMFAC` at its defaults with the direction off: AdamW, shortened as much as the matrix shortens it.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        **options: Of `EFCP`.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-4, **options: Any) -> None:
        rule = OnlyShortened(damp=0.0, trust_lr=4e-4)
        super().__init__(params, lr, compressor=LowRank(), preconditioner=rule, **DEFAULTS, **options)


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
        super().__init__(params, lr, compressor=WithoutFeedback(), preconditioner=rule, **DEFAULTS, **options)


OPTIMIZERS["shortened_adamw"] = ShortenedAdamW
OPTIMIZERS["forgetful_mfac"] = ForgetfulMFAC
