"""Preconditioners: Gram matrix of the window -> coefficients of its rows; and diagonal rules, which need none."""

from .base import Combination, GramPreconditioner, Preconditioner, WindowPosition
from .diagonal import AdaGradSum, AdamMoments
from .ggt import GGT
from .mfac import MFAC

__all__ = [
    "GGT",
    "MFAC",
    "AdaGradSum",
    "AdamMoments",
    "Combination",
    "GramPreconditioner",
    "Preconditioner",
    "WindowPosition",
]
