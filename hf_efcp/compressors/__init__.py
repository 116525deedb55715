"""Compressors, each in a file with the window of its rows. `Compressor` and `Window` say what they have to have."""

from .base import Compressor, Held, Job, State, Window, span_length
from .dense import DenseWindow, Identity
from .lowrank import LowRank, LowRankWindow
from .matrices import matrix
from .topk import SparseWindow, TopK

__all__ = [
    "Compressor",
    "DenseWindow",
    "Held",
    "Identity",
    "Job",
    "LowRank",
    "LowRankWindow",
    "SparseWindow",
    "State",
    "TopK",
    "Window",
    "matrix",
    "span_length",
]
