"""Block-wise Top-k, and the window of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, lcm
from typing import ClassVar

import torch

from ..blocks import MAX_BLOCK_SIZE, Part, Piece, as_indices, cut, index_dtype, sharing
from ..checks import check_fields
from ..kernels import BUCKET, Kernels, widest
from .base import Held, Job, State, span_length, stacked

Row = list[Part]

_SLAB = 1 << 20  # entries of a row that are compressed at a time


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
