"""The projected optimizers with small settings, and problems with matrices large enough to be projected."""

import torch

from hf_efcp import LORENZA, AdaRankGrad, GaLore, NaturalGaLore

# name: (class, settings that refresh the subspace in a few steps of a small problem)
RELATIVES = {
    "galore": (GaLore, dict(lr=0.02, rank=2, scale=1.0, update_gap=3)),
    "galore_reverse": (GaLore, dict(lr=0.02, rank=2, scale=1.0, update_gap=3, proj_type="reverse_std")),
    "adarankgrad": (AdaRankGrad, dict(lr=0.02, max_rank=3, scale=1.0, max_gap=3, residual=0.2, threshold=0.5)),
    "lorenza": (LORENZA, dict(lr=0.02, rank=2, scale=1.0, update_gap=3, rho=0.0)),
    "natural_galore": (NaturalGaLore, dict(lr=0.02, rank=2, scale=1.0, update_gap=3, history=4)),
}


def build(name, params, **changes):
    """An optimizer over some parameters."""
    cls, settings = RELATIVES[name]
    return cls(params, **{**settings, **changes})


def names():
    """For `pytest.mark.parametrize`."""
    return sorted(RELATIVES)


def decaying(shape, generator, rank=None):
    """A gradient whose singular values are 1, 1/2, 1/4, ..., so that its singular vectors are well defined."""
    rows = shape[0]
    columns = torch.Size(shape[1:]).numel()
    count = min(rows, columns) if rank is None else rank
    U = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    values = 2.0 ** -torch.arange(count, dtype=torch.float64)
    return ((U * values) @ V.T).view(shape).to(torch.float32)
