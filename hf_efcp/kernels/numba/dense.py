"""Sums of squares, and the last line of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.np.numpy_support import carray

from .. import pool
from . import tables
from .arrays import LIGHT, array_of
from .compiling import jit
from .scalars import next_task, pointer_to


@jit
def _squares_of_all(vectors, tasks, counter, partial):
    number: Any = next_task(counter)
    while number < tasks.shape[0]:
        task = tasks[number]
        vector = vectors[task.row]
        x = carray(pointer_to(vector.at), (vector.entries,), np.float32)[task.begin : task.end]
        total = 0.0
        for i in range(x.shape[0]):
            total += np.float64(x[i]) * np.float64(x[i])
        partial[number] = total
        number = next_task(counter)


def squares(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `reference.squares`; partial sums per range of entries, added in the order of the ranges."""
    table, counter = tables.of_vectors(vectors), np.zeros(1, np.int64)
    tasks = tables.tasks(table["entries"].tolist(), [LIGHT] * len(table))
    partial = np.zeros(len(tasks))
    pool.together(lambda: _squares_of_all(table, tasks, counter, partial), len(tasks))
    return torch.from_numpy(np.bincount(tasks["row"], partial, len(table)))


@jit
def _apply(theta, update, velocity, momentum, keep, lr, begin, end):
    if velocity.shape[0]:
        for i in range(begin, end):
            v = momentum * velocity[i] + update[i]
            velocity[i] = v
            theta[i] = keep * theta[i] - lr * v
    else:
        for i in range(begin, end):
            theta[i] = keep * theta[i] - lr * update[i]


def apply(
    theta: torch.Tensor,
    update: torch.Tensor,
    *,
    lr: float,
    keep: float,
    velocity: torch.Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """See `reference.apply`; in one pass, and multiplied and added without rounding between."""
    x, u = array_of(theta), array_of(update)
    v = np.empty(0, np.float32) if velocity is None else array_of(velocity)
    numbers = np.float32(momentum), np.float32(keep), np.float32(lr)
    pool.run(lambda _, begin, end: _apply(x, u, v, *numbers, begin, end), len(x), LIGHT)
