"""The named optimizers: a compressor, a preconditioner, and defaults that were measured together."""

from .diagonal import MicroAdam, SparseAdaGrad
from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC
from .options import DiagonalOptions, Options

__all__ = [
    "DenseGGT",
    "DenseMFAC",
    "DiagonalOptions",
    "LowRankGGT",
    "LowRankMFAC",
    "MicroAdam",
    "Options",
    "SparseAdaGrad",
    "SparseGGT",
    "SparseMFAC",
]
