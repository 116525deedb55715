"""Gradients of any size, and what a window has of them."""

import torch
from variants import papers_names, taken

from hf_efcp.kernels import reference

SHAPES = [(6, 5), (7,), ()]


MFAC_NAMES = [name for name in papers_names() if taken(name, damp=0.0)]


# What multiplies normal noise.
SCALES = {"normal": 1.0, "huge": 1e38, "large": 1e27, "tiny": 1e-30, "denormal": 1e-40, "zero": 0.0}


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]


def noise(kind, step):
    """Gradients of a kind; "identical" ones are the same at every step."""
    generator = torch.Generator().manual_seed(0 if kind == "identical" else step)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(g.clamp(-3, 3) * SCALES.get(kind, 1.0)) for g in drawn]


def rows(optimizer, position=None):
    """The window over all parameters as dense float64 rows, or its row at a position."""
    capacity = optimizer.param_groups[0]["num_grads"]
    units = torch.eye(capacity, dtype=torch.float64)
    found = []
    for unit in units if position is None else units[position : position + 1]:
        parts = []
        for leaf in [leaf for together in optimizer._units() for leaf in optimizer._leaves(together)]:
            window, held = optimizer._layout.window, (leaf.state, leaf.shape)
            spans = window.spans(leaf.shape, leaf.ref.param.device)
            parts += [window.combine(*held, span, unit, reference).double() for span in spans]
        found.append(torch.cat(parts))
    return torch.stack(found)


def pushed(optimizer):
    return optimizer._gram_state(optimizer._refs())["pushed"]


def errors(optimizer):
    """The error over all parameters; zeros where nothing is compressed."""
    states = [leaf.state for unit in optimizer._units() for leaf in optimizer._leaves(unit)]
    return torch.cat([s["error"].double().view(-1) for s in states]) if "error" in states[0] else torch.zeros(())


def assert_finite(params, optimizer):
    for param in params:
        assert torch.isfinite(param).all()
        for key, value in optimizer.state[param].items():
            if torch.is_tensor(value) and value.is_floating_point():
                assert torch.isfinite(value).all(), key
