"""The named optimizers, one a file: a compressor, a preconditioner, and defaults that were measured together."""

from .dense_ggt import DenseGGT
from .dense_mfac import DenseMFAC
from .lowrank_ggt import LowRankGGT
from .lowrank_mfac import LowRankMFAC
from .microadam import MicroAdam
from .sparse_adagrad import SparseAdaGrad
from .sparse_ggt import SparseGGT
from .sparse_mfac import SparseMFAC

__all__ = [
    "DenseGGT",
    "DenseMFAC",
    "LowRankGGT",
    "LowRankMFAC",
    "MicroAdam",
    "SparseAdaGrad",
    "SparseGGT",
    "SparseMFAC",
]
