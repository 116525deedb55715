"""An orthonormal basis of the columns of `A Q`, of every matrix of a model in one launch: Householder's QR.

With reflections `H_k = I - tau_k v_k v_k^T`, the product of all is `I - V T V^T`. Sums are float64, so that squares
neither overflow nor vanish; what a pass leaves is float32. Threads hear of each other's entries in sums only, never
through memory, whose order a barrier does not promise everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shared import HEIGHT, IMAGE, field, small


@triton.jit
def orthonormalise(table, tasks, scratch, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Replace a tensor's `(rank, height)` in the scratch memory by the transposed basis."""
    row = tl.load(tasks + tl.program_id(0))
    height = small(table, row, HEIGHT)
    image = scratch + field(table, row, IMAGE)
    j = tl.arange(0, PADDED)
    real = j < RANK
    # Row k, and products of column k, below row k, with all columns: made by the pass before.
    head = tl.zeros((PADDED,), tl.float64)
    products = tl.zeros((PADDED,), tl.float64)
    for first in range(0, height, ROWS):
        r = first + tl.arange(0, ROWS)
        inside = real[None, :] & (r < height)[:, None]
        y = tl.load(image + j[None, :] * height + r[:, None], mask=inside, other=0.0).to(tl.float64)
        head += tl.sum(tl.where(r[:, None] == 0, y, 0.0), axis=0)
        below = tl.where(r > 0, tl.sum(tl.where(j[None, :] == 0, y, 0.0), axis=1), 0.0)
        products += tl.sum(below[:, None] * y, axis=0)
    T = tl.zeros((PADDED, PADDED), tl.float64)
    V1 = tl.zeros((PADDED, PADDED), tl.float64)  # the square on top of V
    for k in range(RANK):
        alpha, tail = tl.sum(tl.where(j == k, head, 0.0), axis=0), tl.sum(tl.where(j == k, products, 0.0), axis=0)
        norm = tl.sqrt(alpha * alpha + tail)
        beta = tl.where(alpha < 0.0, norm, -norm)
        reflects = tail > 0.0
        tau = tl.where(reflects, (beta - alpha) / tl.where(reflects, beta, 1.0), 0.0)
        scale = tl.where(reflects, 1.0 / tl.where(reflects, alpha - beta, 1.0), 0.0)
        along = tl.where(j > k, tau * (head + scale * products), 0.0)
        head = tl.zeros((PADDED,), tl.float64)
        products = tl.zeros((PADDED,), tl.float64)
        overlaps = tl.zeros((PADDED,), tl.float64)
        corner = tl.zeros((PADDED,), tl.float64)
        for first in range(0, height, ROWS):
            r = first + tl.arange(0, ROWS)
            place = image + j[None, :] * height + r[:, None]
            inside = real[None, :] & (r < height)[:, None]
            y = tl.load(place, mask=inside, other=0.0).to(tl.float64)
            v = tl.sum(tl.where(j[None, :] == k, y, 0.0), axis=1) * scale
            v = tl.where(r > k, v, tl.where(r == k, 1.0, 0.0)).to(tl.float32).to(tl.float64)
            overlaps += tl.sum(tl.where(j[None, :] < k, v[:, None] * y, 0.0), axis=0)
            corner += tl.sum(tl.where(r[:, None] == j[None, :], v[:, None], 0.0), axis=0)
            y = tl.where(j[None, :] == k, v[:, None], y - v[:, None] * along[None, :])
            stored = y.to(tl.float32)
            tl.store(place, stored, mask=inside)
            y = stored.to(tl.float64)
            head += tl.sum(tl.where(r[:, None] == k + 1, y, 0.0), axis=0)
            below = tl.where(r > k + 1, tl.sum(tl.where(j[None, :] == k + 1, y, 0.0), axis=1), 0.0)
            products += tl.sum(below[:, None] * y, axis=0)
        column = -tau * tl.sum(T * overlaps[None, :], axis=1)
        column = tl.where(j < k, column, tl.where(j == k, tau, 0.0))
        T = tl.where(j[None, :] == k, column[:, None], T)
        V1 = tl.where(j[None, :] == k, corner[:, None], V1)
        tl.debug_barrier()
    # The first columns of the product: E - V (T V_1^T).
    inner = tl.zeros((PADDED, PADDED), tl.float64)
    for k in range(RANK):
        top = tl.sum(tl.where(j[None, :] == k, V1, 0.0), axis=1)
        inner += tl.sum(tl.where(j[None, :] == k, T, 0.0), axis=1)[:, None] * top[None, :]
    for first in range(0, height, ROWS):
        r = first + tl.arange(0, ROWS)
        place = image + j[None, :] * height + r[:, None]
        inside = real[None, :] & (r < height)[:, None]
        V = tl.load(place, mask=inside, other=0.0).to(tl.float64)
        basis = tl.where(r[:, None] == j[None, :], 1.0, 0.0).to(tl.float64)
        for k in range(RANK):
            v = tl.sum(tl.where(j[None, :] == k, V, 0.0), axis=1)
            basis -= v[:, None] * tl.sum(tl.where(j[:, None] == k, inner, 0.0), axis=0)[None, :]
        tl.store(place, basis.to(tl.float32), mask=inside)
