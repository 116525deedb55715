"""Every optimizer of the package with small settings: what the contract suites run over."""

import torch

from hf_efcp import DenseGGT, DenseMFAC, SparseGGT, SparseMFAC

# name: (class, settings that make its window wrap in a few steps of a small problem)
VARIANTS = {
    "sparse_mfac": (SparseMFAC, dict(lr=0.02, num_grads=5, density=0.2, damp=1e-3, block_size=16)),
    "sparse_mfac_float32": (
        SparseMFAC,
        dict(lr=0.02, num_grads=5, density=0.1, damp=1e-3, block_size=300, value_dtype=torch.float32),
    ),
    "sparse_ggt": (SparseGGT, dict(lr=0.1, num_grads=5, density=0.2, eps=1e-3, beta1=0.5, beta2=0.9, block_size=16)),
    "dense_mfac": (DenseMFAC, dict(lr=0.02, num_grads=5, damp=1e-3)),
    "dense_ggt": (DenseGGT, dict(lr=0.1, num_grads=5, eps=1e-3)),
}


def build(name, params, **changes):
    """An optimizer of a variant over some parameters."""
    cls, settings = VARIANTS[name]
    return cls(params, **{**settings, **changes})


def names():
    """For `pytest.mark.parametrize`."""
    return sorted(VARIANTS)


def sparse_names():
    """Those that store Top-k rows, and so have kernels to choose."""
    return [name for name in names() if "block_size" in VARIANTS[name][1]]
