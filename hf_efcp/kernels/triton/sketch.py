"""The first half of a power iteration of every matrix of a model: `A Q`, with the vectors `Q` of the step before."""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import HEIGHT, IMAGE, START, accumulator, field, floats, small, width_of


@triton.jit
def sketch(
    table,
    numbers,
    tasks,
    scratch,
    eps,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    STORED: tl.constexpr,
    METRIC: tl.constexpr,
    COUPLED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Some rows of `A Q`, transposed: `(rank, height)` from the tensor's place in the scratch memory on.

    The vectors of `Q` are divided by their largest entry, so that products neither overflow nor vanish.
    """
    task = tl.program_id(0)
    row, first = tl.load(tasks + 2 * task), tl.load(tasks + 2 * task + 1).to(tl.int32)
    height, width = small(table, row, HEIGHT), width_of(table, row, EVEN)
    start = floats(field(table, row, START))
    r, k = first + tl.arange(0, ROWS), tl.arange(0, PADDED)
    largest = tl.zeros((COLS, PADDED), tl.float32)
    for begin in range(0, width, COLS):
        c = begin + tl.arange(0, COLS)
        inside = (c < width)[:, None] & (k < RANK)[None, :]
        largest = tl.maximum(largest, tl.abs(tl.load(start + k[None, :] * width + c[:, None], mask=inside, other=0.0)))
    unit = tl.where(k < RANK, tl.max(largest, axis=0), 1.0)
    image = tl.zeros((ROWS, PADDED), tl.float32)
    for begin in range(0, width, COLS):
        c = begin + tl.arange(0, COLS)
        inside = (r < height)[:, None] & (c < width)[None, :]
        a = accumulator(table, numbers, row, r[:, None] * width + c[None, :], inside, eps, STORED, METRIC, COUPLED)
        q = tl.load(start + k[None, :] * width + c[:, None], mask=(c < width)[:, None] & (k < RANK)[None, :], other=0.0)
        q = tl.div_rn(q, tl.broadcast_to(unit[None, :], q.shape))
        image = tl.dot(a, q, image, input_precision=PRECISION)
    place = scratch + field(table, row, IMAGE) + k[None, :] * height + r[:, None]
    tl.store(place, image, mask=(r < height)[:, None] & (k < RANK)[None, :])
