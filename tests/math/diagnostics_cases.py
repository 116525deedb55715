"""What the tests of diagnostics share."""

import torch
from problems import set_gradients

from hf_efcp.diagnostics import measure, snapshot

OF_THE_STEP = {"gradient_norm", "update_norm", "cosine", "scaling_p05", "scaling_p50", "scaling_p95"}


def parameter(*values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def measured(optimizer, params, gradients):
    set_gradients(params, gradients)
    before = snapshot(optimizer)
    optimizer.step()
    return measure(optimizer, before)
