"""From inner products to coefficients, for windows so small that a program can hold their Gram matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from .advance import GROUP_LR, GROUP_WIDTH, GROUPS, LOG_WEIGHT, RELATIVE_DAMP, TRUST_LR, power


@triton.jit
def added(sums, bounds, unit, capacity, PADDED: tl.constexpr, PARTS: tl.constexpr, LINES: tl.constexpr):
    """What the tasks of a unit have summed, `(PADDED,)` float64, added in a fixed order; `PARTS` lie side by side."""
    first, last = tl.load(bounds + unit), tl.load(bounds + unit + 1)
    j = tl.arange(0, PADDED)
    total = tl.zeros((LINES, PADDED), tl.float64)
    for begin in range(first, last, LINES):
        line = begin + tl.arange(0, LINES)
        inside = (line < last)[:, None] & (j < capacity)[None, :]
        for part in range(PARTS):
            place = line[:, None] * (capacity * PARTS) + j[None, :] * PARTS + part
            total += tl.load(sums + place, mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def solve(
    grams,
    counters,
    sums,
    bounds,
    outside,
    outside_bounds,
    hyper,
    unit_groups,
    coefficients,
    capacity,
    groups,
    OUTSIDE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
):
    """The coefficients of a unit in AdamW's metric, `-(K + s I)^-1 y`; its new column goes into `K`.

    `s = (relative_damp + trust_lr / lr) mean |row|^2`. `y` are the products of a dense vector with the rows, or, of a
    first moment over them, `K w`, and then `w` is added. What the window does not hold yet is zero in `K`, and solved
    with the rest, since how much that is the device alone knows. Where a pivot is lost in rounding, `y` does not move.
    """
    unit = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, PADDED)
    pushed = tl.load(counters + unit)
    newest, held = (pushed - 1) % capacity, tl.minimum(pushed, capacity)
    column = added(sums, bounds, unit, capacity, PADDED, 1, LINES)
    place = grams + unit * capacity * capacity + j[:, None] * capacity + j[None, :]
    stored = (j < capacity)[:, None] & (j < capacity)[None, :]
    K = tl.load(place, mask=stored, other=0.0)
    K = tl.where(j[:, None] == newest, column[None, :], tl.where(j[None, :] == newest, column[:, None], K))
    tl.store(place, K, mask=stored & ((j[:, None] == newest) | (j[None, :] == newest)))

    if OUTSIDE:
        y = added(outside, outside_bounds, unit, capacity, PADDED, PARTS, LINES)
        weights = tl.zeros((PADDED,), tl.float64)
    else:
        age = (newest - j + capacity) % capacity
        weights = tl.where(j < held, power(tl.load(hyper + LOG_WEIGHT), age), 0.0)
        weights = weights / tl.sum(weights, axis=0)
        y = tl.sum(K * weights[None, :], axis=1)

    lr = tl.zeros((), tl.float64)  # the largest, where parameters that share a matrix have several
    for group in range(groups):
        own = tl.load(unit_groups + unit * groups + group)
        lr = tl.maximum(lr, tl.where(own != 0, tl.load(hyper + GROUPS + group * GROUP_WIDTH + GROUP_LR), 0.0))
    trust = tl.load(hyper + TRUST_LR)
    trusted = tl.where(trust > 0.0, trust / tl.maximum(lr, tl.where(trust > 0.0, 1e-30 * trust, 1.0)), 0.0)
    diagonal = j[:, None] == j[None, :]
    shift = (tl.load(hyper + RELATIVE_DAMP) + trusted) * (
        tl.sum(tl.sum(tl.where(diagonal, K, 0.0), axis=1), axis=0) / held
    )

    # Cholesky's factor in the place of K, and at once the solution with it, column by column.
    K = tl.where(diagonal, tl.where((j < capacity)[:, None], K + shift, 1.0), K)
    definite = shift > 0.0
    for k in range(capacity):
        below = tl.sum(tl.where(j[None, :] == k, K, 0.0), axis=1)
        pivot = tl.sum(tl.where(j == k, below, 0.0), axis=0)
        definite = definite & (pivot > 0.0)
        root = tl.sqrt(tl.where(pivot > 0.0, pivot, 1.0))
        below = tl.where(j > k, below / root, 0.0)
        K = tl.where(j[None, :] == k, tl.where(j == k, root, below)[:, None], K - below[:, None] * below[None, :])
        solved = tl.sum(tl.where(j == k, y, 0.0), axis=0) / root
        y = tl.where(j == k, solved, y - below * solved)
    for back in range(capacity):
        k = capacity - 1 - back
        column = tl.sum(tl.where(j[None, :] == k, K, 0.0), axis=1)
        root = tl.sum(tl.where(j == k, column, 0.0), axis=0)
        rest = tl.sum(tl.where(j == k, y, 0.0), axis=0) - tl.sum(tl.where(j > k, column * y, 0.0), axis=0)
        y = tl.where(j == k, rest / root, y)
    c = weights - tl.where(definite, y, 0.0)
    tl.store(coefficients + unit * capacity + j, c, mask=j < capacity)
