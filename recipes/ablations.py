"""What a comparison needs beside the package's optimizers: the default with its direction off.

Importing this puts it into `hf_efcp.OPTIMIZERS`, which is how an optimizer of one's own gets a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hf_efcp import EFCP, OPTIMIZERS
from hf_efcp.kernels import Kernels
from hf_efcp.lowrank import LowRank
from hf_efcp.preconditioners import MFAC, Combination
from hf_efcp.windows import State, Window


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
        super().__init__(
            params,
            lr,
            compressor=LowRank(),
            preconditioner=OnlyShortened(damp=0.0, relative_damp=1.0),
            num_grads=16,
            metric="adam",
            precondition="momentum",
            beta1=0.9,
            momentum_dtype=torch.bfloat16,
            error_dtype=torch.int8,
            scope="layer",
            centered=True,
            **options,
        )


OPTIMIZERS["shortened_adamw"] = ShortenedAdamW
