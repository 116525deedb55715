"""GaLore: gradient low-rank projection (Zhao et al., arXiv 2403.03507)."""

from __future__ import annotations

from typing import Unpack

from torch.optim.optimizer import ParamsT

from .base import ProjectedAdam, ProjectedOptions


class GaLore(ProjectedAdam):
    """GaLore (arXiv 2403.03507): Adam in the span of the gradient's first singular vectors.

        every update_gap steps:   U S V^T = G,  P = U_1..rank (or V, where columns are the shorter side)
        R = P^T G,   theta <- theta - lr scale P Adam(R)

    Moments are kept as they are when the subspace changes, as in the published code (galore_torch), which it equals but
    for where eps is added: here, as in `torch.optim.AdamW`, to the bias-corrected root. See `ProjectedAdam` for what is
    projected, and for the bytes: `4 rank (short + 2 long)` a matrix.

    Published for GLUE on RoBERTa-base: `rank=4`, `scale=4`, `update_gap` 50 to 500, `lr` 1e-5 to 3e-5, 30 epochs.

    Args:
        params: Parameters or groups.
        lr: Learning rate; projected matrices move by `lr scale`.
        rank: Directions of a subspace, at least 1.
        scale: Factor of the update of projected matrices, at least 0.
        update_gap: Steps from one subspace to the next, at least 1.
        **options: See `ProjectedOptions`.

    Raises:
        ValueError: A value outside its range.
        TypeError: `rank` or `update_gap` is not an int, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import GaLore
        >>> layer = torch.nn.Linear(512, 256)
        >>> optimizer = GaLore(layer.parameters(), lr=2e-5, rank=4, scale=4.0)
        >>> layer(torch.ones(4, 512)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.memory()["subspace"] == 4 * 4 * 256
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        rank: int = 128,
        scale: float = 0.25,
        update_gap: int = 200,
        **options: Unpack[ProjectedOptions],
    ) -> None:
        super().__init__(params, lr, rank=rank, scale=scale, update_gap=update_gap, **options)
