"""Plain torch kernels: the ground truth for every other backend, and what runs on devices without one of their own.

Blocks are processed in chunks, so that the temporaries (int64 indices, float64 products) stay at a few megabytes
however large the window is.
"""

from .dense import apply, squares
from .moments import observe, observe_levels, whiten, whiten_levels
from .rounding import dequantize, quantize, round_to_bfloat16
from .window import accumulate_topk, combine, dots, project

NAME = "reference"

__all__ = [
    "NAME",
    "accumulate_topk",
    "apply",
    "combine",
    "dequantize",
    "dots",
    "observe",
    "observe_levels",
    "project",
    "quantize",
    "round_to_bfloat16",
    "squares",
    "whiten",
    "whiten_levels",
]
