"""What a compressor and its window are, and what all of them share.

A compressor makes a row of an accumulator, with error feedback; it knows nothing of parameters, learning rates or
damping. A window is the ring buffer of the last `m` rows of one parameter. It holds no data: it says how the plain
tensors in `optimizer.state[param]` are laid out and read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from ..kernels import Kernels

State = dict[str, torch.Tensor]
Held = tuple[State, torch.Size]  # what a window holds for a parameter, and the parameter's shape

_SPAN = 1 << 18  # entries of an update that a thread makes at a time; a GPU takes more, each call costs it as much
_SPAN_OF_DEVICES = 1 << 24


class Job(NamedTuple):
    """A gradient to compress.

    Args:
        gradient: A parameter's or a slab of it, float32, contiguous, finite. None for a compressor that is given the
            accumulator `a = e + g` as the error.
        error: `e`, in the same shape, float32, contiguous; updated. None if nothing is dropped.
        row: Where the row goes: views into the window.
        state: The parameter's tensors.
    """

    gradient: torch.Tensor | None
    error: torch.Tensor | None
    row: Any
    state: State


class Compressor(Protocol):
    """What `EFCP` needs of a compressor: a frozen dataclass whose fields are its settings.

    The fields are written into every parameter group, and so into checkpoints; one with other settings is refused.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    lossless: ClassVar[bool]  # nothing is dropped: there is no error to keep
    accumulates: ClassVar[bool]  # it adds the gradient to the error itself; else it is given the sum

    def window(self, num_grads: int, sums: torch.dtype = torch.float64) -> Window:
        """The window that stores this compressor's rows, and the dtype that is enough for its sums over rows."""

    def allocate(self, shape: torch.Size, device: torch.device | str, position: int) -> State:
        """Tensors of its own that it keeps for the parameter at a position, by their names in the state."""

    def compress(self, jobs: Sequence[Job], kernels: Kernels) -> None:
        """`row = C(a); error = a - row`, in place; `a` is the error, or error + gradient (`accumulates`)."""


class Window(Protocol):
    """What `EFCP` needs of a window. `shape` is the shape of the parameter.

    `dots` and `project` leave their numbers where the window is, in the widest dtype of the device: a GPU that is asked
    for them tensor by tensor would wait every time.
    """

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for `m` rows of zeros, by their names in the state."""

    def row(self, state: State, shape: torch.Size, position: int) -> Any:
        """Views of the row at a position, for the compressor to write into."""

    def slabs(self, row: Any, shape: torch.Size) -> Iterator[tuple[slice, Any]]:
        """Parts of a row that can be compressed one after the other, and where they are in the flattened parameter.

        They begin at multiples of `kernels.BUCKET`, and are a few megabytes where rows can be cut at all.
        """

    def clear(self, state: State, shape: torch.Size, position: int) -> None:
        """Make the row at a position zero."""

    def check(self, state: State, shape: torch.Size, name: str) -> None:
        """Refuse loaded tensors, of the right shapes, whose content cannot be a window."""

    def dots(self, held: Sequence[Held], newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """Inner products of row `newest` with the first `rows` rows: each parameter's part of a Gram column."""

    def spans(self, shape: torch.Size, device: torch.device) -> list[slice]:
        """Where the flattened parameter is cut for `project` and `combine`: into what a thread does at a time."""

    def project(
        self, state: State, shape: torch.Size, span: slice, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """Inner products of a span of a dense vector, `(n,)`, with the first `rows` rows: `(rows,)`."""

    def combine(
        self,
        state: State,
        shape: torch.Size,
        span: slice,
        coefficients: torch.Tensor,
        kernels: Kernels,
        *,
        base: torch.Tensor | None = None,
        scale: float = 0.0,
        squared: bool = False,
    ) -> torch.Tensor:
        """`scale x + G^T c` in a span, `(n,)`, float32; `base` is the span of `x`, and `c` where the window is."""


def span_length(device: torch.device) -> int:
    """Entries of a span on a device."""
    return _SPAN if device.type == "cpu" else _SPAN_OF_DEVICES


def stacked(columns: list[torch.Tensor], rows: int) -> torch.Tensor:
    """Columns of a Gram matrix, one for each parameter.

    Args:
        columns: `(rows,)` each; there may be none.
        rows: Their length.

    Returns:
        `(parameters, rows)`.
    """
    return torch.stack(columns) if columns else torch.zeros(0, rows, dtype=torch.float64, device="cpu")
