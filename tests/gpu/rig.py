"""One tensor, or a few, as the Triton kernels take them: for tests of single kernels."""

import torch

from hf_efcp.blocks import cut, index_dtype, sharing
from hf_efcp.compressors import SparseWindow
from hf_efcp.errors import UINT4, error_store
from hf_efcp.kernels.triton.cuts import place_scratch
from hf_efcp.kernels.triton.finite import FiniteCheck
from hf_efcp.kernels.triton.model import Model
from hf_efcp.kernels.triton.rows import Row, Settings

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3, UINT4: 4}
NO_METRIC = 5
NUMBERS = {"correction": 1.0, "lr": 0.0, "keep": 1.0, "momentum": 0.0, "decay": 0.0, "factor": 1.0}


def settings(**changes):
    """Of plain float32, unless changed; dtypes by name."""
    dtypes = {"stored": torch.float32, "values": torch.float32}
    given = {name: CODES[changes.pop(name, dtype)] for name, dtype in dtypes.items()}
    metric = changes.pop("metric", None)
    given["metric"] = NO_METRIC if metric is None else CODES[metric]
    return Settings(**{"coupled": False, "beta2": 0.9, "eps": 1e-8, "capacity": 3, **given, **changes})


def row(gradient, state, theta=None, **places):
    """A parameter of zeros, unless given, with a gradient; `state` by the table's columns."""
    numbers = {name: places.pop(name, value) for name, value in NUMBERS.items()}
    shape = {"numel": gradient.numel(), "height": 0, "width": 0, "newest": 1, "held": 3, "unit": 0}
    theta = torch.zeros_like(gradient) if theta is None else theta
    return Row(gradient.view(-1), theta.view(-1), state, shape | places, numbers)


def error_of(flat, dtype, kernels, key=0):
    """A stored error, by the table's columns, and what it stands for."""
    store = error_store(dtype)
    state = store.allocate(flat.shape, flat.device)
    if dtype == torch.float32:
        state["error"].copy_(flat)
    else:
        store.save(state, flat.clone(), slice(0, len(flat)), key, 0, kernels)
    return state, store.load(state, slice(0, len(flat)), kernels).clone()


def sparse_rows(gradient, error, state, window, key, newest=1):
    """The rows of a flat parameter with a sparse window."""
    found = []
    for piece, indices, values, scales in window.parts(state, gradient.shape):
        own = {"indices": indices, "values": values} | ({} if scales is None else {"scales": scales})
        found.append(
            row(
                gradient,
                error | own,
                begin=piece.start,
                blocks=piece.blocks,
                kept=piece.kept,
                stride=indices.stride(0),
                width=piece.length,
                height=min(sharing(piece.length), piece.blocks),
                scale_stride=0 if scales is None else scales.stride(0),
                error_key=key,
                newest=newest,
            )
        )
    return found


__all__ = [
    "FiniteCheck",
    "Model",
    "SparseWindow",
    "cut",
    "error_of",
    "index_dtype",
    "place_scratch",
    "row",
    "settings",
    "sparse_rows",
]
