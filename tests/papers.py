"""The optimizers with the paper's lengths of updates, which most tests compare with."""

from functools import partial

import hf_efcp

DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC, MicroAdam, SparseAdaGrad, SparseGGT, SparseMFAC = (
    partial(getattr(hf_efcp, name), metric="none")
    for name in (
        *("DenseGGT", "DenseMFAC", "LowRankGGT", "LowRankMFAC", "MicroAdam", "SparseAdaGrad", "SparseGGT"),
        "SparseMFAC",
    )
)
