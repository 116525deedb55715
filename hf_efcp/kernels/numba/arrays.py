"""From tensors to what compiled loops take, and how work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.np.numpy_support import carray

from ...blocks import Part, sharing
from . import tables
from .compiling import inner
from .scalars import decode, pointer_to
from .vectors import LANES

RANGE = 1 << 16  # entries of the dense vector in one task; partial sums are kept per task
LIGHT = 1 << 18  # the same for what takes so little time that waking a thread would take longer
LONG = 24  # entries of a row that is long
WIDTH = np.uint64(LANES)


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array; numpy has no bfloat16, which goes as the int16 of its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def flat_rows(indices: torch.Tensor, values: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Indices and values of each block as one run of all rows."""
    return array_of(indices).reshape(len(indices), -1), array_of(values).reshape(len(values), -1)


def empty_like(part: Part) -> tuple[Any, ...]:
    """Arrays that say, by their types, what windows store."""
    return tuple(None if some is None else np.empty(0, array_of(some[:0]).dtype) for some in part[1:])


def longest(parts: Sequence[Part]) -> int:
    """Entries of the longest block."""
    return max(part.piece.length for part in parts)


def longest_short(parts: Sequence[Part]) -> int:
    """Entries of the longest of the short rows; 0 without any."""
    return max((part.piece.kept for part in parts if part.piece.kept < LONG), default=0)


def tasks_of(parts: Sequence[Part]) -> tuple[tables.Table, tables.Table]:
    """The tasks of the blocks of some parts, and the counter of those that were taken."""
    steps = [task_size(part.piece.length) for part in parts]
    return tables.tasks([part.piece.blocks for part in parts], steps), np.zeros(1, np.int64)


def task_size(length: int) -> int:
    """Blocks of a task: whole groups that share scales."""
    share = sharing(length)
    return max(1, RANGE // (length * share)) * share


@inner
def window_of(part, index_like, value_like, scale_like):
    """What the window has of a part: `(blocks, stride)` indices and values, `(groups, stride)` scales or None."""
    index = carray(pointer_to(part.index), (part.blocks, part.index_stride), index_like.dtype)
    value = carray(pointer_to(part.value), (part.blocks, part.value_stride), value_like.dtype)
    if scale_like is None:
        return index, value, None
    groups = (part.blocks + part.share - 1) // part.share
    return index, value, carray(pointer_to(part.scale), (groups, part.scale_stride), scale_like.dtype)


@inner
def of_short(room, kept, rows):
    """The room for a number for each entry of short rows; none for long ones."""
    return room[: rows * kept if kept < LONG else 0]


@inner
def weigh(scale, factor, weights):
    """The weights of rows from here on: their scales, times a factor."""
    for row in range(weights.shape[0]):
        weights[row] = np.float64(decode(scale[row])) * factor
