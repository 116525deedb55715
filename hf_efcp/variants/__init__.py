"""The named optimizers: a compressor, a preconditioner, and defaults that were measured together."""

from ..optimizer import EFCP
from .diagonal import MicroAdam, SparseAdaGrad
from .ggt import DenseGGT, LowRankGGT, SparseGGT
from .mfac import DenseMFAC, LowRankMFAC, SparseMFAC
from .options import DiagonalOptions as DiagonalOptions
from .options import Options as Options

# By their names for `--optim`; everything else that knows optimizers by name has them from here.
VARIANTS: dict[str, type[EFCP]] = {
    "sparse_mfac": SparseMFAC,
    "sparse_ggt": SparseGGT,
    "dense_mfac": DenseMFAC,
    "dense_ggt": DenseGGT,
    "lowrank_mfac": LowRankMFAC,
    "lowrank_ggt": LowRankGGT,
    "sparse_adagrad": SparseAdaGrad,
    "microadam": MicroAdam,
}

# What `hf_efcp` exports.
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
