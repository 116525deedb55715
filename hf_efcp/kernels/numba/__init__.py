"""numba kernels for the CPU: the twins of `reference/`, block by block.

One block of the dense vector stays in the first-level cache while all rows of the window stream past it.

The loops over the entries of a window take eight of them at a time: their values are loaded and widened as one vector,
the entries of the dense block one by one, because an instruction that gathers takes longer than eight loads, on some
machines several times. Eight entries of one row where rows are long, and where they are short, of however many rows.
"""

from .combination import combine
from .dense import apply, squares
from .moments import observe, observe_levels, whiten, whiten_levels
from .products import dots, project
from .rounding import dequantize, quantize, round_to_bfloat16
from .topk import accumulate_topk

NAME = "numba"

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
