"""What the kernels of a whole model are told of an optimizer and its parameters, for `whole.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import checks
from .blocks import sharing
from .compressors import LowRank, TopK
from .compressors.matrices import matrix
from .errors import BucketErrors
from .kernels import BUCKET
from .kernels.triton import shared
from .kernels.triton.rows import Row, Settings
from .layout import Layout
from .leaves import Leaf, ParamRef
from .preconditioners import GramPreconditioner, Preconditioner
from .shards import is_sharded

ALIGNED = 16  # bytes: what kernels read at a time
_LONGEST = 2**31 - 2**17  # entries of a tensor: positions in it, and in a tile that reaches beyond it, are 32 bits
_VECTORS = 32  # of a matrix that are read at a time: so are positions in all of them
_CODES = {"float32": 0, "bfloat16": 1, "int8": 3, "uint4": 4}
_NONE, _FACTORED = shared.NONE.value, shared.FACTORED.value
# Columns of the table, and what the state calls the tensors.
_TENSORS = {
    **{name: name for name in ("error", "error_scale", "left", "right", "start")},
    **{"velocity": "momentum", "second": "second_moment", "second_scale": "second_moment_scale"},
    "first": "first_moment",
}


def refusal(layout: Layout, preconditioner: Preconditioner, precondition: str, refs: Sequence[ParamRef]) -> str | None:
    """Why the kernels cannot step an optimizer.

    Args:
        layout: What its state is made of.
        preconditioner: What is made of the window.
        precondition: What is preconditioned.
        refs: Its parameters.

    Returns:
        The reason; None if they can.
    """
    compressor, metric = layout.compressor, layout.metric
    if not isinstance(compressor, LowRank | TopK):
        return f"{type(compressor).__name__} rows"
    if not isinstance(preconditioner, GramPreconditioner):
        return f"{type(preconditioner).__name__}"
    if precondition != "row" and metric is None:
        return f'precondition="{precondition}" with metric="none"'
    if isinstance(compressor, LowRank) and metric is None:
        return 'low-rank rows with metric="none", whose sums need float64'
    if any(is_sharded(ref.param) for ref in refs):
        return "sharded parameters"
    if any(ref.param.numel() >= _LONGEST for ref in refs):
        return f"a parameter of {_LONGEST} entries or more"
    if isinstance(compressor, LowRank):
        most = _LONGEST // max(_VECTORS, compressor.rank)
        # This is asked in every step, and hardly ever is one as large.
        large = (ref.param.shape for ref in refs if ref.param.numel() >= most)
        if any(max(matrix(shape, compressor.rank) or (0,)) >= most for shape in large):
            return f"a matrix with a side of {most} or more"
    buckets = isinstance(layout.errors, BucketErrors)
    if isinstance(compressor, TopK) and buckets and compressor.block_size % BUCKET:
        return f"block_size={compressor.block_size}, no multiple of {BUCKET}, with errors in 4 or 8 bits"
    return None


def check_state(
    param: torch.Tensor, state: Mapping[str, Any], device: torch.device, name: Callable[[torch.Tensor], str]
) -> None:
    """Refuse tensors whose addresses kernels cannot take.

    Args:
        param: A parameter.
        state: Its state.
        device: Where it is.
        name: Tells what to call it, when it comes to that.

    Raises:
        ValueError: One is on another device, or begins inside other memory.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or key in ("gram", "step"):
            continue
        if value.device != device:
            raise ValueError(
                f"{name(param)} is on {device}, but {key} of its state on {value.device}: load the state again with "
                "load_state_dict, which puts it there, or move it back"
            )
        if value.data_ptr() % ALIGNED:
            raise ValueError(
                f"{key} of the state of {name(param)} begins inside other memory, at an address that is no multiple of "
                f"{ALIGNED} bytes: load the state again with load_state_dict, which copies it"
            )


def settings_of(layout: Layout, precondition: str, leaves: Sequence[Leaf]) -> Settings:
    """What kernels are compiled for.

    Args:
        layout: What the state is made of.
        precondition: What is preconditioned.
        leaves: The parameters, with their groups as they are.

    Returns:
        The settings.
    """
    compressor, metric = layout.compressor, layout.metric
    assert isinstance(compressor, LowRank | TopK)  # else refused
    errors = getattr(layout.errors, "dtype", None) or _whole_dtype(layout)
    groups = [leaf.ref.group for leaf in leaves]
    return Settings(
        stored=_code(errors),
        values=_code(compressor.value_dtype),
        metric=_NONE if metric is None else _code(metric.dtype) + _FACTORED * (metric.kind == "factored"),
        coupled=any(group["weight_decay"] and not group["decoupled_weight_decay"] for group in groups),
        beta2=0.0 if metric is None else metric.beta2,
        eps=0.0 if metric is None else metric.eps,
        capacity=layout.num_grads,
        rank=compressor.rank if isinstance(compressor, LowRank) else 0,
        block_size=compressor.block_size if isinstance(compressor, TopK) else 0,
        outside=precondition != "row",
        moment=_code(metric.momentum_dtype) if metric is not None and metric.beta1 else _NONE,
        beta1=0.0 if metric is None else metric.beta1,
    )


def rows_of(layout: Layout, leaf: Leaf, unit: int) -> list[Row]:
    """What stands in the table for a parameter, but for what changes from step to step.

    Args:
        layout: What its state is made of.
        leaf: The parameter, with a gradient.
        unit: Number of its unit.

    Returns:
        A row for all of it, or for each run of equal blocks; none if it has no entries.
    """
    state, shape, (_, group, param) = leaf.state, leaf.shape, leaf.ref
    if not shape.numel():
        return []
    assert param.grad is not None  # a unit's leaves have one
    tensors = {column: state[name] for column, name in _TENSORS.items() if name in state}
    if not group[checks.HEAVY_BALL]:
        tensors.pop("velocity", None)
    places = {"numel": shape.numel(), "unit": unit}
    if "second_moment_rows" in state:
        tensors |= {"second": state["second_moment_rows"], "second_scale": state["second_moment_columns"]}
        places["second_width"] = state["second_moment_columns"].numel()
    if isinstance(layout.compressor, LowRank):
        places |= {"height": 0, "width": 0}
        if "left" in state:
            places |= {"height": state["left"].shape[-1], "width": state["right"].shape[-1]}
        else:
            tensors["values"] = state["values"]
        return [Row(param.grad, param, tensors, places, {})]
    found = []
    for piece, indices, values, scales in layout.window.parts(state, shape):  # type: ignore[attr-defined]
        own = {"begin": piece.start, "blocks": piece.blocks, "kept": piece.kept, "stride": indices.stride(0)}
        own |= {"width": piece.length, "height": min(sharing(piece.length), piece.blocks)}
        window = {"indices": indices, "values": values}
        if scales is not None:
            window["scales"], own["scale_stride"] = scales, scales.stride(0)
        found.append(Row(param.grad, param, tensors | window, places | own, {}))
    return found


def _code(dtype: torch.dtype) -> int:
    return _CODES[str(dtype).removeprefix("torch.")]


def _whole_dtype(layout: Layout) -> torch.dtype:
    """The dtype of errors without scales."""
    return layout.errors.allocate(torch.Size((0,)), "meta")["error"].dtype
