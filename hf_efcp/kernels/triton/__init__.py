"""Triton kernels for CUDA and ROCm: a step of a whole model in a few launches, see `hf_efcp.whole`.

What such a step does not do goes tensor by tensor through the plain torch kernels, which are here as well: this is a
backend as `hf_efcp.kernels` wants it.
"""

from __future__ import annotations

from ..reference import (
    accumulate_topk,
    apply,
    combine,
    dequantize,
    dots,
    observe,
    observe_levels,
    project,
    quantize,
    round_to_bfloat16,
    squares,
    whiten,
    whiten_levels,
)

__all__ = [
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

NAME = "triton"
