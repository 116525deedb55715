"""Compressors: accumulator -> row, with error feedback. They know nothing of parameters, learning rates or damping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from .blocks import MAX_BLOCK_SIZE
from .checks import check_fields
from .kernels import Kernels
from .windows import DenseWindow, SparseWindow, State, Window


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


@dataclass(frozen=True)
class TopK:
    """Block-wise Top-k: every block of consecutive entries keeps its entries of largest magnitude.

    `a = e + g`, `row = TopK(a)`, `e = a - row` (EFCP, arXiv 2306.06098, algorithm 1, with Top-k in blocks as in the
    authors' later library). Among equal magnitudes the lowest index wins, on every backend.

    Args:
        density: Fraction `k / d` that is kept, in (0, 1]; a block of n entries keeps `ceil(density * n)`.
        block_size: Entries of a block (`B_d`), 1 to 65,536. Never derived from the hardware: results depend on it.
        value_dtype: How kept values are stored: float32, bfloat16, or int8 with one bfloat16 scale for each row and as
            many consecutive blocks as hold 4,096 entries. What rounding takes away stays in the error.

    Raises:
        ValueError: A value outside its range, or a dtype that cannot be stored.
        TypeError: `block_size` is not an int.
    """

    lossless: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True  # in the pass in which it selects
    density: float = 0.01
    block_size: int = 4096
    value_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_fields(self)
        _check_top_k(self.density, self.value_dtype, (torch.float32, torch.bfloat16, torch.int8))
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size must be between 1 and {MAX_BLOCK_SIZE}, got {self.block_size}")

    def window(self, num_grads: int, sums: torch.dtype = torch.float64) -> SparseWindow:
        """The window that stores this compressor's rows.

        Args:
            num_grads: Its capacity `m`.
            sums: Not used: its kernels sum in float64.

        Returns:
            A window with the same blocks.
        """
        return SparseWindow(num_grads, self.density, self.block_size, self.value_dtype)

    def allocate(self, shape: torch.Size, device: torch.device | str, position: int) -> State:
        """Nothing: Top-k has no memory beside the error."""
        return {}

    def compress(self, jobs: Sequence[Job], kernels: Kernels) -> None:
        """`a = error + gradient; row = TopK(a); error = a - row`, in place and in one pass over all of them.

        Args:
            jobs: Of parameters, or of slabs of them.
            kernels: The backend.
        """
        _compress(jobs, kernels)


@dataclass(frozen=True)
class Identity:
    """No compression: rows are the gradients, and there is no error. For the dense baselines."""

    lossless: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False

    def window(self, num_grads: int, sums: torch.dtype = torch.float64) -> DenseWindow:
        """The window that stores the rows.

        Args:
            num_grads: Its capacity `m`.
            sums: Dtype of sums over rows.

        Returns:
            A dense window.
        """
        return DenseWindow(num_grads, sums)

    def allocate(self, shape: torch.Size, device: torch.device | str, position: int) -> State:
        """Nothing."""
        return {}

    def compress(self, jobs: Sequence[Job], kernels: Kernels) -> None:
        """`row = gradient`.

        Args:
            jobs: Of whole parameters.
            kernels: Not used.
        """
        for gradient, _, row, _ in jobs:
            assert gradient is not None  # there is no error that it could be in
            row.copy_(gradient.view(-1))


def _compress(jobs: Sequence[Job], kernels: Kernels) -> None:
    """Top-k of every block of flat accumulators."""
    gradients, errors, rows = [], [], []
    for gradient, error, row, _ in jobs:
        assert gradient is not None  # Top-k accumulates by itself
        assert error is not None  # and is not lossless
        for part in row:
            gradients.append(part.piece.of(gradient.view(-1)))
            errors.append(part.piece.of(error.view(-1)))
            rows.append(part)
    kernels.accumulate_topk(gradients, errors, rows)


def _check_top_k(density: float, value_dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the fraction of entries kept, in (0, 1]; got {density}")
    if value_dtype not in dtypes:
        raise ValueError(f"value_dtype must be one of {', '.join(map(str, dtypes))}, got {value_dtype}")
