"""A step of the whole model in a few launches, for backends that can (Triton): the same step as `optimizer.py`'s.

What a launch needs to know of all tensors stands in one table. The Gram matrices of all units are one tensor on the
device, where they are damped and solved as well, so that nothing waits for the device but the check of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import checks, noise
from .blocks import sharing
from .compressors import LowRank, TopK
from .errors import BucketErrors
from .kernels import BUCKET
from .kernels.triton.launch import upload
from .kernels.triton.model import Model, place_scratch
from .kernels.triton.rows import Row, Settings
from .layout import Layout
from .leaves import Leaf, ParamRef
from .preconditioners import MFAC, GramPreconditioner, Preconditioner, WindowPosition
from .shards import is_sharded

_LONGEST = 2**31  # entries of a tensor: positions in it are 32 bits
_CODES = {"float32": 0, "bfloat16": 1, "int8": 3, "uint4": 4}
_NONE = 5
_ALIGNED = 16  # bytes: what kernels read at a time
# Columns of the table, and what the state calls the tensors.
_TENSORS = {
    **{name: name for name in ("error", "error_scale", "left", "right", "start")},
    **{"velocity": "momentum", "second": "second_moment", "second_scale": "second_moment_scale"},
    "first": "first_moment",
}

Unit = tuple[list[Leaf], WindowPosition]  # parameters that share a matrix, all with a gradient


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
    if metric is not None and metric.kind != "adam":
        return f'metric="{metric.kind}"'
    if isinstance(compressor, LowRank) and metric is None:
        return 'low-rank rows with metric="none", whose sums need float64'
    if any(is_sharded(ref.param) for ref in refs):
        return "sharded parameters"
    if any(ref.param.numel() >= _LONGEST for ref in refs):
        return f"a parameter of {_LONGEST} entries or more"
    buckets = isinstance(layout.errors, BucketErrors)
    if isinstance(compressor, TopK) and buckets and compressor.block_size % BUCKET:
        return f"block_size={compressor.block_size}, no multiple of {BUCKET}, with errors in 4 or 8 bits"
    return None


class Whole:
    """Steps the parameters of an optimizer on a device, many in a launch.

    Args:
        layout: What its state is made of.
        precondition: What is preconditioned.
        device: Where its parameters are.
    """

    def __init__(self, layout: Layout, precondition: str, device: torch.device) -> None:
        self._layout, self._precondition, self.device = layout, precondition, device
        self._model = Model(device)
        self._grams = torch.empty(0, dtype=torch.float64, device=device)
        self._homes: list[torch.Tensor] = []  # views of it, one for each unit
        self._rows: list[Row] = []
        self._settings: Settings | None = None
        self._units = 0
        self._moved: list[tuple[torch.Tensor, torch.Tensor]] = []  # parameters that are not contiguous, and copies

    def check(
        self, refs: Sequence[ParamRef], states: Mapping[Any, Mapping[str, Any]], name: Callable[[torch.Tensor], str]
    ) -> None:
        """Refuse what has addresses that are not the device's, and what would repeat those of one step.

        Args:
            refs: Parameters.
            states: Their states, by parameter.
            name: Tells what to call a parameter, when it comes to that.

        Raises:
            ValueError: A tensor of a state is on another device than its parameter.
            RuntimeError: A CUDA graph is captured.
        """
        for ref in refs:
            for key, value in states.get(ref.param, {}).items():
                if not isinstance(value, torch.Tensor) or key in ("gram", "step"):
                    continue
                if value.device != self.device:
                    raise ValueError(
                        f"{name(ref.param)} is on {self.device}, but {key} of its state on {value.device}: load the "
                        "state again with load_state_dict, which puts it there, or move it back"
                    )
                if value.data_ptr() % _ALIGNED:
                    raise ValueError(
                        f"{key} of the state of {name(ref.param)} begins inside other memory, at an address that is no "
                        f"multiple of {_ALIGNED} bytes: load the state again with load_state_dict, which copies it"
                    )
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step cannot be captured in a CUDA graph: what differs between steps (the noise, the place in the "
                "window, addresses of gradients) is sent from the host. Capture forward and backward, and step outside"
            )

    def squares(self, refs: Sequence[ParamRef]) -> dict[int, float]:
        """What stands for `|g|^2` in the check of the gradients: 0, or infinity where an entry is not finite.

        Args:
            refs: Parameters, with or without a gradient.

        Returns:
            By position.
        """
        given = [(ref.position, ref.param.grad) for ref in refs if ref.param.grad is not None]
        with self._on_device():
            bad = self._model.find_nonfinite([_flat(gradient) for _, gradient in given])
        return {position: math.inf if found else 0.0 for (position, _), found in zip(given, bad, strict=True)}

    def push(self, units: Sequence[Unit]) -> torch.Tensor:
        """Take the gradients into second moments, windows and errors.

        Args:
            units: Those that have gradients.

        Returns:
            The new column of each unit's Gram matrix, `(units, capacity)`, float64, on the device.
        """
        metric, model = self._layout.metric, self._model
        self._moved, self._units = [], len(units)
        self._settings = settings = self._compiled([leaf for leaves, _ in units for leaf in leaves])
        self._rows = rows = [
            row
            for number, (leaves, now) in enumerate(units)
            for leaf in leaves
            for row in self._describe(leaf, now, number)
        ]
        if not rows:
            return torch.zeros(len(units), settings.capacity, dtype=torch.float64, device=self.device)
        with self._on_device():
            if settings.rank:
                place_scratch(rows, settings.rank)
            model.begin(rows, len(units))
            if metric is not None:
                model.observe(rows, settings)
            if settings.rank:
                model.push_low_rank(rows, settings)
                return model.dots_low_rank(rows, settings)
            model.push_top_k(rows, settings)
            return model.dots_sparse(rows, settings)

    def outside(self) -> torch.Tensor | None:
        """Products of the dense vector that is preconditioned with the rows of its window.

        Returns:
            `(units, capacity)`, float64, on the device; None where a row is preconditioned.
        """
        settings = self._settings
        assert settings is not None  # push comes first
        if not settings.outside:
            return None
        if not self._rows:
            return torch.zeros(self._units, settings.capacity, dtype=torch.float64, device=self.device)
        products = self._model.outside_low_rank if settings.rank else self._model.outside_sparse
        with self._on_device():
            return products(self._rows, settings)

    def solve(
        self,
        states: Sequence[dict[str, Any]],
        positions: Sequence[WindowPosition],
        columns: torch.Tensor,
        products: torch.Tensor | None,
        preconditioner: Preconditioner,
        beta1: float,
    ) -> torch.Tensor | None:
        """Coefficients in AdamW's metric, on the device; the columns go into the Gram matrices.

        Args:
            states: What holds the Gram matrix of each unit; from now on a view of one tensor for all.
            positions: Where their windows stand.
            columns: From `push`.
            products: From `outside`.
            preconditioner: With its hyperparameters as they are.
            beta1: Decay of the first moment over the window's rows.

        Returns:
            `(units, capacity)`, float64; None if the preconditioner has to see numbers, and nothing was done.
        """
        if self._layout.metric is None or not isinstance(preconditioner, MFAC):
            return None
        if not all(preconditioner.is_definite(now) for now in set(positions)):
            return None
        grams = self._gather(states)
        coefficients = torch.zeros_like(columns)
        for now in dict.fromkeys(positions):
            places = [place for place, other in enumerate(positions) if other == now]
            # All at once where they are all: an index would be a copy.
            some: Any = slice(None) if len(places) == len(positions) else torch.tensor(places, device=self.device)
            column, rows = columns[some, : now.rows], now.rows
            grams[some, now.newest, :rows] = column
            grams[some, :rows, now.newest] = column
            own = grams[some][:, :rows, :rows]
            if products is None:
                weights = upload(now.weights(beta1).numpy(), self.device)
                coefficients[some, :rows] = preconditioner.shorten(own, own @ weights, now) + weights
            else:
                coefficients[some, :rows] = preconditioner.shorten(own, products[some, :rows], now)
        return coefficients

    def move(self, coefficients: torch.Tensor) -> None:
        """`theta <- keep theta - lr D^-1/2 G^T c` for the units of the last `push`.

        Args:
            coefficients: `(units, capacity)`, float64, on the device.
        """
        assert self._settings is not None  # push comes first
        move = self._model.move_low_rank if self._settings.rank else self._model.move_sparse
        if self._rows:
            with self._on_device():
                move(self._rows, self._settings, coefficients)
        for param, copy in self._moved:
            param.copy_(copy.view(param.shape))
        self._rows, self._moved = [], []

    def _gather(self, states: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The Gram matrices of units as one tensor, `(units, capacity, capacity)`; the states have views of it."""
        held = [state["gram"] for state in states]
        if len(held) != len(self._homes) or any(a is not b for a, b in zip(held, self._homes, strict=True)):
            self._grams = torch.stack([gram.to(self.device) for gram in held])
            self._homes = list(self._grams)
            for state, home in zip(states, self._homes, strict=True):
                state["gram"] = home
        return self._grams

    def _compiled(self, leaves: Sequence[Leaf]) -> Settings:
        compressor, metric = self._layout.compressor, self._layout.metric
        assert isinstance(compressor, LowRank | TopK)  # else refused
        errors = getattr(self._layout.errors, "dtype", None) or _whole_dtype(self._layout)
        groups = [leaf.ref.group for leaf in leaves]
        return Settings(
            stored=_code(errors),
            values=_code(compressor.value_dtype),
            metric=_NONE if metric is None else _code(metric.dtype),
            coupled=any(group["weight_decay"] and not group["decoupled_weight_decay"] for group in groups),
            beta2=0.0 if metric is None else metric.beta2,
            eps=0.0 if metric is None else metric.eps,
            capacity=self._layout.num_grads,
            rank=compressor.rank if isinstance(compressor, LowRank) else 0,
            block_size=compressor.block_size if isinstance(compressor, TopK) else 0,
            outside=self._precondition != "row",
            moment=_code(metric.momentum_dtype) if metric is not None and metric.beta1 else _NONE,
            beta1=0.0 if metric is None else metric.beta1,
        )

    def _describe(self, leaf: Leaf, now: WindowPosition, unit: int) -> list[Row]:
        """The rows of a parameter."""
        state, shape, (position, group, param) = leaf.state, leaf.shape, leaf.ref
        if not shape.numel():
            return []
        assert param.grad is not None  # a unit's leaves have one
        metric = self._layout.metric
        theta = param.detach()
        if not theta.is_contiguous() or theta.data_ptr() % _ALIGNED:
            theta = theta.clone(memory_format=torch.contiguous_format)
            self._moved.append((param, theta))
        tensors = {column: state[name] for column, name in _TENSORS.items() if name in state}
        if not group[checks.HEAVY_BALL]:
            tensors.pop("velocity", None)
        places = {
            "numel": shape.numel(),
            "newest": now.newest,
            "held": now.rows,
            "unit": unit,
            "error_key": noise.key(now.steps, position),
        }
        lr, decoupled = float(group["lr"]), group["decoupled_weight_decay"]
        numbers = {
            "correction": 1.0,
            "factor": 1.0,
            "lr": lr,
            "keep": 1.0 - lr * group["weight_decay"] if decoupled else 1.0,
            "momentum": group[checks.HEAVY_BALL],
            "decay": 0.0 if decoupled else group["weight_decay"],
        }
        if metric is not None:
            steps = state["gradients"]
            places["second_key"] = metric.key(steps, position)
            if metric.beta1:
                places["first_key"] = metric.first_key(steps, position)
            numbers |= {"correction": metric.correction(steps), "factor": 1.0 / (1.0 - metric.beta1**steps)}
        gradient = _flat(param.grad)
        if isinstance(self._layout.compressor, LowRank):
            places |= {"height": 0, "width": 0}
            if "left" in state:
                places |= {"height": state["left"].shape[-1], "width": state["right"].shape[-1]}
            else:
                tensors["values"] = state["values"]
            return [Row(gradient, theta, tensors, places, numbers)]
        found = []
        for piece, indices, values, scales in self._layout.window.parts(state, shape):  # type: ignore[attr-defined]
            own = {"begin": piece.start, "blocks": piece.blocks, "kept": piece.kept, "stride": indices.stride(0)}
            own |= {"width": piece.length, "height": min(sharing(piece.length), piece.blocks)}
            window = {"indices": indices, "values": values}
            if scales is not None:
                window["scales"], own["scale_stride"] = scales, scales.stride(0)
            found.append(Row(gradient, theta, tensors | window, places | own, numbers))
        return found

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    flat = gradient.detach().contiguous().view(-1)
    return flat.clone() if flat.data_ptr() % _ALIGNED else flat


def _code(dtype: torch.dtype) -> int:
    return _CODES[str(dtype).removeprefix("torch.")]


def _whole_dtype(layout: Layout) -> torch.dtype:
    """The dtype of errors without scales."""
    return layout.errors.allocate(torch.Size((0,)), "meta")["error"].dtype
