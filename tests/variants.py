"""Every optimizer of the package with small settings: what the contract suites run over."""

import inspect

import torch

from hf_efcp import DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC, MicroAdam, SparseAdaGrad, SparseGGT, SparseMFAC

# name: (class, settings that make its window wrap in a few steps of a small problem)
VARIANTS = {
    "sparse_mfac": (SparseMFAC, dict(lr=0.02, num_grads=5, density=0.2, damp=1e-3, block_size=16)),
    "sparse_mfac_float32": (
        SparseMFAC,
        dict(lr=0.02, num_grads=5, density=0.1, damp=1e-3, block_size=300, value_dtype=torch.float32),
    ),
    "sparse_mfac_global": (SparseMFAC, dict(lr=0.02, num_grads=5, density=0.1, damp=1e-3, selection="global")),
    "sparse_ggt": (SparseGGT, dict(lr=0.1, num_grads=5, density=0.2, eps=1e-3, beta1=0.5, beta2=0.9, block_size=16)),
    "dense_mfac": (DenseMFAC, dict(lr=0.02, num_grads=5, damp=1e-3)),
    "dense_ggt": (DenseGGT, dict(lr=0.1, num_grads=5, eps=1e-3)),
    "lowrank_mfac": (LowRankMFAC, dict(lr=0.02, num_grads=5, rank=1, damp=1e-3)),
    "lowrank_mfac_layers": (
        LowRankMFAC,
        dict(lr=0.02, num_grads=5, rank=2, damp=1e-3, scope="layer", value_dtype=torch.float32),
    ),
    "lowrank_ggt": (LowRankGGT, dict(lr=0.1, num_grads=5, rank=2, eps=1e-3, beta1=0.5, beta2=0.9)),
    "sparse_adagrad": (SparseAdaGrad, dict(lr=0.1, density=0.2, block_size=16)),
    "microadam": (MicroAdam, dict(lr=0.02, num_grads=5, density=0.2, block_size=16)),
}


def build(name, params, **changes):
    """An optimizer of a variant over some parameters."""
    cls, settings = VARIANTS[name]
    return cls(params, **{**settings, **changes})


def taken(name, **changes):
    """Those of some changes that the variant's class has arguments for."""
    arguments = inspect.signature(VARIANTS[name][0]).parameters
    return {key: value for key, value in changes.items() if key in arguments}


def exact(name):
    """Changes after which nothing depends on the positions of the parameters, as rounding and random starts do."""
    return taken(name, error_dtype=torch.float32, rank=100)


def names():
    """For `pytest.mark.parametrize`."""
    return sorted(VARIANTS)


def sparse_names():
    """Those that store Top-k rows, and so have kernels to choose."""
    return [name for name in names() if "block_size" in VARIANTS[name][1]]
