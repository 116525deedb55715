"""Tables of the tensors of a whole model and of the work on them, for compiled loops that go through all of it.

A thread takes the next task by itself, and needs Python again when no task is left. Which tasks there are never depends
on the number of threads. Tables hold addresses: who makes one keeps the tensors until the work is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...blocks import Part, sharing

# A part: addresses, entries from block to block, and how it is cut. The address of scales is 0 where there are none.
_PART = np.dtype([
    (name, np.int64)
    for name in (
        *("index", "index_stride", "value", "value_stride", "scale", "scale_stride"),
        *("blocks", "length", "kept", "share"),
    )
])
# A vector: its address and its length.
_VECTOR = np.dtype([("at", np.int64), ("entries", np.int64)])
# A task: a row of another table, and which of its blocks or entries.
_TASK = np.dtype([("row", np.int64), ("begin", np.int64), ("end", np.int64)])

Table = np.ndarray[Any, Any]


def of_parts(parts: Sequence[Part]) -> Table:
    """A row for each part, `(parts,)`.

    Args:
        parts: Of windows, or of rows of windows.

    Returns:
        The table.
    """
    return np.array(
        [
            (
                indices.data_ptr(),
                indices.stride(0),
                values.data_ptr(),
                values.stride(0),
                0 if scales is None else scales.data_ptr(),
                0 if scales is None else scales.stride(0),
                piece.blocks,
                piece.length,
                piece.kept,
                sharing(piece.length),
            )
            for piece, indices, values, scales in parts
        ],
        _PART,
    )


def of_vectors(vectors: Sequence[torch.Tensor]) -> Table:
    """A row for each vector, `(vectors,)`.

    Args:
        vectors: Contiguous.

    Returns:
        The table.
    """
    return np.array([(vector.data_ptr(), vector.numel()) for vector in vectors], _VECTOR)


def tasks(sizes: Sequence[int], steps: Sequence[int]) -> Table:
    """Cut everything into ranges, `(tasks,)`.

    Args:
        sizes: Blocks or entries of each row of another table.
        steps: Of a range, at most.

    Returns:
        The table, in order.
    """
    ranges = [
        (row, begin, min(begin + step, size))
        for row, (size, step) in enumerate(zip(sizes, steps, strict=True))
        for begin in range(0, size, step)
    ]
    return np.array(ranges, _TASK)
