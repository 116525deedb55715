"""How long the step of each tensor is.

A preconditioner gives a direction. Its own length, about `m / |row|` for M-FAC, belongs to one window, one dampening
and one scale of the gradients, and no learning rate fits two of them. So every tensor takes its length from elsewhere:
what RMSprop would give it with one second moment for the whole tensor (grafting, Agarwal et al., arXiv 2002.11803),

    |u| = rms sqrt(n) |g| / sqrt(v),    v = mean of |g|^2 over the past, with weights 0.999^age

which is about the length of AdamW's step. On GLUE tasks and two BERT-type models, README.md, "How long a step is",
shows what that gives. Measured with it on SST-2 and not kept:

- `|u| = rms sqrt(n)` at every step, as Muon has it: needs twice AdamW's learning rate to learn at all, and diverges at
  four times. A step has to be longer when the gradient is, or noise weighs as much as signal.
- A second moment for each row of a matrix, as Adafactor has it: rows of the embedding that a batch touches for the
  first time get steps as long as all others together; some runs ended in NaN.
- One length for the whole model: a tensor whose gradients are hard to tell apart gets most of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch

from .kernels import widest
from .windows import Slab

# Gives an update from some entry on, where an earlier slab ended.
Updates = Callable[[int], Iterable[Slab]]

DECAY = 0.999  # of the second moment, as AdamW's beta2
LONGEST = 1.0 / math.sqrt(1.0 - DECAY)  # of |g| / sqrt(v)

_HELD = 6 << 20  # entries of an update that are kept while it is measured; what is beyond is computed again
_SLAB = 1 << 20  # entries whose squares are summed in float32
_NOTHING = 1e-30  # length of a part of an update that is about 1 long
_SAFE = 1e-30, 1e30  # such sums that are exact enough


def allocate(device: torch.device | str) -> torch.Tensor:
    """What is remembered of a tensor's gradients: the decayed sum of `|g|^2`, and the sum of its weights.

    Args:
        device: "meta" gives the shape without the memory; else it is on the CPU.

    Returns:
        `(2,)`, float64, zeros.
    """
    return torch.zeros(2, dtype=torch.float64, device="meta" if device == "meta" else "cpu")


def factor(squares: torch.Tensor, update: float, gradient: float, numel: int, rms: float) -> float:
    """What an update is multiplied by: `rms sqrt(n) |g| / (sqrt(v) |u|)`.

    Args:
        squares: From `allocate`; the gradient is added. Zero gradients are not.
        update: `|u|^2`.
        gradient: `|g|^2`.
        numel: Entries `n` of the whole parameter.
        rms: Root mean square of an update whose gradient is as long as in the past.

    Returns:
        The factor; 0 if the update or the gradient is zero.
    """
    if not gradient:
        return 0.0
    squares.mul_(DECAY).add_(torch.tensor([gradient, 1.0], dtype=torch.float64), alpha=1.0 - DECAY)
    moment = float(squares[0] / squares[1])
    wanted = rms * math.sqrt(numel) * math.sqrt(gradient / moment)
    # A tensor with so small a part in the update of the whole model would be made of what rounding left.
    return wanted / max(math.sqrt(update), _NOTHING) if update else 0.0


def measured(updates: Updates) -> tuple[float, Iterator[Slab]]:
    """The squared length of an update, and then the update, without a temporary of the parameter's size.

    Args:
        updates: Computes the update. Called twice if it has more than 6 Mi entries.

    Returns:
        The sum of squares, and the slabs.
    """
    held: list[Slab] = []
    square, end = 0.0, 0
    for span, update in updates(0):
        square += squared(update)
        if span.stop <= _HELD or not held:
            held.append((span, update))
        end = span.stop
    rest = held[-1][0].stop if held else 0
    return square, chain(held, updates(rest) if rest < end else ())


def squared(vector: torch.Tensor) -> float:
    """The sum of squares.

    Args:
        vector: Contiguous, float32.

    Returns:
        The sum: of parts in float32, which is ten times as fast, and in float64 where that overflows or vanishes.
    """
    total = 0.0
    for part in vector.view(-1).split(_SLAB):
        square = float(torch.dot(part, part))
        if not _SAFE[0] < square < _SAFE[1] and part.any():
            square = float(torch.linalg.vector_norm(part, dtype=widest(part.device))) ** 2
        total += square
    return total
