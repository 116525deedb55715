"""How a flattened parameter is cut into blocks, and how many entries each block keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

MAX_BLOCK_SIZE = 65536  # an index inside a block has to fit uint16
SHARED = 4096  # entries of the vector whose int8 values share a scale, in every row


@dataclass(frozen=True)
class Piece:
    """A run of equal blocks of one flattened parameter.

    A parameter has at most two: its full blocks, and the shorter tail block.

    Args:
        start: First entry of the piece in the flattened parameter.
        blocks: Number of blocks.
        length: Entries in each block (the paper's `B_d`).
        kept: Entries that Top-k keeps of each block, `ceil(density * length)`.
        offset: Entries kept by the pieces before this one, in one row.
    """

    start: int
    blocks: int
    length: int
    kept: int
    offset: int

    @property
    def numel(self) -> int:
        """Entries of the parameter that the piece covers."""
        return self.blocks * self.length

    @property
    def groups(self) -> int:
        """Scales that one row of the window stores for the piece, where it stores int8."""
        return -(-self.blocks // sharing(self.length))

    @property
    def row(self) -> int:
        """Entries that one row of the window stores for the piece."""
        return self.blocks * self.kept

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The piece of a flat tensor, as a view of shape `(blocks, length)`."""
        return flat[self.start : self.start + self.numel].view(self.blocks, self.length)


def sharing(length: int) -> int:
    """Consecutive blocks of a length whose int8 values share a scale: those that fit 4,096 entries, at least one."""
    return max(1, SHARED // length)


class Part(NamedTuple):
    """A piece of a parameter and what a sparse window stores for it.

    Of the whole window: `indices` and `values` `(blocks, m, kept)`, `scales` `(groups, m)`; of one row:
    `(blocks, kept)` and `(groups,)`. Scales come with int8 values only. The last dimension of indices and values is
    contiguous.
    """

    piece: Piece
    indices: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None

    def blocks(self, begin: int, end: int, start: int = 0) -> Part:
        """Some blocks of the part. The first is the first that shares its scale, and `start` is where they begin."""
        piece = self.piece
        share = sharing(piece.length)
        return Part(
            Piece(start, end - begin, piece.length, piece.kept, piece.offset),
            self.indices[begin:end],
            self.values[begin:end],
            None if self.scales is None else self.scales[begin // share : -(-end // share)],
        )


def entries_kept(density: float, length: int) -> int:
    """`ceil(density * length)`, but 7 for 0.07 * 100, whose product in floating point is a hair more."""
    return math.ceil(density * length * (1.0 - 1e-12))


@lru_cache(maxsize=4096)
def cut(numel: int, block_size: int, density: float) -> tuple[Piece, ...]:
    """Cut a flattened parameter into blocks of `block_size` entries and a shorter tail.

    Args:
        numel: Entries of the parameter.
        block_size: Entries of a block.
        density: Fraction `k / d` that each block keeps, in (0, 1].

    Returns:
        The pieces, in order; none for an empty parameter.
    """
    blocks, tail = divmod(numel, block_size)
    pieces = []
    if blocks:
        pieces.append(Piece(0, blocks, block_size, entries_kept(density, block_size), 0))
    if tail:
        offset = sum(piece.row for piece in pieces)
        pieces.append(Piece(blocks * block_size, 1, tail, entries_kept(density, tail), offset))
    return tuple(pieces)


def index_dtype(block_size: int) -> torch.dtype:
    """The smallest dtype that holds an index inside a block."""
    return torch.uint8 if block_size <= 256 else torch.uint16


def as_indices(stored: torch.Tensor, block_size: int) -> torch.Tensor:
    """Indices from the bytes in which the state keeps them: torch neither pickles uint16 nor sends it to processes.

    Args:
        stored: Bytes, one or two for each index, as this machine orders them.
        block_size: Entries of a block.

    Returns:
        A view, in `index_dtype`.
    """
    return stored.view(index_dtype(block_size))
