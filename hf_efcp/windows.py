"""Windows: ring buffers that hold the last `m` rows of one parameter. They know nothing of damping or learning rates.

A window object holds no data: it says how the plain tensors in `optimizer.state[param]` are laid out and read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .blocks import Piece, cut, index_dtype
from .kernels import Kernels, pool, widest

State = dict[str, torch.Tensor]
# One row of a sparse window, piece by piece: the piece, its indices and its values, both `(blocks, kept)` views.
Row = list[tuple[Piece, torch.Tensor, torch.Tensor]]
# A part of an update: where it goes in the flattened parameter, and its entries in float32.
Slab = tuple[slice, torch.Tensor]

_SLAB = 1 << 20  # entries of an update that exist at a time
_TILE = 1 << 17  # entries of a dense window that exist in float64 at a time, on each thread


class Window(Protocol):
    """What `EFCP` needs of a window. `shape` is the shape of the parameter."""

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for `m` rows of zeros, by their names in the state."""

    def row(self, state: State, shape: torch.Size, position: int) -> Any:
        """Views of the row at a position, for the compressor to write into."""

    def clear(self, state: State, shape: torch.Size, position: int) -> None:
        """Make the row at a position zero."""

    def check(self, state: State, shape: torch.Size, name: str) -> None:
        """Refuse loaded tensors, of the right shapes, whose content cannot be a window."""

    def dots(self, state: State, shape: torch.Size, newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """Inner products of row `newest` with the first `rows` rows: this parameter's part of a Gram column."""

    def project(
        self, state: State, shape: torch.Size, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """Inner products of a dense vector in the parameter's shape with the first `rows` rows."""

    def combine(
        self,
        state: State,
        shape: torch.Size,
        coefficients: torch.Tensor,
        kernels: Kernels,
        *,
        base: torch.Tensor | None = None,
        scale: float = 0.0,
        squared: bool = False,
        start: int = 0,
    ) -> Iterator[Slab]:
        """`scale x + G^T c`, slab by slab: where it goes in the flattened parameter, and its entries in float32.

        With `start`, where an earlier slab ended, only the slabs behind it.
        """


@dataclass(frozen=True)
class SparseWindow:
    """The last `m` Top-k rows of a parameter, as block-relative indices and values.

    Stored block-major, `(blocks, m, kept)`, in two flat tensors (`indices`: uint8 up to blocks of 256, else uint16;
    `values`: `value_dtype`), the tail block behind the full ones: one block of the dense vector stays in the
    first-level cache while all rows of the block stream past it.

    Bytes: `m * sum over blocks of ceil(density * length) * (index + value)`.

    Args:
        num_grads: Capacity `m`.
        density: Fraction kept of each block.
        block_size: Entries of a block.
        value_dtype: How values are stored.
    """

    num_grads: int
    density: float
    block_size: int
    value_dtype: torch.dtype

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for `m` rows of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where; "meta" gives the shapes without the memory.

        Returns:
            `{"indices": ..., "values": ...}`, both of `m * kept` entries.
        """
        entries = self.num_grads * sum(piece.row for piece in self._pieces(shape))
        return {
            "indices": torch.zeros(entries, dtype=index_dtype(self.block_size), device=device),
            "values": torch.zeros(entries, dtype=self.value_dtype, device=device),
        }

    def row(self, state: State, shape: torch.Size, position: int) -> Row:
        """Views of the row at a position, to write into.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.

        Returns:
            The pieces with their indices and values, `(blocks, kept)` each.
        """
        return [
            (piece, indices[:, position], values[:, position]) for piece, indices, values in self._views(state, shape)
        ]

    def clear(self, state: State, shape: torch.Size, position: int) -> None:
        """Make the row at a position zero.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.
        """
        for _, indices, values in self.row(state, shape, position):
            indices.zero_()
            values.zero_()

    def check(self, state: State, shape: torch.Size, name: str) -> None:
        """Refuse loaded tensors whose indices point outside their block: the kernels would follow them.

        Args:
            state: Tensors of the right shapes.
            shape: Shape of the parameter.
            name: What to call the parameter.

        Raises:
            ValueError: An index is as large as its block.
        """
        for piece, indices, _ in self._views(state, shape):
            step = max(1, _SLAB // (self.num_grads * piece.kept))
            for begin in range(0, piece.blocks, step):
                lowest, largest = indices[begin : begin + step].to(torch.int32).aminmax()
                if lowest < 0 or largest >= piece.length:
                    raise ValueError(
                        f"the window of {name} is damaged: it has indices from {int(lowest)} to {int(largest)} in a "
                        f"block of {piece.length} entries. Load another checkpoint"
                    )

    def dots(self, state: State, shape: torch.Size, newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """This parameter's part of the new Gram column, `<row_newest, row_i>` for `i < rows`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            newest: Position of the newest row.
            rows: Number of rows that were ever written.
            kernels: The backend.

        Returns:
            `(rows,)`, float64, on the CPU.
        """
        total = torch.zeros(rows, dtype=torch.float64)
        for piece, indices, values in self._views(state, shape):
            total += kernels.dots(indices, values, newest, rows, piece.length).to("cpu", torch.float64)
        return total

    def project(
        self, state: State, shape: torch.Size, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """`G x`: this parameter's part of the products of a dense vector with the rows.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            dense: `x`, in the parameter's shape, float32, contiguous.
            rows: Number of rows that were ever written.
            kernels: The backend.

        Returns:
            `(rows,)`, float64, on the CPU.
        """
        total = torch.zeros(rows, dtype=torch.float64)
        for piece, indices, values in self._views(state, shape):
            total += kernels.project(indices, values, piece.of(dense.view(-1)), rows).to("cpu", torch.float64)
        return total

    def combine(
        self,
        state: State,
        shape: torch.Size,
        coefficients: torch.Tensor,
        kernels: Kernels,
        *,
        base: torch.Tensor | None = None,
        scale: float = 0.0,
        squared: bool = False,
        start: int = 0,
    ) -> Iterator[Slab]:
        """`scale x + G^T c`, slab by slab, so that no temporary of the parameter's size exists.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            coefficients: `c`, `(rows,)`, float64.
            kernels: The backend.
            base: `x`, in the parameter's shape, float32, contiguous; zero without it.
            scale: Factor of `base`.
            squared: Take the squares of the rows' entries.
            start: Where an earlier slab ended: leave out everything before.

        Yields:
            Where the slab goes in the flattened parameter, and its entries in float32.
        """
        for piece, indices, values in self._views(state, shape):
            step = max(1, _SLAB // piece.length)
            x = None if base is None else piece.of(base.view(-1))
            for begin in range(0, piece.blocks, step):
                end = min(begin + step, piece.blocks)
                first = piece.start + begin * piece.length
                if first < start:
                    continue
                out = torch.empty(end - begin, piece.length, dtype=torch.float32, device=values.device)
                kernels.combine(
                    indices[begin:end],
                    values[begin:end],
                    coefficients,
                    out,
                    base=None if x is None else x[begin:end],
                    scale=scale,
                    squared=squared,
                )
                yield slice(first, first + out.numel()), out.view(-1)

    def _pieces(self, shape: torch.Size) -> tuple[Piece, ...]:
        return cut(shape.numel(), self.block_size, self.density)

    def _views(self, state: State, shape: torch.Size) -> Row:
        """The window piece by piece, `(blocks, m, kept)` each."""
        views = []
        for piece in self._pieces(shape):
            span = slice(self.num_grads * piece.offset, self.num_grads * (piece.offset + piece.row))
            size = (piece.blocks, self.num_grads, piece.kept)
            views.append((piece, state["indices"][span].view(size), state["values"][span].view(size)))
        return views


@dataclass(frozen=True)
class DenseWindow:
    """The last `m` gradients as they are, `(m, numel)` float32: `4 m` bytes per parameter. For the dense baselines.

    Args:
        num_grads: Capacity `m`.
    """

    num_grads: int

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """A tensor for `m` rows of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where; "meta" gives the shape without the memory.

        Returns:
            `{"values": ...}`, `(m, numel)`.
        """
        return {"values": torch.zeros(self.num_grads, shape.numel(), dtype=torch.float32, device=device)}

    def row(self, state: State, shape: torch.Size, position: int) -> torch.Tensor:
        """View of the row at a position, to write into.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.

        Returns:
            `(numel,)`.
        """
        return state["values"][position]

    def clear(self, state: State, shape: torch.Size, position: int) -> None:
        """Make the row at a position zero.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.
        """
        state["values"][position].zero_()

    def check(self, state: State, shape: torch.Size, name: str) -> None:
        """Nothing to check: every content of the right shape is a window.

        Args:
            state: Tensors of the right shapes.
            shape: Shape of the parameter.
            name: What to call the parameter.
        """

    def dots(self, state: State, shape: torch.Size, newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """This parameter's part of the new Gram column, as in `SparseWindow.dots`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            newest: Position of the newest row.
            rows: Number of rows that were ever written.
            kernels: Not used.

        Returns:
            `(rows,)`, float64, on the CPU.
        """
        return self.project(state, shape, state["values"][newest], rows, kernels)

    def project(
        self, state: State, shape: torch.Size, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """`G x`, as in `SparseWindow.project`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            dense: `x`, float32, contiguous.
            rows: Number of rows that were ever written.
            kernels: Not used.

        Returns:
            `(rows,)`, float64, on the CPU.
        """
        values, x = state["values"][:rows], dense.view(-1)
        wide, step = widest(values.device), max(1, _TILE // rows)
        partial = torch.zeros(-(-shape.numel() // step), rows, dtype=wide, device=values.device)

        def work(index: int, begin: int, end: int) -> None:
            torch.mv(values[:, begin:end].to(wide), x[begin:end].to(wide), out=partial[index])

        pool.run_torch(work, shape.numel(), step, values.device)
        return partial.sum(dim=0).to("cpu", torch.float64)

    def combine(
        self,
        state: State,
        shape: torch.Size,
        coefficients: torch.Tensor,
        kernels: Kernels,
        *,
        base: torch.Tensor | None = None,
        scale: float = 0.0,
        squared: bool = False,
        start: int = 0,
    ) -> Iterator[Slab]:
        """`scale x + G^T c`, slab by slab, as in `SparseWindow.combine`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            coefficients: `c`, `(rows,)`, float64.
            kernels: Not used.
            base: `x`, in the parameter's shape, float32, contiguous; zero without it.
            scale: Factor of `base`.
            squared: Take the squares of the rows' entries.
            start: Where an earlier slab ended: leave out everything before.

        Yields:
            Where the slab goes in the flattened parameter, and its entries in float32.
        """
        values = state["values"][: coefficients.shape[0]]
        wide, step = widest(values.device), max(1, _TILE // coefficients.shape[0])
        c = coefficients.to(values.device, wide)
        x = None if base is None else base.view(-1)
        for first in range(start, shape.numel(), _SLAB):
            span = slice(first, min(first + _SLAB, shape.numel()))
            out = torch.empty(span.stop - span.start, dtype=torch.float32, device=values.device)

            def work(index: int, begin: int, end: int, first: int = first, out: torch.Tensor = out) -> None:
                rows = values[:, first + begin : first + end].to(wide)
                total = c @ (rows * rows if squared else rows)
                if x is not None:
                    total += scale * x[first + begin : first + end].to(wide)
                out[begin:end] = total

            pool.run_torch(work, out.numel(), step, values.device)
            yield span, out
