"""A model as the kernels see it: a row for each tensor, the launches of a step, and the memory that they share.

The table of rows stays on the device. From step to step counters, addresses and hyperparameters change, and a kernel
writes into it what follows from them. What tensors are cut into depends on shapes only, and is kept as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...metric import CHANNELS, FIRST_CHANNEL, SECOND_CHANNEL
from .. import BUCKET
from . import (
    advance,
    columns,
    cuts,
    error,
    factors,
    means,
    moments,
    move,
    orthonormal,
    outside,
    shared,
    sketch,
    solve,
    sparse,
    topk,
)
from .changing import Changing
from .cuts import ROWS, SPLIT, SQUARES, TILE
from .launch import launch, padded, upload
from .rows import Row, Settings, Sums

_PANEL = 1024  # rows of a tile over which one program adds products
_INNER = 32  # vectors of the window that are multiplied at a time
_FACTORS = 1024  # entries of a factor
_SUMS = 2048  # float64 that a program adds at a time
_CHUNK = 128  # entries of a block or a row that one warp takes
_PROGRAMS = 4096  # that have sums of their own
_ADVANCED = 128  # rows of the table that a program brings to the next step
_SQUARED = 16  # rows of a tile whose squares are added at a time
_LINES = 16  # whose sums a program adds at a time
# Three products of TF32, on units for matrices, are about as exact as one of float32. AMD's have no such mode.
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
_LANES = 64 if torch.version.hip else 32  # threads of a warp
_THREADS = 1024  # of a program, at most


@dataclass
class Model:
    """The launches over all tensors of a model.

    Args:
        device: Where they are.
    """

    device: torch.device
    _plans: dict[Any, torch.Tensor] = field(default_factory=dict)
    _shapes: Any = None
    table: torch.Tensor = field(init=False)
    numbers: torch.Tensor = field(init=False)
    units: int = field(init=False)
    even: bool = field(init=False)
    squares: int = field(init=False)  # entries of the memory for sums of squares

    def begin(self, rows: Sequence[Row], units: int) -> None:
        """Take the tensors of this step and those that follow.

        Args:
            rows: In an order that is the same in every step, those of a unit together.
            units: How many units there are; one may have no rows.
        """
        names = ("numel", "height", "width", "blocks", "kept", "unit", "begin", "second_width")
        self.units, self.squares = units, cuts.place_squares(rows)
        shapes: Any = units, tuple(tuple(row.places.get(name, 0) for name in names) for row in rows)
        if shapes != self._shapes:
            self._plans, self._shapes = {}, shapes
            self.even = all(row.places.get("width", 0) % BUCKET == 0 for row in rows)
        integers = np.array([row.integers() for row in rows], np.int64)
        numbers = np.array([[row.numbers.get(name, 0.0) for name in shared.NUMBERS] for row in rows], np.float32)
        self.table = upload(integers.ravel(), self.device)
        self.numbers = upload(numbers.ravel(), self.device)

    def advance(self, told: torch.Tensor, changing: Changing, settings: Settings) -> None:
        """Bring the table to the step that the counters stand at.

        Args:
            told: Counters, position and group of each row, `(rows, 4)`.
            changing: Counters, addresses and hyperparameters.
            settings: What is compiled.
        """
        count = len(told)
        launch(
            advance.advance,
            (-(-count // _ADVANCED),),
            *(self.table, self.numbers, told, count, changing.counters, changing.addresses, changing.hyper),
            settings.capacity,
            METRIC=settings.metric != shared.NONE.value,
            CHANNELS=CHANNELS,
            SECOND_CHANNEL=SECOND_CHANNEL,
            FIRST_CHANNEL=FIRST_CHANNEL,
            LENGTH=_ADVANCED,
        )

    def observe(self, rows: Sequence[Row], settings: Settings) -> None:
        """Take the gradients into the second moments.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
        """
        given, betas = (self.table, self.numbers), (settings.beta2, 1.0 - settings.beta2, 1.0 - settings.beta1)
        constants = {"MOMENT": settings.moment, "METRIC": settings.metric, "COUPLED": settings.coupled, "ROWS": ROWS}
        moment = settings.moment != shared.NONE.value
        tasks = self._plan("observed", lambda: cuts.buckets(rows, factored=moment))
        if not self.squares:
            launch(moments.observe, (len(tasks),), *given, tasks, 0, *betas, **constants)
            return
        sums = torch.empty(self.squares, dtype=torch.float64, device=self.device)
        cut = {"PANEL": SQUARES[0], "COLS": SQUARES[1]}
        tiles = self._plan("squares", lambda: cuts.tiles(cuts.factored(rows), *SQUARES))
        launch(
            means.observe_factored,
            (len(tiles) + len(tasks),),
            *(*given, tiles, len(tiles), sums, tasks, *betas),
            **{**constants, **cut, "SQUARED": _SQUARED},
        )
        tasks = self._plan("runs", lambda: cuts.runs(rows))
        launch(means.keep_means, (len(tasks),), *given, tasks, sums, *betas[:2], **cut, LENGTH=_FACTORS)

    def push_low_rank(self, rows: Sequence[Row], settings: Settings) -> None:
        """One power iteration of every matrix: the newest rows of the windows, and the errors.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
        """
        rank, eps = settings.rank, settings.eps
        sizes = [(row.places["height"], row.places["width"]) for row in rows]
        matrices = [number for number, (height, _) in enumerate(sizes) if height]
        vectors = self._plan("vectors", lambda: np.array([(i, k) for i in matrices for k in range(rank)], np.int64))
        scratch = torch.empty(
            sum(cuts.scratch_size(*size, rank) for size in sizes), dtype=torch.float32, device=self.device
        )
        common = {"RANK": rank, "PADDED": padded(rank, 16), "ROWS": TILE[0], "COLS": TILE[1], **settings.reading}
        common |= {"EVEN": self.even, "PRECISION": _PRECISION}
        bands = self._plan("bands", lambda: cuts.cut([height for height, _ in sizes], TILE[0]))
        given = self.table, self.numbers
        launch(sketch.sketch, (len(bands),), *given, bands, scratch, eps, **common)
        which = self._plan("matrices", lambda: np.array(matrices, np.int64))
        many = {"RANK": rank, "PADDED": padded(rank), "ROWS": max(16, 4096 // padded(rank))}
        launch(orthonormal.orthonormalise, (len(which),), self.table, which, scratch, **many, warps=8)
        splits = self._plan("splits", lambda: cuts.splits(sizes))
        launch(
            factors.project,
            (len(splits),),
            *given,
            splits,
            scratch,
            eps,
            **{**common, "ROWS": TILE[0] // 2},
            SPLIT=SPLIT,
        )
        kept = {"RANK": rank, "VALUES_IN": settings.values}
        launch(factors.keep_factors, (len(vectors),), self.table, vectors, scratch, **kept, LENGTH=_FACTORS)
        buckets = self._plan("buckets", lambda: cuts.buckets(rows))
        kept |= {"EVEN": self.even, "ROWS": ROWS}
        launch(error.keep_error, (len(buckets),), *given, buckets, eps, **kept, **settings.reading)

    def push_top_k(self, rows: Sequence[Row], settings: Settings) -> None:
        """Top-k of every block: the newest rows of the windows, and the errors.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
        """
        groups = [-(-row.places["blocks"] // row.places["height"]) for row in rows]
        tasks = self._plan("groups", lambda: cuts.cut(groups, 1))
        # A group of short blocks is one tile; its sides are powers of two, of the largest, so that one launch does all.
        share = padded(max(row.places["height"] for row in rows))
        length = padded(max(row.places["width"] for row in rows), BUCKET)
        # What a warp can keep in registers: with errors in float32 less, by the compiler's report for sm_80.
        entries = 256 if settings.stored == shared.FLOAT32.value else 512
        launch(
            topk.select,
            (len(tasks),),
            *(self.table, self.numbers, tasks, settings.eps),
            **self._sparse(settings),
            **settings.reading,
            SHARE=share,
            LENGTH=length,
            warps=min(_THREADS // _LANES, max(4, share * length // entries)),
        )

    def products_low_rank(self, rows: Sequence[Row], settings: Settings) -> tuple[Sums, Sums | None]:
        """The new columns of the Gram matrices, and inner products of a dense vector with all rows, if there is one.

        Args:
            rows: As in `begin`.
            settings: What is compiled.

        Returns:
            Sums over each row of the table, 0 for rows of the window that were not written; and over panels, for every
            vector of every row.
        """
        rank, capacity = settings.rank, settings.capacity
        wide = padded(rank)
        kept = {"RANK": rank, "PADDED": wide, "VALUES_IN": settings.values}
        kept |= {"LENGTH": max(1, _SUMS // (wide * wide)), "WHOLE": _FACTORS}
        found = torch.empty(len(rows), capacity, dtype=torch.float64, device=self.device)
        columns_of = Sums(found, self._bounds("rows", lambda: [row.places["unit"] for row in rows]))
        if not settings.outside:
            launch(columns.dots, (len(rows) * capacity,), self.table, found, capacity, **kept)
            return columns_of, None
        tasks = self._plan("panels", lambda: cuts.tiles_of(rows, _PANEL))
        partial = torch.zeros(len(tasks), capacity * rank, dtype=torch.float64, device=self.device)
        launch(
            outside.dots_and_outside,
            (len(tasks) + len(rows) * capacity,),
            *(self.table, self.numbers, tasks, len(tasks), partial, found, capacity, settings.eps),
            **{**kept, **settings.vector},
            **{"ROWS": TILE[0] // 2, "COLS": TILE[1], "INNER": _INNER, "PANEL": _PANEL},
        )
        units = self._bounds(
            "panels", lambda: [rows[number].places["unit"] for number in cuts.tiles_of(rows, _PANEL)[:, 0]]
        )
        return columns_of, Sums(partial, units, rank)

    def products_sparse(self, rows: Sequence[Row], settings: Settings) -> tuple[Sums, Sums | None]:
        """The same for sparse windows.

        Args:
            rows: As in `begin`.
            settings: What is compiled.

        Returns:
            Sums over some blocks.
        """
        capacity = settings.capacity
        tasks = self._plan("products", lambda: np.array([task[:3] for task in cuts.ranges(rows)], np.int64))
        units = self._bounds("products", lambda: [task[3] for task in cuts.ranges(rows)])
        found = torch.empty(len(tasks), capacity, dtype=torch.float64, device=self.device)
        other = torch.empty_like(found) if settings.outside else found
        launch(
            sparse.sparse_products,
            (len(tasks), capacity),
            *(self.table, self.numbers, tasks, found, other, capacity, settings.eps),
            **self._sparse(settings),
            OUTSIDE=settings.outside,
            **settings.vector,
            STEPS=max(row.places["kept"] for row in rows).bit_length() + 1,
            LENGTH=_CHUNK,
            warps=1,
        )
        return Sums(found, units), Sums(other, units) if settings.outside else None

    def add_up(self, sums: Sums, outside: Sums | None) -> torch.Tensor:
        """Sums over whole units.

        Args:
            sums: Of the new columns.
            outside: Products of a dense vector, if there is one.

        Returns:
            Columns, and behind them products if there are any: `(1 or 2, units, capacity)`, float64.
        """
        other, capacity = outside or sums, sums.partial.shape[1]
        many = 1 if outside is None else 2
        found = torch.empty(many, self.units, capacity, dtype=torch.float64, device=self.device)
        launch(
            sparse.add_up,
            (many * capacity, self.units),
            *(sums.bounds, sums.partial, found[0], other.bounds, other.partial, found[-1], capacity),
            PARTS=other.parts,
            LENGTH=_CHUNK,
            warps=1,
        )
        return found

    def solve(
        self,
        grams: torch.Tensor,
        sums: Sums,
        outside: Sums | None,
        changing: Changing,
        settings: Settings,
    ) -> torch.Tensor:
        """Coefficients in AdamW's metric, for windows of at most `LARGEST_SOLVED` gradients.

        Args:
            grams: Gram matrices, `(units, capacity, capacity)`, float64; they get their new columns.
            sums: Of the new columns.
            outside: Products of a dense vector; None for a first moment over the window's rows.
            changing: Counters and hyperparameters.
            settings: What is compiled.

        Returns:
            `(units, capacity)`, float64; 0 for rows of the window that were not written.
        """
        wide = padded(settings.capacity, 2)
        found = torch.empty(self.units, settings.capacity, dtype=torch.float64, device=self.device)
        other = sums if outside is None else outside
        launch(
            solve.solve,
            (self.units,),
            *(grams, changing.counters, sums.partial, sums.bounds, other.partial, other.bounds),
            *(changing.hyper, changing.unit_groups, found, settings.capacity, changing.unit_groups.shape[1]),
            **{"OUTSIDE": outside is not None, "PARTS": other.parts, "PADDED": wide, "LINES": _LINES},
            warps=max(1, wide * wide // 256),
        )
        return found

    def move_low_rank(self, rows: Sequence[Row], settings: Settings, coefficients: torch.Tensor) -> None:
        """`theta <- keep theta - lr D^-1/2 G^T c`.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
            coefficients: `c`, `(units, capacity)`, float64.
        """
        tasks = self._plan("tiles", lambda: cuts.tiles_of(rows, TILE[0]))
        launch(
            move.move,
            (len(tasks),),
            *(self.table, self.numbers, tasks, coefficients, settings.capacity, settings.eps),
            **{"RANK": settings.rank, "VALUES_IN": settings.values, "OUTSIDE": settings.outside, **settings.vector},
            **{"ROWS": TILE[0], "COLS": TILE[1], "INNER": _INNER},
            EVEN=self.even,
            PRECISION=_PRECISION,
        )

    def move_sparse(self, rows: Sequence[Row], settings: Settings, coefficients: torch.Tensor) -> None:
        """The same for sparse windows.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
            coefficients: `c`, `(units, capacity)`, float64.
        """
        tasks = self._plan("blocks", lambda: cuts.cut([row.places["blocks"] for row in rows], 1))
        programs = min(len(tasks), _PROGRAMS)
        length = padded(max(row.places["width"] for row in rows), _CHUNK)
        sums = torch.empty(programs * length, dtype=torch.float64, device=self.device)
        launch(
            sparse.sparse_move,
            (programs,),
            *(self.table, self.numbers, tasks, len(tasks), programs, sums),
            *(coefficients, settings.capacity, settings.eps),
            **self._sparse(settings),
            OUTSIDE=settings.outside,
            **settings.vector,
            LENGTH=length,
            CHUNK=_CHUNK,
            warps=1,
        )

    def _sparse(self, settings: Settings) -> dict[str, Any]:
        return {"VALUES_IN": settings.values, "WIDE_INDEX": settings.block_size > 256}

    def _bounds(self, name: str, units: Callable[[], Sequence[int]]) -> torch.Tensor:
        """Where the tasks of each unit begin, and where the last ends; the units of the tasks ascend."""
        edges = np.arange(self.units + 1)
        return self._plan(f"bounds of {name}", lambda: np.searchsorted(np.array(units()), edges).astype(np.int64))

    def _plan(self, name: Any, make: Callable[[], NDArray[np.int64]]) -> torch.Tensor:
        """A table that depends on shapes only."""
        if name not in self._plans:
            self._plans[name] = upload(make(), self.device)
        return self._plans[name]
