"""A small model with gradients, and plenty of memory."""

import torch

SIZES = [(40, 30), (17,), (300,), ()]


def module(seed=0):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.nn.ParameterList(torch.zeros(size) for size in SIZES)
    for param in whole.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return whole


def plenty():
    return 1 << 40
