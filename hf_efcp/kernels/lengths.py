"""What updates and their rows are multiplied by to have the lengths they should have."""

from __future__ import annotations

import torch

SHORTEST = 1e-30  # length of an update that is divided by: below it is what rounding left


def factor(length: float, own: float) -> float:
    """What makes an update that is `own` long `length` long; 0 for an update of zeros.

    Args:
        length: Wanted.
        own: What it is. A tensor with so small a part in the update of the model that it is below `SHORTEST` would be
            made of what rounding left.

    Returns:
        The factor.
    """
    return length / max(own, SHORTEST) if own else 0.0


def factors(squares: torch.Tensor, limit: float, most: float) -> torch.Tensor:
    """The factors of rows: `most`, but no row is longer than `limit` with it.

    Args:
        squares: `|u_r|^2` of each row.
        limit: Longest that a row may be; infinite for none.
        most: The factor of rows that are shorter.

    Returns:
        As many, float32.
    """
    # Infinite for rows of zeros, and no number if the limit is zero as well.
    found: torch.Tensor = (limit / squares.sqrt()).nan_to_num_(nan=0.0).clamp_(max=most).to(torch.float32)
    return found
