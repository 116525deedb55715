"""Windows: ring buffers that hold the last `m` rows of one parameter. They know nothing of damping or learning rates.

A window object holds no data: it says how the plain tensors in `optimizer.state[param]` are laid out and read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, lcm
from typing import Any, Protocol

import torch

from .blocks import Part, Piece, as_indices, cut, index_dtype, sharing
from .kernels import BUCKET, Kernels, dtype_of_sums, pool, widest

State = dict[str, torch.Tensor]

Row = list[Part]  # of a sparse window
Held = tuple[State, torch.Size]  # what a window holds for a parameter, and the parameter's shape

_SLAB = 1 << 20  # entries of a row that are compressed at a time
_SPAN = 1 << 18  # entries of an update that a thread makes at a time; a GPU takes more, each call costs it as much
_SPAN_OF_DEVICES = 1 << 24
_TILE = 1 << 17  # entries of a dense window that exist in float64 at a time, on each thread


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


@dataclass(frozen=True)
class SparseWindow:
    """The last `m` Top-k rows of a parameter, as block-relative indices and values.

    Stored block-major, `(blocks, m, kept)`, in two flat tensors (`indices`: as bytes, one of each up to blocks of 256,
    else two, see `as_indices`; `values`: `value_dtype`), the tail block behind the full ones: one block of the dense
    vector stays in the first-level cache while all rows of the block stream past it.

    With int8, `values` are levels, -127 to 127, and a third tensor has the `scales`, `(groups, m)` in bfloat16: one for
    each row and group of consecutive blocks that together hold up to 4,096 entries. The tail is a group of its own.

    Bytes: `m * sum over blocks of ceil(density * length) * (index + value)`, and `2 * m * groups` for the scales.

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
            `{"indices": ..., "values": ...}`, both of `m * kept` entries, and for int8 the `"scales"`.
        """
        entries = self.num_grads * sum(piece.row for piece in self._pieces(shape))
        size = index_dtype(self.block_size).itemsize
        state = {
            "indices": torch.zeros(size * entries, dtype=torch.uint8, device=device),
            "values": torch.zeros(entries, dtype=self.value_dtype, device=device),
        }
        if self.value_dtype == torch.int8:
            groups = self.num_grads * sum(piece.groups for piece in self._pieces(shape))
            state["scales"] = torch.zeros(groups, dtype=torch.bfloat16, device=device)
        return state

    def row(self, state: State, shape: torch.Size, position: int) -> Row:
        """Views of the row at a position, to write into.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.

        Returns:
            The pieces with their indices and values, `(blocks, kept)` each, and their scales.
        """
        return [
            Part(piece, indices[:, position], values[:, position], None if scales is None else scales[:, position])
            for piece, indices, values, scales in self.parts(state, shape)
        ]

    def parts(self, state: State, shape: torch.Size) -> Row:
        """The window piece by piece.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.

        Returns:
            Views, `(blocks, m, kept)` each.
        """
        m, groups = self.num_grads, 0
        indices, values, scales = as_indices(state["indices"], self.block_size), state["values"], state.get("scales")
        views = []
        for piece in self._pieces(shape):
            # One call where slicing and viewing are two: a model has a hundred tensors, and three such calls for each.
            place = (piece.blocks, m, piece.kept), (m * piece.kept, piece.kept, 1), m * piece.offset
            shared = None
            if scales is not None:
                shared = scales.as_strided((piece.groups, m), (m, 1), scales.storage_offset() + m * groups)
            views.append(
                Part(
                    piece,
                    indices.as_strided(*place[:2], indices.storage_offset() + place[2]),
                    values.as_strided(*place[:2], values.storage_offset() + place[2]),
                    shared,
                )
            )
            groups += piece.groups
        return views

    def slabs(self, row: Row, shape: torch.Size) -> Iterator[tuple[slice, Row]]:
        """Parts of a row, cut between groups of blocks and between buckets of a quantised error.

        Args:
            row: What `row` returned.
            shape: Shape of the parameter.

        Yields:
            Where the slab is in the flattened parameter, and its part of the row. Pieces start where they do in the
            slab.
        """
        for first in row[:1]:
            length, blocks = first.piece.length, first.piece.blocks
            unit = lcm(sharing(length), BUCKET // gcd(length, BUCKET))
            step = max(1, _SLAB // (unit * length)) * unit
            for begin in range(0, blocks, step):
                end = min(begin + step, blocks)
                slab = [first.blocks(begin, end)]
                if end == blocks:  # and the tail
                    slab += [part.blocks(0, 1, (end - begin) * length) for part in row[1:]]
                start = begin * length
                yield slice(start, start + sum(part.piece.numel for part in slab)), slab

    def clear(self, state: State, shape: torch.Size, position: int) -> None:
        """Make the row at a position zero.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.
        """
        for _, *tensors in self.row(state, shape, position):
            for tensor in tensors:
                if tensor is not None:
                    tensor.zero_()

    def check(self, state: State, shape: torch.Size, name: str) -> None:
        """Refuse loaded tensors whose indices point outside their block: the kernels would follow them.

        Also scales that no row has: each of them spoils thousands of entries.

        Args:
            state: Tensors of the right shapes.
            shape: Shape of the parameter.
            name: What to call the parameter.

        Raises:
            ValueError: An index is as large as its block, or a scale is negative or not finite.
        """
        for piece, indices, _, scales in self.parts(state, shape):
            if scales is not None and not bool((torch.isfinite(scales) & (scales >= 0)).all()):
                raise ValueError(
                    f"the window of {name} is damaged: it has scales that are negative, NaN or infinite. Load another "
                    "checkpoint"
                )
            step = max(1, _SLAB // (self.num_grads * piece.kept))
            for begin in range(0, piece.blocks, step):
                lowest, largest = indices[begin : begin + step].to(torch.int32).aminmax()
                if lowest < 0 or largest >= piece.length:
                    raise ValueError(
                        f"the window of {name} is damaged: it has indices from {int(lowest)} to {int(largest)} in a "
                        f"block of {piece.length} entries. Load another checkpoint"
                    )

    def dots(self, held: Sequence[Held], newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """Each parameter's part of the new Gram column, `<row_newest, row_i>` for `i < rows`.

        Args:
            held: Tensors and shape of each parameter.
            newest: Position of the newest row.
            rows: Number of rows that were ever written.
            kernels: The backend.

        Returns:
            `(parameters, rows)`, in the widest dtype of the device.
        """
        parts = [self.parts(state, shape) for state, shape in held]
        columns = kernels.dots([part for own in parts for part in own], newest, rows)
        if all(len(own) == 1 for own in parts):
            return columns
        return stacked([some.sum(dim=0) for some in torch.split(columns, [len(own) for own in parts])], rows)

    def spans(self, shape: torch.Size, device: torch.device) -> list[slice]:
        """Cuts between groups of blocks that share scales; the tail is with the last of them.

        Args:
            shape: Shape of the parameter.
            device: Where the parameter is.

        Returns:
            The spans, in order.
        """
        pieces = self._pieces(shape)
        if not pieces:
            return []
        share = sharing(pieces[0].length)
        step = max(1, span_length(device) // (share * pieces[0].length)) * share * pieces[0].length
        starts = list(range(0, pieces[0].numel, step))
        return [slice(*edges) for edges in pairwise([*starts, shape.numel()])]

    def project(
        self, state: State, shape: torch.Size, span: slice, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """`G x` for an `x` that is zero outside a span: its part of the products with the rows.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of `spans`.
            dense: The span of `x`, `(n,)`, float32, contiguous.
            rows: Number of rows that were ever written.
            kernels: The backend.

        Returns:
            `(rows,)`, in the widest dtype of the device.
        """
        total = torch.zeros(rows, dtype=widest(dense.device), device=dense.device)
        for piece, indices, values, scales in self._within(state, shape, span):
            total += kernels.project(indices, values, piece.of(dense), rows, scales)
        return total

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
        """`scale x + G^T c` in a span, so that no temporary of the parameter's size exists.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of `spans`.
            coefficients: `c`, `(rows,)`, where the window is; sums are in the widest dtype.
            kernels: The backend.
            base: The span of `x`, `(n,)`, float32, contiguous; zero without it.
            scale: Factor of `base`.
            squared: Take the squares of the rows' entries.

        Returns:
            `(n,)`, float32.
        """
        update = torch.empty(span.stop - span.start, dtype=torch.float32, device=state["values"].device)
        wide = coefficients.to(widest(update.device))
        for piece, indices, values, scales in self._within(state, shape, span):
            x = None if base is None else piece.of(base)
            kernels.combine(
                indices,
                values,
                wide,
                piece.of(update),
                scales=scales,
                base=x,
                scale=scale,
                squared=squared,
            )
        return update

    def _within(self, state: State, shape: torch.Size, span: slice) -> Row:
        """The parts of the window in a span; pieces start where they do in the span."""
        found = []
        for part in self.parts(state, shape):
            first, last = part.piece.start, part.piece.start + part.piece.numel
            begin, end = max(first, span.start), min(last, span.stop)
            if begin < end:
                length = part.piece.length
                found.append(part.blocks((begin - first) // length, (end - first) // length, begin - span.start))
        return found

    def _pieces(self, shape: torch.Size) -> tuple[Piece, ...]:
        return cut(shape.numel(), self.block_size, self.density)


@dataclass(frozen=True)
class DenseWindow:
    """The last `m` gradients as they are, `(m, numel)` float32: `4 m` bytes per parameter. For the dense baselines.

    Args:
        num_grads: Capacity `m`.
        sums: Dtype of the sums of `project`: float64, or float32 where dampening keeps rows from cancelling.
    """

    num_grads: int
    sums: torch.dtype = torch.float64

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

    def slabs(self, row: torch.Tensor, shape: torch.Size) -> Iterator[tuple[slice, torch.Tensor]]:
        """The row in one: nothing of its size is made to compress it.

        Args:
            row: What `row` returned.
            shape: Shape of the parameter.

        Yields:
            All of the parameter, and the row.
        """
        yield slice(0, shape.numel()), row

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

    def dots(self, held: Sequence[Held], newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """Each parameter's part of the new Gram column, as in `SparseWindow.dots`.

        Args:
            held: Tensors and shape of each parameter.
            newest: Position of the newest row.
            rows: Number of rows that were ever written.
            kernels: Not used.

        Returns:
            `(parameters, rows)`, in the widest dtype of the device.
        """
        return stacked(
            [_products(state["values"][:rows], state["values"][newest], torch.float64) for state, _ in held], rows
        )

    def spans(self, shape: torch.Size, device: torch.device) -> list[slice]:
        """Cuts anywhere.

        Args:
            shape: Shape of the parameter.
            device: Where the parameter is.

        Returns:
            The spans, in order.
        """
        step = span_length(device)
        return [slice(start, min(start + step, shape.numel())) for start in range(0, shape.numel(), step)]

    def project(
        self, state: State, shape: torch.Size, span: slice, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """`G x`, as in `SparseWindow.project`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of `spans`.
            dense: The span of `x`, float32, contiguous.
            rows: Number of rows that were ever written.
            kernels: Not used.

        Returns:
            `(rows,)`, in the widest dtype of the device.
        """
        return _products(state["values"][:rows, span], dense, self.sums)

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
        """`scale x + G^T c` in a span, as in `SparseWindow.combine`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of `spans`.
            coefficients: `c`, `(rows,)`, where the window is. float32 has the sums taken in it.
            kernels: Not used.
            base: The span of `x`, float32, contiguous; zero without it.
            scale: Factor of `base`.
            squared: Take the squares of the rows' entries.

        Returns:
            `(n,)`, float32.
        """
        values = state["values"][: len(coefficients), span]
        c, wide = coefficients, coefficients.dtype
        out = torch.empty(values.shape[1], dtype=torch.float32, device=values.device)

        def work(index: int, begin: int, end: int) -> None:
            rows = values[:, begin:end].to(wide)
            total = c @ (rows * rows if squared else rows)
            if base is not None:
                total += scale * base[begin:end].to(wide)
            out[begin:end] = total

        pool.run_torch(work, len(out), max(1, _TILE // len(c)), values.device)
        return out


def span_length(device: torch.device) -> int:
    """Entries of a span on a device."""
    return _SPAN if device.type == "cpu" else _SPAN_OF_DEVICES


def _products(values: torch.Tensor, x: torch.Tensor, sums: torch.dtype) -> torch.Tensor:
    """Inner products of rows, `(rows, n)`, with a vector: `(rows,)`, in the widest dtype of the device."""
    (rows, numel), wide = values.shape, dtype_of_sums(sums, values.device)
    step = max(1, _TILE // rows)
    partial = torch.zeros(-(-numel // step), rows, dtype=wide, device=values.device)

    def work(index: int, begin: int, end: int) -> None:
        torch.mv(values[:, begin:end].to(wide), x[begin:end].to(wide), out=partial[index])

    pool.run_torch(work, numel, step, values.device)
    return partial.to(widest(values.device)).sum(dim=0)


def stacked(columns: list[torch.Tensor], rows: int) -> torch.Tensor:
    """Columns of a Gram matrix, one for each parameter.

    Args:
        columns: `(rows,)` each; there may be none.
        rows: Their length.

    Returns:
        `(parameters, rows)`.
    """
    return torch.stack(columns) if columns else torch.zeros(0, rows, dtype=torch.float64, device="cpu")
