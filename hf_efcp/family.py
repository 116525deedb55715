"""What counts as an optimizer of this package."""

from __future__ import annotations

from .optimizer import EFCP
from .projected import ProjectedAdam

AnyOptimizer = EFCP | ProjectedAdam  # for annotations, `isinstance` and `issubclass` alike
