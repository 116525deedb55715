"""Errors to quantise."""

import torch

QUANTISED = {torch.uint4: 7, torch.int8: 127}


BELOW_FLOAT32 = [torch.uint4, torch.int8, torch.bfloat16]
