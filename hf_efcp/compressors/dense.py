"""No compression, and the window of whole gradients: the dense baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels import Kernels, dtype_of_sums, pool, widest
from .base import Held, Job, State, span_length, stacked

_TILE = 1 << 17  # entries of a window that exist in float64 at a time, on each thread


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


def _products(values: torch.Tensor, x: torch.Tensor, sums: torch.dtype) -> torch.Tensor:
    """Inner products of rows, `(rows, n)`, with a vector: `(rows,)`, in the widest dtype of the device."""
    (rows, numel), wide = values.shape, dtype_of_sums(sums, values.device)
    step = max(1, _TILE // rows)
    partial = torch.zeros(-(-numel // step), rows, dtype=wide, device=values.device)

    def work(index: int, begin: int, end: int) -> None:
        torch.mv(values[:, begin:end].to(wide), x[begin:end].to(wide), out=partial[index])

    pool.run_torch(work, numel, step, values.device)
    return partial.to(widest(values.device)).sum(dim=0)
