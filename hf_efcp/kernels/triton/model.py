"""A model as the kernels see it: a row for each tensor, the launches of a step, and the memory that they share.

The rows hold addresses, which change with every gradient: they are made anew in every step, and sent in one copy that
nobody waits for. What they are cut into depends on shapes only, and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import BUCKET
from . import columns, error, factors, finite, moments, move, orthonormal, outside, shared, sketch, sparse, topk
from .launch import cut, launch, padded, tiles, upload
from .rows import Row, Settings

_RANGE = 4096  # entries of a program that goes through a tensor
_ROWS = 2048 // BUCKET
_TILE = 32, 64  # rows and columns of a tile of a matrix
_SPLIT = 2048  # rows of a matrix over which one program sums
_PANEL = 1024  # rows of a tile over which one program adds products
_INNER = 32  # vectors of the window that are multiplied at a time
_FACTORS = 1024  # entries of a factor
_SUMS = 2048  # float64 that a program adds at a time
_BLOCKS = 64  # blocks whose products one program takes
_CHUNK = 128  # entries of a block or a row that one warp takes
_PROGRAMS = 4096  # that have sums of their own
# Three products of TF32, on units for matrices, are about as exact as one of float32. AMD's have no such mode.
_PRECISION = "ieee" if torch.version.hip else "tf32x3"


@dataclass
class Model:
    """The launches over all tensors of a model.

    Args:
        device: Where they are.
    """

    device: torch.device
    _plans: dict[Any, torch.Tensor] = field(default_factory=dict)
    _shapes: Any = None
    _checked: tuple[list[int], torch.Tensor] = field(default_factory=lambda: ([], torch.empty(0, device="cpu")))
    table: torch.Tensor = field(init=False)
    numbers: torch.Tensor = field(init=False)
    units: int = field(init=False)
    even: bool = field(init=False)

    def find_nonfinite(self, gradients: Sequence[torch.Tensor]) -> list[bool]:
        """Which gradients have NaN or infinity. The only copy from the device that a step waits for.

        Args:
            gradients: Flat and contiguous.

        Returns:
            True for those that have.
        """
        rows = [Row(g, g, {}, {"numel": g.numel()}, {}) for g in gradients]
        table = upload(np.array([row.integers() for row in rows], np.int64), self.device)
        flags = torch.zeros(len(rows), dtype=torch.int32, device=self.device)
        sizes = [g.numel() for g in gradients]
        if sizes != self._checked[0]:
            self._checked = sizes, upload(cut(sizes, _RANGE), self.device)
        tasks = self._checked[1]
        launch(finite.find_nonfinite, (len(tasks),), table, tasks, flags, LENGTH=_RANGE)
        return [bool(flag) for flag in flags.tolist()]

    def begin(self, rows: Sequence[Row], units: int) -> None:
        """Take the tensors of this step.

        Args:
            rows: In an order that is the same in every step, those of a unit together.
            units: How many units there are; one may have no rows.
        """
        names = ("numel", "height", "width", "blocks", "kept", "unit", "begin")
        self.units = units
        shapes: Any = units, tuple(tuple(row.places.get(name, 0) for name in names) for row in rows)
        if shapes != self._shapes:
            self._plans, self._shapes = {}, shapes
            self.even = all(row.places.get("width", 0) % BUCKET == 0 for row in rows)
        integers = np.array([row.integers() for row in rows], np.int64)
        numbers = np.array([[row.numbers[name] for name in shared.NUMBERS] for row in rows], np.float32)
        packed = np.concatenate([integers.view(np.uint8).ravel(), numbers.view(np.uint8).ravel()])
        sent = upload(packed, self.device)
        self.table = sent[: integers.nbytes].view(torch.int64)
        self.numbers = sent[integers.nbytes :].view(torch.float32)

    def observe(self, rows: Sequence[Row], settings: Settings) -> None:
        """Take the gradients into the second moments.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
        """
        tasks = self._plan("observe", lambda: _buckets(rows))
        constants = {"MOMENT": settings.moment, "METRIC": settings.metric, "COUPLED": settings.coupled, "ROWS": _ROWS}
        launch(
            moments.observe,
            (len(tasks),),
            *(self.table, self.numbers, tasks, settings.beta2, 1.0 - settings.beta2, 1.0 - settings.beta1),
            **constants,
        )

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
        peak = torch.empty(len(rows) * rank, dtype=torch.float32, device=self.device)
        scratch = torch.empty(sum(_scratch(*size, rank) for size in sizes), dtype=torch.float32, device=self.device)
        common = {"RANK": rank, "PADDED": padded(rank, 16), "ROWS": _TILE[0], "COLS": _TILE[1], **settings.reading}
        common |= {"EVEN": self.even, "PRECISION": _PRECISION}
        launch(sketch.peaks, (len(vectors),), self.table, vectors, peak, RANK=rank, LENGTH=_FACTORS)
        bands = self._plan("bands", lambda: cut([height for height, _ in sizes], _TILE[0]))
        given = self.table, self.numbers
        launch(sketch.sketch, (len(bands),), *given, bands, peak, scratch, eps, **common)
        which = self._plan("matrices", lambda: np.array(matrices, np.int64))
        many = {"RANK": rank, "PADDED": padded(rank), "ROWS": max(16, 4096 // padded(rank))}
        launch(orthonormal.orthonormalise, (len(which),), self.table, which, scratch, **many, warps=8)
        splits = self._plan("splits", lambda: _splits(sizes))
        launch(
            factors.project,
            (len(splits),),
            *given,
            splits,
            scratch,
            eps,
            **{**common, "ROWS": _TILE[0] // 2},
            SPLIT=_SPLIT,
        )
        kept = {"RANK": rank, "VALUES_IN": settings.values}
        launch(factors.keep_factors, (len(vectors),), self.table, vectors, scratch, **kept, LENGTH=_FACTORS)
        buckets = self._plan("observe", lambda: _buckets(rows))
        kept |= {"EVEN": self.even, "ROWS": _ROWS}
        launch(error.keep_error, (len(buckets),), *given, buckets, eps, **kept, **settings.reading)

    def push_top_k(self, rows: Sequence[Row], settings: Settings) -> None:
        """Top-k of every block: the newest rows of the windows, and the errors.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
        """
        groups = [-(-row.places["blocks"] // row.places["height"]) for row in rows]
        tasks = self._plan("groups", lambda: cut(groups, 1))
        # A group of short blocks is one tile; its sides are powers of two, of the largest, so that one launch does all.
        share = padded(max(row.places["height"] for row in rows))
        length = padded(max(row.places["width"] for row in rows), BUCKET)
        launch(
            topk.select,
            (len(tasks),),
            *(self.table, self.numbers, tasks, settings.eps),
            **self._sparse(settings),
            **settings.reading,
            SHARE=share,
            LENGTH=length,
            warps=min(32, max(4, share * length // 512)),
        )

    def dots_low_rank(self, rows: Sequence[Row], settings: Settings) -> torch.Tensor:
        """The new columns of the Gram matrices.

        Args:
            rows: As in `begin`.
            settings: What is compiled.

        Returns:
            `(units, capacity)`, float64; 0 for rows of the window that were not written.
        """
        rank, capacity = settings.rank, settings.capacity
        found = torch.empty(len(rows), capacity, dtype=torch.float64, device=self.device)
        wide = padded(rank)
        launch(
            columns.dots,
            (len(rows), capacity),
            *(self.table, found, capacity),
            **{"RANK": rank, "PADDED": wide, "VALUES_IN": settings.values},
            LENGTH=max(1, _SUMS // (wide * wide)),
            WHOLE=_FACTORS,
        )
        if [row.places["unit"] for row in rows] == list(range(self.units)):
            return found
        return self._add_up("rows", lambda: [row.places["unit"] for row in rows], found)

    def dots_sparse(self, rows: Sequence[Row], settings: Settings) -> torch.Tensor:
        """The same for sparse windows.

        Args:
            rows: As in `begin`.
            settings: What is compiled.

        Returns:
            `(units, capacity)`, float64.
        """
        capacity = settings.capacity
        ranges = _ranges(rows)
        tasks = self._plan("products", lambda: np.array([task[:3] for task in ranges], np.int64))
        partial = torch.empty(len(ranges), capacity, dtype=torch.float64, device=self.device)
        steps = max(row.places["kept"] for row in rows).bit_length() + 1
        launch(
            sparse.sparse_dots,
            (len(ranges), capacity),
            *(self.table, tasks, partial, capacity),
            **self._sparse(settings),
            STEPS=steps,
            LENGTH=_CHUNK,
            warps=1,
        )
        return self._add_up("products", lambda: [task[3] for task in ranges], partial)

    def outside_low_rank(self, rows: Sequence[Row], settings: Settings) -> torch.Tensor:
        """Inner products of the dense vector with the rows of low-rank windows.

        Args:
            rows: As in `begin`.
            settings: What is compiled.

        Returns:
            `(units, capacity)`, float64.
        """
        tasks = self._plan("panels", lambda: _tiles(rows, _PANEL))
        partial = torch.zeros(len(tasks), settings.capacity * settings.rank, dtype=torch.float64, device=self.device)
        launch(
            outside.outside_low_rank,
            (len(tasks),),
            *(self.table, self.numbers, tasks, partial, settings.capacity, settings.eps),
            **{"RANK": settings.rank, "VALUES_IN": settings.values, **settings.vector},
            **{"ROWS": _TILE[0] // 2, "COLS": _TILE[1], "INNER": _INNER, "PANEL": _PANEL},
        )
        found = self._add_up(
            "panels", lambda: [rows[number].places["unit"] for number in _tiles(rows, _PANEL)[:, 0]], partial
        )
        return found.view(self.units, settings.capacity, settings.rank).sum(dim=2)

    def outside_sparse(self, rows: Sequence[Row], settings: Settings) -> torch.Tensor:
        """The same for sparse windows.

        Args:
            rows: As in `begin`.
            settings: What is compiled.

        Returns:
            `(units, capacity)`, float64.
        """
        ranges = _ranges(rows)
        tasks = self._plan("products", lambda: np.array([task[:3] for task in ranges], np.int64))
        partial = torch.empty(len(ranges), settings.capacity, dtype=torch.float64, device=self.device)
        launch(
            outside.outside_sparse,
            (len(ranges), settings.capacity),
            *(self.table, self.numbers, tasks, partial, settings.capacity, settings.eps),
            **self._sparse(settings),
            **settings.vector,
            LENGTH=_CHUNK,
            warps=1,
        )
        return self._add_up("products", lambda: [task[3] for task in ranges], partial)

    def move_low_rank(self, rows: Sequence[Row], settings: Settings, coefficients: torch.Tensor) -> None:
        """`theta <- keep theta - lr D^-1/2 G^T c`.

        Args:
            rows: As in `begin`.
            settings: What is compiled.
            coefficients: `c`, `(units, capacity)`, float64.
        """
        tasks = self._plan("tiles", lambda: _tiles(rows, _TILE[0]))
        launch(
            move.move,
            (len(tasks),),
            *(self.table, self.numbers, tasks, coefficients, settings.capacity, settings.eps),
            **{"RANK": settings.rank, "VALUES_IN": settings.values, "OUTSIDE": settings.outside, **settings.vector},
            **{"ROWS": _TILE[0], "COLS": _TILE[1], "INNER": _INNER},
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
        tasks = self._plan("blocks", lambda: cut([row.places["blocks"] for row in rows], 1))
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

    def _add_up(self, name: str, units: Callable[[], Sequence[int]], partial: torch.Tensor) -> torch.Tensor:
        """Sums over what belongs to each unit; the units of the lines of `partial` ascend."""
        count, wide = self.units, partial.shape[1]
        edges = np.arange(count + 1)
        bounds = self._plan(f"bounds of {name}", lambda: np.searchsorted(np.array(units()), edges).astype(np.int64))
        found = torch.empty(count, wide, dtype=torch.float64, device=self.device)
        launch(sparse.add_up, (wide, count), bounds, partial, found, wide, LENGTH=_CHUNK, warps=1)
        return found

    def _plan(self, name: Any, make: Callable[[], NDArray[np.int64]]) -> torch.Tensor:
        """A table that depends on shapes only."""
        if name not in self._plans:
            self._plans[name] = upload(make(), self.device)
        return self._plans[name]


def place_scratch(rows: Sequence[Row], rank: int) -> None:
    """Give every matrix its place in the memory that the kernels of `push_low_rank` share.

    Args:
        rows: Of low-rank windows; "image", "partial" and "splits" are written.
        rank: Of a row.
    """
    begin = 0
    for row in rows:
        height, width = row.places["height"], row.places["width"]
        row.places |= {"image": begin, "partial": begin + height * rank, "splits": -(-height // _SPLIT)}
        begin += _scratch(height, width, rank)


def _scratch(height: int, width: int, rank: int) -> int:
    return rank * (height + -(-height // _SPLIT) * width)


def _buckets(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Ranges of buckets, of every tensor once, however many rows it has."""
    sizes = [0 if row.places.get("begin", 0) else -(-row.places["numel"] // BUCKET) for row in rows]
    return cut(sizes, _ROWS)


def _splits(sizes: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    found = tiles(sizes, _SPLIT, _TILE[1])
    found[:, 1] //= _SPLIT
    return found


def _tiles(rows: Sequence[Row], height: int) -> NDArray[np.int64]:
    """Tiles of matrices, and of what is kept whole ranges that are as long as a tile is large; in the rows' order."""
    sizes = [(row.places["height"], row.places["width"]) for row in rows]
    whole = cut([0 if row.places["height"] else row.places["numel"] for row in rows], height * _TILE[1])
    ranges = np.stack([whole[:, 0], np.zeros_like(whole[:, 0]), whole[:, 1]], axis=1)
    found = np.concatenate([tiles(sizes, height, _TILE[1]), ranges])
    return found[np.argsort(found[:, 0], kind="stable")]


def _ranges(rows: Sequence[Row]) -> list[tuple[int, int, int, int]]:
    """Runs of blocks: row, begin, end and unit of each."""
    return [
        (number, begin, min(begin + _BLOCKS, row.places["blocks"]), row.places["unit"])
        for number, row in enumerate(rows)
        for begin in range(0, row.places["blocks"], _BLOCKS)
    ]
