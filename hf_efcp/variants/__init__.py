"""The named optimizers, one a file: a compressor, a preconditioner, and defaults that were measured together."""

from .sparse_mfac import SparseMFAC

__all__ = ["SparseMFAC"]
