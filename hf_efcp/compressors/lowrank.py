"""Low-rank rows: each matrix-shaped parameter becomes `P Q^T`, and the window stores the factors, never a dense row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..checks import check_fields
from ..kernels import Kernels, dtype_of_sums, pool, widest
from ..threads import one_thread
from .base import Held, Job, State, span_length, stacked
from .dense import DenseWindow
from .matrices import cuts, inner, matrix, tiles

# A row of a window: views of `P^T` and `Q^T`, or of the flat row of a parameter that is kept whole.
Row = tuple[torch.Tensor, torch.Tensor] | torch.Tensor

# Sizes of the pieces that threads work on. They decide how sums are cut, and so must not depend on the machine.
_TILE = 1 << 17  # entries of a matrix that a thread compresses at a time
_FACTORS = 2048  # vectors of P^T or Q^T that exist in the dtype of sums at a time
_TILE_FACTORS = 256  # the same, of a thread in `dots`


@dataclass(frozen=True)
class LowRank:
    """Rank-`rho` approximation of each matrix by one warm-started power iteration (PowerSGD, arXiv 1905.13727).

    For a parameter of shape `(rows, cols)`, or of more dimensions as `(shape[0], all others)`:

        A = error + gradient
        P = orth(A Q)               Q is the one of the step before
        Q = A^T P                   P Q^T is the best approximation of A with columns in the span of P
        row = P Q^T, error = A - row, both with P and Q as stored

    `orth` is a Householder QR: P is orthonormal whatever the rank of A. A column of Q that comes out as zero is not
    started from again: the vector of the step before stays, so that a zero accumulator changes nothing. The first
    vectors are random, from the seed and the position of the parameter.

    Scalars, vectors, and matrices where `rank * (rows + cols) >= rows * cols`, for which factors would be no smaller,
    are kept whole, in `value_dtype`; so is every matrix of which `rank` is the full rank. A shard of a parameter is a
    matrix of its own.

    Args:
        rank: `rho`, at least 1.
        value_dtype: How factors and whole rows are stored, float32 or bfloat16. What rounding takes away stays in the
            error.
        seed: Of the first vectors, at least 0.

    Raises:
        ValueError: A value outside its range, or a dtype that cannot be stored.
        TypeError: `rank` or `seed` is not an int.
    """

    lossless: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    rank: int = 4
    value_dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.value_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"value_dtype must be torch.float32 or torch.bfloat16, got {self.value_dtype}")

    def window(self, num_grads: int, sums: torch.dtype = torch.float64) -> LowRankWindow:
        """The window that stores this compressor's rows.

        Args:
            num_grads: Its capacity `m`.
            sums: Dtype of sums over rows.

        Returns:
            A window of factors of the same rank.
        """
        return LowRankWindow(num_grads, self.rank, self.value_dtype, sums)

    def allocate(self, shape: torch.Size, device: torch.device | str, position: int) -> State:
        """The vectors that the first power iteration starts from.

        Args:
            shape: Shape of the parameter.
            device: Where; "meta" gives the shape without the memory.
            position: Position of the parameter among all.

        Returns:
            `{"start": ...}`, `Q^T` of shape `(rank, cols)`, float32; nothing for a parameter that is kept whole.
        """
        size = matrix(shape, self.rank)
        if size is None:
            return {}
        if torch.device(device).type == "meta":
            return {"start": torch.empty(self.rank, size[1], dtype=torch.float32, device=device)}
        start = np.random.default_rng((self.seed, position)).standard_normal((self.rank, size[1]), dtype=np.float32)
        return {"start": torch.from_numpy(start).to(device)}

    def compress(self, jobs: Sequence[Job], kernels: Kernels) -> None:
        """`row = P Q^T; error = a - row`, in place; see the class for P and Q. Threads share the jobs.

        Args:
            jobs: Whole parameters, their accumulators as errors; "start" of their states is updated.
            kernels: Not used.
        """

        def work(index: int, begin: int, end: int) -> None:
            _, error, row, state = jobs[index]
            assert error is not None  # low rank is not lossless
            self._compress(error, row, state)

        if jobs:
            device = next(error.device for _, error, *_ in jobs if error is not None)
            pool.run_torch(work, len(jobs), 1, device)

    def _compress(self, error: torch.Tensor, row: Row, state: State) -> None:
        """Threads share the tiles of the matrix's rows; sums over tiles are added in their order."""
        if isinstance(row, torch.Tensor):
            row.copy_(error.view(-1))
            error.view(-1).sub_(row)
            return
        left, right = row
        A, start = error.view(left.shape[1], right.shape[1]), state["start"]
        # Of equal lengths: only directions count, and products of two small numbers would vanish.
        Q = (start / start.abs().amax(dim=1, keepdim=True)).T.contiguous()
        step = max(1, _TILE // A.shape[1])
        image = torch.empty(len(A), len(start), dtype=torch.float32, device=A.device)

        def sketch(index: int, begin: int, end: int) -> None:
            torch.mm(A[begin:end], Q, out=image[begin:end])

        pool.run_torch(sketch, len(A), step, A.device)
        with one_thread():
            basis = torch.linalg.qr(image).Q
        height, width = tiles(len(A), A.shape[1], len(start), _TILE)
        heights, widths = cuts(len(A), height), cuts(A.shape[1], width)
        parts = torch.empty(len(heights), *start.shape, dtype=torch.float32, device=A.device)

        def project(index: int, begin: int, end: int) -> None:
            place, some = divmod(index, len(widths))
            rows, columns = heights[place], widths[some]
            torch.mm(basis[rows].T, A[rows, columns], out=parts[place, :, columns])

        pool.run_torch(project, len(heights) * len(widths), 1, A.device)
        projection = parts.sum(dim=0)
        left.copy_(basis.T)
        right.copy_(projection)
        P, Q = left.to(torch.float32).T, right.to(torch.float32)

        def subtract(index: int, begin: int, end: int) -> None:
            A[begin:end].addmm_(P[begin:end], Q, alpha=-1.0)

        pool.run_torch(subtract, len(A), step, A.device)
        start.copy_(torch.where(projection.any(dim=1, keepdim=True), projection, start))


@dataclass(frozen=True)
class LowRankWindow:
    """The last `m` rows of a parameter as factors `P_i Q_i^T`; of one that is kept whole, as they are.

    Stored transposed, so that all factors of a side are one matrix: "left" `(m, rank, rows)` and "right"
    `(m, rank, cols)`, or "values" `(m, numel)`. Inner products and combinations are products of these matrices,

        <P_i Q_i^T, P_j Q_j^T> = sum((P_i^T P_j) * (Q_i^T Q_j)),    G^T c = [c_1 P_1 ... c_m P_m] [Q_1 ... Q_m]^T,

    taken in pieces of a few megabytes, and in float64 unless dampening keeps rows from cancelling.

    Bytes: `m * rank * (rows + cols) * value`, or `m * numel * value`.

    Args:
        num_grads: Capacity `m`.
        rank: Rank of a row.
        value_dtype: How factors and whole rows are stored.
        sums: Dtype of the sums of `project`, as in `DenseWindow`.
    """

    num_grads: int
    rank: int
    value_dtype: torch.dtype
    sums: torch.dtype = torch.float64

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for `m` rows of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where; "meta" gives the shapes without the memory.

        Returns:
            `{"left": ..., "right": ...}`, or `{"values": ...}` for a parameter that is kept whole.
        """
        size = matrix(shape, self.rank)
        if size is None:
            whole = torch.zeros(self.num_grads, shape.numel(), dtype=self.value_dtype, device=device)
            return {"values": whole}
        return {
            name: torch.zeros(self.num_grads, self.rank, side, dtype=self.value_dtype, device=device)
            for name, side in zip(("left", "right"), size, strict=True)
        }

    def row(self, state: State, shape: torch.Size, position: int) -> Row:
        """Views of the row at a position, to write into.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            position: Row, 0 to `m - 1`.

        Returns:
            `P^T` `(rank, rows)` and `Q^T` `(rank, cols)`, or the flat row of a parameter that is kept whole.
        """
        if "values" in state:
            return state["values"][position]
        return state["left"][position], state["right"][position]

    def slabs(self, row: Row, shape: torch.Size) -> Iterator[tuple[slice, Row]]:
        """The row in one: a matrix is not factored in parts.

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
        row = self.row(state, shape, position)
        for part in (row,) if isinstance(row, torch.Tensor) else row:
            part.zero_()

    def check(self, state: State, shape: torch.Size, name: str) -> None:
        """Nothing to check: every content of the right shapes is a window.

        Args:
            state: Tensors of the right shapes.
            shape: Shape of the parameter.
            name: What to call the parameter.
        """

    def dots(self, held: Sequence[Held], newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        """Each parameter's part of the new Gram column, `<row_newest, row_i>` for `i < rows`.

        Args:
            held: Tensors and shape of each parameter.
            newest: Position of the newest row.
            rows: Number of rows that were ever written.
            kernels: Not used.

        Returns:
            `(parameters, rows)`, in the widest dtype of the device.
        """
        columns: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(held)

        def work(index: int, begin: int, end: int) -> None:
            columns[index] = self._dots(*held[index], newest, rows, kernels)

        if held:
            pool.run_torch(work, len(held), 1, next(iter(held[0][0].values())).device)
        return stacked(columns, rows)

    def _dots(self, state: State, shape: torch.Size, newest: int, rows: int, kernels: Kernels) -> torch.Tensor:
        if "values" in state:
            return self._whole.dots([(state, shape)], newest, rows, kernels)[0]
        sides = state["left"], state["right"]
        wide = widest(sides[0].device)
        total = torch.empty(rows, dtype=wide, device=sides[0].device)

        def work(index: int, begin: int, end: int) -> None:
            P, Q = (inner(side[begin:end].flatten(0, 1), side[newest], wide) for side in sides)
            total[begin:end] = (P * Q).view(end - begin, -1).sum(dim=1)

        pool.run_torch(work, rows, max(1, _TILE_FACTORS // self.rank), total.device)
        return total

    def spans(self, shape: torch.Size, device: torch.device) -> list[slice]:
        """Cuts between the rows of a matrix.

        Args:
            shape: Shape of the parameter.
            device: Where the parameter is.

        Returns:
            The spans, in order.
        """
        size = matrix(shape, self.rank)
        if size is None:
            return self._whole.spans(shape, device)
        height, width = size
        some = cuts(height, max(1, span_length(device) // width))
        return [slice(rows.start * width, rows.stop * width) for rows in some]

    def project(
        self, state: State, shape: torch.Size, span: slice, dense: torch.Tensor, rows: int, kernels: Kernels
    ) -> torch.Tensor:
        """`G x` for an `x` that is zero outside a span: its part of the products with the rows.

        `<P Q^T, X> = sum((P^T X) * Q^T)`.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            span: One of `spans`.
            dense: The span of `x`, `(n,)`, float32, contiguous.
            rows: Number of rows that were ever written.
            kernels: Not used.

        Returns:
            `(rows,)`, in the widest dtype of the device.
        """
        if "values" in state:
            return self._whole.project(state, shape, span, dense, rows, kernels)
        P, Q = self._factors(state, span, rows)
        X, wide = dense.view(-1, Q.shape[1]), dtype_of_sums(self.sums, P.device)
        total = torch.zeros(len(P), dtype=wide, device=P.device)
        for some in cuts(len(P), _FACTORS):
            image = P[some].to(wide) @ X.to(wide)
            total[some] = (image * Q[some]).sum(dim=1)
        return total.view(rows, -1).to(widest(P.device)).sum(dim=1)

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
            coefficients: `c`, `(rows,)`, where the window is. float32 has the sums taken in it.
            kernels: Not used.
            base: The span of `x`, `(n,)`, float32, contiguous; zero without it.
            scale: Factor of `base`.
            squared: Refused.

        Returns:
            `(n,)`, float32.

        Raises:
            TypeError: `squared` is asked for: the squares of a low-rank row are not of low rank.
        """
        if squared:
            raise TypeError(
                "low-rank rows cannot be squared entry by entry, as diagonal rules need them: use TopK or Identity as "
                "the compressor, or MFAC or GGT as the preconditioner"
            )
        if "values" in state:
            return self._whole.combine(state, shape, span, coefficients, kernels, base=base, scale=scale)
        P, Q = self._factors(state, span, len(coefficients))
        c, wide = coefficients.repeat_interleave(self.rank)[:, None], coefficients.dtype
        total = torch.zeros(P.shape[1], Q.shape[1], dtype=wide, device=P.device)
        if base is not None:
            torch.mul(base.view(total.shape), scale, out=total)
        for some in cuts(len(P), _FACTORS):
            total.addmm_((c[some] * P[some]).T, Q[some].to(wide))
        return total.to(torch.float32).view(-1)

    def _factors(self, state: State, span: slice, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All written vectors of `P^T`, in the rows of a span, and all of `Q^T`."""
        left, right = (state[name][:rows].flatten(0, 1) for name in ("left", "right"))
        return left[:, span.start // right.shape[1] : span.stop // right.shape[1]], right

    @property
    def _whole(self) -> DenseWindow:
        """Reads the rows of a parameter that is kept whole."""
        return DenseWindow(self.num_grads, self.sums)
