"""The metric in which gradients are compared: AdamW's second moment, or none.

With `D = diag(sqrt(v_hat) + eps)`, `v` as in AdamW, rows enter the window as `D^-1/2 g`, and the update is

    u = D^-1/2 f(R^T R) D^-1/2 x,    f(0) = 1,

so that without a matrix (`f = 1`) `u` is AdamW's for the momentum `x = m_hat`, and RMSprop's for the gradient `x = g`.
The matrix can only turn and shorten what AdamW would do, and learning rates are AdamW's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import noise
from .compressors import State
from .errors import error_store
from .kernels import BUCKET, Kernels

METRICS = ("none", "adam", "factored")
METRIC_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16)

_SLAB = 1 << 17  # entries of squares that exist at a time
_LARGEST = torch.finfo(torch.float32).max
CHANNELS = 4  # buffers of a parameter whose noise has to differ
SECOND_CHANNEL, FIRST_CHANNEL = 1, 2


@dataclass(frozen=True)
class Buffer:
    """A float32 vector of a parameter's size that is kept between steps in some dtype, rounded stochastically.

    Args:
        name: Its name in the state.
        dtype: How it is kept: float32, bfloat16 or int8.
        channel: Tells its noise from that of the parameter's other buffers, 1 to 3.
    """

    name: str
    dtype: torch.dtype
    channel: int

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where; "meta" gives shapes without memory.

        Returns:
            `{name: ...}`, and for int8 `{name + "_scale": ...}` as well.
        """
        fresh = error_store(self.dtype).allocate(shape, device)
        return {key.replace("error", self.name): tensor for key, tensor in fresh.items()}

    def load(self, state: State, slab: slice, kernels: Kernels) -> torch.Tensor:
        """A slab in float32: what is stored, or a copy.

        Args:
            state: The parameter's tensors.
            slab: Where; in int8 whole buckets.
            kernels: The backend.

        Returns:
            `(n,)`, float32.
        """
        return error_store(self.dtype).load(self._stored(state), slab, kernels)

    def save(self, state: State, values: torch.Tensor, slab: slice, step: int, position: int, kernels: Kernels) -> None:
        """Keep what `load` returned and was updated.

        Args:
            state: The parameter's tensors; updated.
            values: The slab.
            slab: Where.
            step: Number of the step, for the noise.
            position: Position of the parameter, for the noise.
            kernels: The backend.
        """
        error_store(self.dtype).save(self._stored(state), values, slab, self._draw(step), position, kernels)

    def levels(self, state: State, slab: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels and scales of a slab of whole buckets, of an int8 buffer.

        Args:
            state: The parameter's tensors.
            slab: Where.

        Returns:
            Views of what is stored.
        """
        buckets = slice(slab.start // BUCKET, -(-slab.stop // BUCKET))
        return state[self.name][slab], state[self.name + "_scale"][buckets]

    def key(self, step: int, position: int) -> int:
        """The key of the noise that `save` rounds with.

        Args:
            step: Number of the step.
            position: Position of the parameter.

        Returns:
            A number of 32 bits.
        """
        return noise.key(self._draw(step), position)

    def _draw(self, step: int) -> int:
        """What stands for the step, so that no two buffers of a parameter are rounded with the same noise."""
        return noise.mix(step * CHANNELS + self.channel & noise.MASK)

    def _stored(self, state: State) -> State:
        """The tensors, by the names that an error has."""
        names = {key: key.replace("error", self.name) for key in ("error", "error_scale")}
        return {key: state[name] for key, name in names.items() if name in state}


@dataclass(frozen=True)
class Metric:
    """AdamW's second moment as a metric, and AdamW's first moment if that is what is preconditioned.

    Args:
        kind: "adam" for a second moment of every entry, "factored" for means over rows and columns (Adafactor, Shazeer
            & Stern, arXiv 1804.04235): `v_ij = r_i c_j / mean(r)`, near 0 bytes. Vectors are kept whole.
        dtype: How the second moment is kept: float32, bfloat16, or int8 (levels of its root, 17 / 16 bytes). Ignored
            where it is factored.
        beta1: Decay of the first moment, in [0, 1); 0 keeps none.
        beta2: Decay of the second moment, in [0, 1).
        eps: What is added to the root of the second moment, positive.
        momentum_dtype: How the first moment is kept: float32 or bfloat16.

    Raises:
        ValueError: A value outside its range.
    """

    kind: str = "adam"
    dtype: torch.dtype = torch.float32
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("metric_beta2", self.beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {beta}")
        if not (math.isfinite(self.eps) and self.eps > 0.0):
            raise ValueError(f"metric_eps must be a finite positive number, got {self.eps}")
        for name, dtype, dtypes in (
            ("metric_dtype", self.dtype, METRIC_DTYPES),
            ("momentum_dtype", self.momentum_dtype, MOMENTUM_DTYPES),
        ):
            if dtype not in dtypes:
                raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {dtype}")

    @property
    def _second(self) -> Buffer:
        return Buffer("second_moment", self.dtype, SECOND_CHANNEL)

    @property
    def _first(self) -> Buffer:
        return Buffer("first_moment", self.momentum_dtype, FIRST_CHANNEL)

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Moments of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where; "meta" gives shapes without memory.

        Returns:
            Plain tensors by name.
        """
        first = self._first.allocate(shape, device) if self.beta1 else {}
        if not self.is_factored(shape):
            return first | self._second.allocate(shape, device)
        rows, columns = _matrix(shape)
        sides = (("second_moment_rows", rows), ("second_moment_columns", columns))
        return first | {name: torch.zeros(size, dtype=torch.float32, device=device) for name, size in sides}

    def observe(
        self,
        state: State,
        shape: torch.Size,
        span: slice,
        gradient: torch.Tensor,
        step: int,
        position: int,
        kernels: Kernels,
        out: torch.Tensor,
    ) -> None:
        """`m <- beta1 m + (1 - beta1) g`, `v <- beta2 v + (1 - beta2) g^2`, and `out += D^-1/2 g`, in a span.

        A factored second moment has to have the whole gradient before: see `observe_factored`.

        Args:
            state: The parameter's tensors; updated.
            shape: Shape of the parameter.
            span: Of the flattened parameter, whole buckets.
            gradient: The span of `g`, `(n,)`, float32, contiguous.
            step: Gradients that the parameter has had, this one included.
            position: Position of the parameter.
            kernels: The backend.
            out: `(n,)`, float32, contiguous; updated.
        """
        if self.beta1:
            m = self._first.load(state, span, kernels)
            m.lerp_(gradient, 1.0 - self.beta1)
            self._first.save(state, m, span, step, position, kernels)
        if self._has_levels(shape):
            levels, key = self._second.levels(state, span), self._second.key(step, position)
            kernels.observe_levels(*levels, gradient, self.beta2, key, span.start, *self._numbers(step), out)
            return
        if not self.is_factored(shape):
            v = self._second.load(state, span, kernels)
            kernels.observe(v, gradient, self.beta2)
            self._second.save(state, v, span, step, position, kernels)
        whitened = torch.empty_like(out)
        kernels.whiten(gradient, self._second_moment(state, shape, span, kernels), 1.0, *self._numbers(step), whitened)
        out += whitened

    def whiten(
        self,
        state: State,
        shape: torch.Size,
        span: slice,
        x: torch.Tensor,
        step: int,
        kernels: Kernels,
        factor: float = 1.0,
    ) -> torch.Tensor:
        """`x <- factor D^-1/2 x` in a span; 0 where the second moment is: what never had a gradient does not move.

        In int8 neither does what has the lowest level, a 127th of the largest root of 64 neighbours or less.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: Of the flattened parameter.
            x: The span of a vector, `(n,)`, float32, contiguous; updated.
            step: Gradients that the parameter has had.
            kernels: The backend.
            factor: A number.

        Returns:
            `x`.
        """
        if self._has_levels(shape):
            levels = self._second.levels(state, slice(0, shape.numel()))
            kernels.whiten_levels(x, *levels, span.start, factor, *self._numbers(step))
        else:
            kernels.whiten(x, self._second_moment(state, shape, span, kernels), factor, *self._numbers(step), x)
        return x

    def momentum(self, state: State, shape: torch.Size, span: slice, step: int, kernels: Kernels) -> torch.Tensor:
        """`D^-1/2 m_hat` in a span, `m_hat = m / (1 - beta1^step)`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: Of the flattened parameter.
            step: Gradients that the parameter has had.
            kernels: The backend.

        Returns:
            `(n,)`, float32.
        """
        m, factor = self._first.load(state, span, kernels), 1.0 / (1.0 - self.beta1**step)
        m = m.clone() if self.momentum_dtype == torch.float32 else m  # not what is stored
        return self.whiten(state, shape, span, m, step, kernels, factor)

    def is_factored(self, shape: torch.Size) -> bool:
        """Whether a parameter of a shape has means over rows and columns only."""
        return self.kind == "factored" and len(shape) > 1

    def observe_factored(self, state: State, gradient: torch.Tensor) -> None:
        """`v` of a parameter that is factored: the means of `g^2` over rows and columns.

        Args:
            state: The parameter's tensors; updated.
            gradient: `g`, in the parameter's shape, float32, contiguous.
        """
        rows, columns = _matrix(gradient.shape)
        if not gradient.numel():  # an empty shard
            return
        g, step = gradient.view(rows, columns), max(1, _SLAB // columns)
        total = torch.zeros_like(state["second_moment_columns"])
        mean = state["second_moment_rows"].mul_(self.beta2)
        for start in range(0, rows, step):
            squares = g[start : start + step].square()
            total += squares.sum(dim=0)
            mean[start : start + step].add_(squares.mean(dim=1), alpha=1.0 - self.beta2).clamp_(max=_LARGEST)
        state["second_moment_columns"].mul_(self.beta2).add_(total / rows, alpha=1.0 - self.beta2).clamp_(max=_LARGEST)

    def key(self, step: int, position: int) -> int:
        """The key of the noise that a second moment is rounded with.

        Args:
            step: Gradients that the parameter has had.
            position: Position of the parameter.

        Returns:
            A number of 32 bits.
        """
        return self._second.key(step, position)

    def first_key(self, step: int, position: int) -> int:
        """The key of the noise that a first moment is rounded with.

        Args:
            step: Gradients that the parameter has had.
            position: Position of the parameter.

        Returns:
            A number of 32 bits.
        """
        return self._first.key(step, position)

    def correction(self, step: int) -> float:
        """What corrects the root of a second moment for its start, `1 / sqrt(1 - beta2^step)`.

        Args:
            step: Gradients that the parameter has had.

        Returns:
            A number of at least 1.
        """
        return 1.0 / math.sqrt(1.0 - self.beta2**step)

    def _has_levels(self, shape: torch.Size) -> bool:
        """Whether the root of a parameter's second moment is kept as levels."""
        return self.dtype == torch.int8 and not self.is_factored(shape)

    def _numbers(self, step: int) -> tuple[float, float]:
        """What makes the metric of a second moment: the correction of its start, and `eps`."""
        return self.correction(step), self.eps

    def _second_moment(self, state: State, shape: torch.Size, span: slice, kernels: Kernels) -> torch.Tensor:
        """`v` of a span, `(n,)`, float32."""
        if not self.is_factored(shape):
            return self._second.load(state, span, kernels)
        _, columns = _matrix(shape)
        first, last = span.start // columns, -(-span.stop // columns)
        r, c = state["second_moment_rows"][first:last], state["second_moment_columns"]
        # The mean of both is the mean of g^2. Multiplied so that neither product leaves float32.
        v = torch.outer(r, c / c.mean().clamp(min=torch.finfo(torch.float32).tiny)).view(-1)
        return v[span.start - first * columns : span.stop - first * columns]


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()
