"""Trainers over tiny models."""

from __future__ import annotations

import torch

# The paper's rule: AdamW's metric makes steps of what is rounding only, the gradient of a key's bias.
SPARSE = {
    "optim": "sparse_mfac",
    "optim_args": "num_grads=4,density=0.2,block_size=256,metric=none,damp=1e-3",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[name] - b[name]).float().flatten() for name in a]).norm())
