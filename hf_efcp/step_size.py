"""How long the step of each tensor is.

A preconditioner gives a direction. Its own length, about `m / |row|` for M-FAC, belongs to one window, one dampening
and one scale of the gradients, and no learning rate fits two of them. So every tensor takes its length from elsewhere:
what RMSprop would make of the vector that is preconditioned, with one second moment for the whole tensor (grafting,
Agarwal et al., arXiv 2002.11803),

    |u| = rms sqrt(n) |x| / sqrt(v),    x = row,    v = mean of |g|^2 over the past, with weights 0.999^age

which is about the length of AdamW's step. It is the row that counts and not the gradient, because the row has in it
what error feedback has saved up: where gradients agree over steps it is longer than they are, ten times with 1 % kept,
where they are noise it is as long, and in the sum over steps nothing is lost. With the gradient's length, directions
in which gradients agree would move ten times less than with AdamW. And no row of a matrix has more than three times the
root mean square of the whole: in an embedding, a few rows (`[CLS]`, `.`, `the`) would else move by what is meant for
thirty thousand.

What it gives is in README.md, "How long a step is". Tried beside it, on SST-2 and Rotten Tomatoes with 2 layers, and
not kept:

- `|u| = rms sqrt(n)` at every step, as Muon has it: learns at twice AdamW's learning rate and not at once or four
  times. A step has to be longer when the gradient is, or noise weighs as much as signal.
- The gradient's length in the place of the row's, with 1 % kept: one of two runs of 90 steps never left chance, at a
  learning rate at which AdamW learns.
- The same without the limit for rows: as good on SST-2; on Rotten Tomatoes good at one learning rate and lost at the
  next.
- A second moment for each row, as Adafactor has it, for the length of the matrix: some runs ended in NaN. For the
  length of each row: learns more slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from .kernels import Kernels, lengths, widest
from .windows import Slab

# Gives an update from some entry on, where an earlier slab ended.
Updates = Callable[[int], Iterable[Slab]]

DECAY = 0.999  # of the second moment, as AdamW's beta2
LONGEST = 1.0 / math.sqrt(1.0 - DECAY)  # that |x| / sqrt(v) may be: what |g| / sqrt(v) can
LONGEST_ROW = 3.0  # root mean square of a row of a matrix, over that of the matrix

_HELD = 4 << 20  # entries of an update that are kept while it is measured


def allocate(device: torch.device | str) -> torch.Tensor:
    """What is remembered of a tensor's gradients: the decayed sum of `|g|^2`, and the sum of its weights.

    Args:
        device: "meta" gives the shape without the memory; else it is on the CPU.

    Returns:
        `(2,)`, float64, zeros.
    """
    return torch.zeros(2, dtype=torch.float64, device="meta" if device == "meta" else "cpu")


def wanted(squares: torch.Tensor, gradient: float, preconditioned: float, rms: float) -> float:
    """Remember a gradient's length, and tell the root mean square of its update: `rms |x| / sqrt(v)`.

    Not more than `LONGEST` times `rms`.

    Args:
        squares: From `allocate`; the gradient is added. Zero gradients are not.
        gradient: `|g|^2`.
        preconditioned: `|x|^2` of what the preconditioner is applied to.
        rms: Root mean square of an update from a vector that is as long as gradients were in the past.

    Returns:
        The root mean square; 0 for a vector of zeros, or before the first gradient that is not zero.
    """
    total, weights = squares.tolist()
    if gradient:
        total, weights = DECAY * total + (1.0 - DECAY) * gradient, DECAY * weights + (1.0 - DECAY)
        squares.copy_(torch.tensor([total, weights], dtype=torch.float64, device="cpu"))
    if not total:
        return 0.0
    return rms * min(math.sqrt(preconditioned * weights / total), LONGEST)


class Stretch(NamedTuple):
    """How an update that is one whole gets its length, as `kernels.Move` takes it.

    Args:
        columns: Entries of a row that has a limit; of the whole where none has.
        factor: What the update is multiplied by; None for what makes it `length` long.
        length: Of the update.
        limit: Longest that a row may be.
    """

    columns: int
    factor: float | None
    length: float
    limit: float


def stretch(shape: torch.Size, rms: float, square: float | None) -> Stretch:
    """What `measure` and `sized` do together, for an update that need not be held to be measured.

    Args:
        shape: Shape of the parameter, which is whole.
        rms: The root mean square of its update, if no row is too long.
        square: `|u|^2` where it is known.

    Returns:
        The numbers.
    """
    columns, numel = row_length(shape), shape.numel()
    factor = None if square is None else _factor(rms, square, numel)
    limit = _longest_row(rms, columns) if len(shape) > 1 else math.inf
    return Stretch(columns, factor, rms * math.sqrt(numel), limit)


class Sized(NamedTuple):
    """An update, slab by slab, and what its rows, of so many `columns`, are multiplied by: `(rows,)`, float32.

    The factors of a slab are there when the slab is.
    """

    slabs: Iterable[Slab]
    columns: int
    factors: torch.Tensor


def unsized(slabs: Iterable[Slab], shape: torch.Size, device: torch.device, factor: float) -> Sized:
    """An update that is multiplied by one factor.

    Args:
        slabs: The update.
        shape: Shape of the parameter.
        device: Where it is.
        factor: The factor.

    Returns:
        The update and its factors.
    """
    factors = torch.full((_rows(shape),), factor, dtype=torch.float32, device=device)
    return Sized(slabs, row_length(shape), factors)


@dataclass(frozen=True)
class Measured:
    """An update whose rows were measured, without a temporary of the parameter's size.

    Args:
        rows: `|u_r|^2` of each row, or of the whole parameter where it is a vector.
        columns: Entries of a row.
        matrix: Whether it is one, whose rows have a limit. A shard of a vector is no row.
        slabs: The update.
    """

    rows: torch.Tensor
    columns: int
    matrix: bool
    slabs: Iterable[Slab]

    @property
    def square(self) -> float:
        """`|u|^2`."""
        return float(self.rows.sum())

    def sized(self, rms: float, square: float, numel: int) -> Sized:
        """The update with a root mean square, and no row longer than it may be.

        Args:
            rms: The root mean square of the whole parameter, if no row is too long.
            square: `|u|^2` of the whole parameter, of which this may be a shard.
            numel: Its entries.

        Returns:
            The update and its factors.
        """
        factors = _factors(self.rows, self.columns, rms if self.matrix else math.inf, _factor(rms, square, numel))
        return Sized(self.slabs, self.columns, factors)


def measure(updates: Updates, shape: torch.Size, device: torch.device, kernels: Kernels) -> Measured:
    """Measure an update.

    Args:
        updates: Computes it. Called twice if it has more than 4 Mi entries.
        shape: Shape of the parameter.
        device: Where it is.
        kernels: The backend.

    Returns:
        The update and the lengths of its rows.
    """
    columns = row_length(shape)
    rows = torch.zeros(_rows(shape), dtype=widest(device), device=device)
    held: list[Slab] = []
    end = 0
    for span, update in updates(0):
        kernels.row_squares(update, span.start, columns, rows)
        if span.stop <= _HELD or not held:
            held.append((span, update))
        end = span.stop
        del update  # before the next one is made
    rest = held[-1][0].stop if held else 0
    return Measured(rows, columns, len(shape) > 1, chain(held, updates(rest) if rest < end else ()))


def in_one_pass(
    updates: Updates, shape: torch.Size, device: torch.device, kernels: Kernels, *, rms: float, square: float
) -> Sized:
    """As `measure` and `sized` together, for an update whose length is known before it is computed.

    Args:
        updates: Computes it; called once.
        shape: Shape of the parameter, which is whole.
        device: Where it is.
        kernels: The backend.
        rms: The root mean square of the parameter's update, if no row is too long.
        square: `|u|^2`.

    Returns:
        The update and its factors.
    """
    columns, factor = row_length(shape), _factor(rms, square, shape.numel())
    factors = torch.full((_rows(shape),), factor, dtype=torch.float32, device=device)
    if len(shape) < 2:
        return Sized(updates(0), columns, factors)
    rows = torch.zeros(_rows(shape), dtype=widest(device), device=device)

    def slabs() -> Iterator[Slab]:
        waiting: list[Slab] = []  # parts of a row whose end is in a later slab
        known = 0
        for span, update in updates(0):
            kernels.row_squares(update, span.start, columns, rows)
            whole = span.stop // columns
            factors[known:whole] = _factors(rows[known:whole], columns, rms, factor)
            known = whole
            end = max(span.start, min(whole * columns, span.stop))
            if end > span.start:
                yield from waiting
                yield slice(span.start, end), update[: end - span.start]
                waiting.clear()
            if end < span.stop:
                waiting.append((slice(end, span.stop), update[end - span.start :].clone()))
            del update  # before the next one is made

    return Sized(slabs(), columns, factors)


def knows_length(shape: torch.Size) -> bool:
    """Whether a parameter is so large that its part of the Gram matrix is kept, which tells `|u|` beforehand.

    The update of a smaller one is kept while it is measured; that of a larger one would be computed twice.

    Args:
        shape: Its shape.

    Returns:
        Whether it is.
    """
    return shape.numel() > _HELD and (len(shape) < 2 or row_length(shape) <= _HELD)


def _factor(rms: float, square: float, numel: int) -> float:
    """What makes an update of `|u|^2 = square` one of that root mean square."""
    return lengths.factor(rms * math.sqrt(numel), math.sqrt(square))


def _factors(rows: torch.Tensor, columns: int, rms: float, factor: float) -> torch.Tensor:
    """The factors of rows, float32: `factor`, but no row has more than `LONGEST_ROW` times `rms` with it."""
    return lengths.factors(rows, _longest_row(rms, columns), factor)


def _longest_row(rms: float, columns: int) -> float:
    return LONGEST_ROW * rms * math.sqrt(columns)


def _rows(shape: torch.Size) -> int:
    """Rows of a matrix; a vector is one row."""
    return shape[0] if len(shape) > 1 else 1


def row_length(shape: torch.Size) -> int:
    """Entries of a row of a matrix; a vector is one row.

    Args:
        shape: Of a parameter.

    Returns:
        Their number.
    """
    return shape[1:].numel() if len(shape) > 1 else shape.numel()
