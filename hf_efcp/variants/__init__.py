"""The named optimizers, one a file: a compressor, a preconditioner, and defaults that were measured together."""

from .dense_ggt import DenseGGT
from .dense_mfac import DenseMFAC
from .sparse_ggt import SparseGGT
from .sparse_mfac import SparseMFAC

__all__ = ["DenseGGT", "DenseMFAC", "SparseGGT", "SparseMFAC"]
