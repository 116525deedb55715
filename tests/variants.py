"""Every optimizer of the package with small settings: what the contract suites run over."""

import torch

from hf_efcp import SparseMFAC

# name: (class, settings that make its window wrap in a few steps of a small problem)
VARIANTS = {
    "sparse_mfac": (SparseMFAC, dict(lr=0.02, num_grads=5, density=0.2, damp=1e-3, block_size=16)),
    "sparse_mfac_float32": (
        SparseMFAC,
        dict(lr=0.02, num_grads=5, density=0.1, damp=1e-3, block_size=300, value_dtype=torch.float32),
    ),
}


def build(name, params, **changes):
    """An optimizer of a variant over some parameters."""
    cls, settings = VARIANTS[name]
    return cls(params, **{**settings, **changes})


def names():
    """For `pytest.mark.parametrize`."""
    return sorted(VARIANTS)
