"""Every optimizer of the package with small settings: what the contract suites run over."""

import inspect

import torch

from hf_efcp import DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC, MicroAdam, SparseAdaGrad, SparseGGT, SparseMFAC

# name: (class, settings that make its window wrap in a few steps of a small problem)
PAPERS = {
    "sparse_mfac": (SparseMFAC, dict(lr=0.02, num_grads=5, density=0.2, damp=1e-3, block_size=16)),
    "sparse_mfac_float32": (
        SparseMFAC,
        dict(lr=0.02, num_grads=5, density=0.1, damp=1e-3, block_size=300, value_dtype=torch.float32),
    ),
    "sparse_mfac_int8": (
        SparseMFAC,
        dict(lr=0.02, num_grads=5, density=0.2, damp=1e-3, block_size=16, value_dtype=torch.int8),
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
# The paper's lengths, and with "tensor" AdamW's for some that differ in how the update comes about.
VARIANTS = {name: (cls, {**settings, "update_scale": "none"}) for name, (cls, settings) in PAPERS.items()}
for name in ("sparse_mfac", "sparse_mfac_global", "lowrank_ggt", "microadam"):
    cls, settings = PAPERS[name]
    VARIANTS[f"{name}_tensor"] = (cls, {**settings, "lr": 0.01})
VARIANTS["dense_mfac_relative"] = (DenseMFAC, dict(lr=0.01, num_grads=5, relative_damp=0.1))


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


def papers_names():
    """Those whose updates have the paper's lengths."""
    return [name for name in names() if VARIANTS[name][1].get("update_scale") == "none"]


def sparse_names():
    """Those that store Top-k rows, and so have kernels to choose."""
    return [name for name in names() if "block_size" in VARIANTS[name][1]]
