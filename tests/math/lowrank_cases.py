"""Low-rank windows with random rows, and brute force that is given the rows."""

import torch

from hf_efcp.compressors import LowRankWindow

SHAPES = [(), (9,), (5, 4), (40, 3), (3, 40), (12, 17), (6, 3, 5), (4, 3, 2, 6), (0, 3), (1, 8)]


def dense_rows(state):
    """The rows of a window written out, `(m, numel)`, float64."""
    if "values" in state:
        return state["values"].double()
    return torch.einsum("mri,mrj->mij", state["left"].double(), state["right"].double()).flatten(1)


def random_window(shape, capacity, rank, value_dtype=torch.float32, seed=0):
    """A window full of random rows."""
    window = LowRankWindow(capacity, rank, value_dtype)
    state = window.allocate(torch.Size(shape), "cpu")
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return window, state


class Given:
    """Brute force over rows that it is given instead of compressing: those that the optimizer stored."""

    def step_with(self, gradients, rows):
        self.given = iter(rows)
        self.step(gradients)

    def compress(self, accumulator):
        return next(self.given)


def newest(optimizer, params, step):
    """The row that was stored in a step, parameter by parameter; zeros for one that was never stepped."""
    position = step % optimizer.param_groups[0]["num_grads"]
    zeros = (torch.zeros(param.numel(), dtype=torch.float64) for param in params)
    states = (optimizer.state.get(param) for param in params)
    return [dense_rows(state)[position] if state else zero for state, zero in zip(states, zeros, strict=True)]
