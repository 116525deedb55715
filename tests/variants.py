"""Every optimizer of the package with small settings: what the contract suites run over."""

import inspect
from typing import get_args, get_type_hints

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
    "sparse_mfac_layers": (
        SparseMFAC,
        dict(lr=0.02, num_grads=5, density=0.2, damp=1e-3, block_size=16, scope="layer"),
    ),
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
# In AdamW's metric: the defaults, and what differs in how state is kept or the update comes about.
IN_METRIC = {
    "lowrank_mfac_metric": (LowRankMFAC, dict(rank=2)),
    "lowrank_mfac_metric_exact": (
        LowRankMFAC,
        dict(rank=2, error_dtype=torch.float32, value_dtype=torch.float32, metric_dtype=torch.float32),
    ),
    "lowrank_mfac_metric_int8": (
        LowRankMFAC,
        dict(rank=1, precondition="gradient"),
    ),
    "lowrank_mfac_metric_momentum": (LowRankMFAC, dict(rank=2, metric_dtype=torch.float32, precondition="momentum")),
    "lowrank_mfac_metric_factored": (LowRankMFAC, dict(rank=2, metric="factored", precondition="gradient")),
    "lowrank_ggt_metric": (
        LowRankGGT,
        dict(rank=2, beta2=0.9, metric_dtype=torch.bfloat16, scope="model", precondition="momentum"),
    ),
    "sparse_mfac_metric": (SparseMFAC, dict(density=0.2, block_size=16, beta1=0.0, scope="model")),
    "sparse_ggt_metric": (SparseGGT, dict(density=0.2, block_size=16)),
    "dense_mfac_metric": (DenseMFAC, dict(momentum=0.5)),
}
VARIANTS = {
    name: (cls, settings if cls in (SparseAdaGrad, MicroAdam) else {**settings, "metric": "none"})
    for name, (cls, settings) in PAPERS.items()
}
VARIANTS |= {
    name: (cls, {"lr": 0.01, "num_grads": 5, "trust_lr": 0.01, **settings})
    for name, (cls, settings) in IN_METRIC.items()
}


def build(name, params, **changes):
    """An optimizer of a variant over some parameters."""
    cls, settings = VARIANTS[name]
    return cls(params, **{**settings, **changes})


def arguments(cls):
    """The names of all that a class takes, those of its `**options` included."""
    found = set()
    for name, parameter in inspect.signature(cls, eval_str=True).parameters.items():
        options = parameter.kind is parameter.VAR_KEYWORD
        found |= get_type_hints(get_args(parameter.annotation)[0]).keys() if options else {name}
    return found


def taken(name, **changes):
    """Those of some changes that the variant's class has arguments for."""
    known = arguments(VARIANTS[name][0])
    if VARIANTS[name][0] in (DenseMFAC, DenseGGT):
        known -= {"error_dtype"}  # they keep no error
    return {key: value for key, value in changes.items() if key in known}


def exact(name):
    """Changes after which nothing depends on the positions of the parameters, as rounding and random starts do."""
    changes = taken(name, error_dtype=torch.float32, rank=100)
    if in_metric(name):
        changes |= dict.fromkeys(("momentum_dtype", "metric_dtype"), torch.float32)
    return changes


def names():
    """For `pytest.mark.parametrize`."""
    return sorted(VARIANTS)


def in_metric(name):
    """Whether it works in AdamW's metric."""
    return name in IN_METRIC


def papers_names():
    """Those whose updates have the paper's lengths."""
    return sorted(PAPERS)


def sparse_names():
    """Those that store Top-k rows, and so have kernels to choose."""
    return [name for name in names() if "block_size" in VARIANTS[name][1]]
