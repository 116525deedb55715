"""Inner products of the newest low-rank row with all rows, of a whole model in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .error import load_factor
from .shared import HEIGHT, HELD, LEFT, NEWEST, NUMEL, RIGHT, VALUES, WIDTH, field, small


@triton.jit
def inner(
    side, length, newest, i, RANK: tl.constexpr, PADDED: tl.constexpr, VALUES_IN: tl.constexpr, LENGTH: tl.constexpr
):
    """`(rank, rank)` products of the vectors of row `i` with those of the newest, float64."""
    k = tl.arange(0, PADDED)
    total = tl.zeros((PADDED, PADDED, LENGTH), tl.float64)
    for first in range(0, length, LENGTH):
        place = first + tl.arange(0, LENGTH)
        vectors = k[:, None] * length + place[None, :]
        inside = (k < RANK)[:, None] & (place < length)[None, :]
        x = load_factor(side, i * RANK * length, vectors, inside, VALUES_IN).to(tl.float64)
        y = load_factor(side, newest * RANK * length, vectors, inside, VALUES_IN)
        total += x[:, None, :] * y.to(tl.float64)[None, :, :]
    return tl.sum(total, axis=2)


@triton.jit
def dots(
    table,
    columns,
    capacity,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    VALUES_IN: tl.constexpr,
    LENGTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`<row_newest, row_i>` of a tensor, `(tensors, capacity)` float64; 0 for rows that were not written yet."""
    dot(table, columns, capacity, tl.program_id(0), RANK, PADDED, VALUES_IN, LENGTH, WHOLE)


@triton.jit
def dot(
    table,
    columns,
    capacity,
    task,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    VALUES_IN: tl.constexpr,
    LENGTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One of them."""
    row, i = (task // capacity).to(tl.int64), (task % capacity).to(tl.int64)
    newest = field(table, row, NEWEST)
    left = field(table, row, LEFT)
    product = tl.zeros((), tl.float64)
    if i < field(table, row, HELD):
        if left == 0:
            numel, values = small(table, row, NUMEL), field(table, row, VALUES)
            total = tl.zeros((WHOLE,), tl.float64)
            for first in range(0, numel, WHOLE):
                place = first + tl.arange(0, WHOLE)
                x = load_factor(values, i * numel, place, place < numel, VALUES_IN).to(tl.float64)
                total += x * load_factor(values, newest * numel, place, place < numel, VALUES_IN).to(tl.float64)
            product = tl.sum(total, axis=0)
        else:
            P = inner(left, small(table, row, HEIGHT), newest, i, RANK, PADDED, VALUES_IN, LENGTH)
            Q = inner(field(table, row, RIGHT), small(table, row, WIDTH), newest, i, RANK, PADDED, VALUES_IN, LENGTH)
            product = tl.sum(tl.sum(P * Q, axis=1), axis=0)
    tl.store(columns + row * capacity + i, product)
