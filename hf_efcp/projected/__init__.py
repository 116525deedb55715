"""Adam in subspaces of the gradient: GaLore, AdaRankGrad, LORENZA and Natural GaLore, the relatives of EFCP."""

from __future__ import annotations

from .adarankgrad import AdaRankGrad
from .base import ProjectedAdam
from .base import ProjectedOptions as ProjectedOptions
from .galore import GaLore
from .lorenza import LORENZA
from .natural_galore import NaturalGaLore

# By their names for `--optim`.
RELATIVES: dict[str, type[ProjectedAdam]] = {
    "galore": GaLore,
    "adarankgrad": AdaRankGrad,
    "lorenza": LORENZA,
    "natural_galore": NaturalGaLore,
}

__all__ = ["LORENZA", "AdaRankGrad", "GaLore", "NaturalGaLore", "ProjectedAdam"]
