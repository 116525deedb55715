"""Subspaces of a gradient: which side is projected, how a basis is found, and random numbers equal on all replicas."""

from __future__ import annotations

import torch

from ..noise import MASK, key, mix

PROJ_TYPES = ("std", "reverse_std", "left", "right")
_OVERSAMPLED = 8  # columns of a sketch beyond the rank (Halko et al., arXiv 0909.4061, recommend 5 to 10)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter, n-D ones flattened behind their first dimension.

    Args:
        shape: Its shape.

    Returns:
        Both; (1, entries) for what is no matrix.
    """
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], torch.Size(shape[1:]).numel()


def is_left(rows: int, columns: int, proj_type: str) -> bool:
    """Whether `R = P^T G`, so that rows are projected; else `R = P^T G^T`, and columns are.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        proj_type: "std" projects the shorter side (columns, if the matrix is square), "reverse_std" the other one;
            "left" always rows, "right" always columns.

    Returns:
        True for rows.
    """
    if proj_type in ("left", "right"):
        return proj_type == "left"
    return (rows < columns) == (proj_type == "std")


def exact(gradient: torch.Tensor, rank: int, left: bool) -> torch.Tensor:
    """The first singular vectors of a gradient.

    The signs are LAPACK's for the matrix as it stands: moments that stay as they are at a refresh depend on them.

    Args:
        gradient: `G`, (rows, columns), float32.
        rank: How many, at most the shorter side.
        left: The left ones; else the right ones.

    Returns:
        (rows, rank), or (columns, rank) for the right ones; orthonormal columns.
    """
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    found: torch.Tensor = U[:, :rank] if left else Vh[:rank].T
    return found


def sketched(gradient: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a randomized range finder: `Y = G Omega`, `Q0 = qr(Y)`, `Q = Q0 U` with `U S V^T = Q0^T G`.

    Halko, Martinsson and Tropp (arXiv 0909.4061), with eight columns more than the rank and no power iteration.

    Args:
        gradient: `G`, (n, others), float32; `n` is the side that is projected.
        rank: How many vectors, at most `n`.
        generator: Of `Omega`, on the CPU.

    Returns:
        The basis, (n, rank), and all singular values that the sketch has, descending.
    """
    columns = min(rank + _OVERSAMPLED, *gradient.shape)
    omega = torch.randn(gradient.shape[1], columns, generator=generator, dtype=torch.float32, device="cpu")
    Q0 = torch.linalg.qr(gradient @ omega.to(gradient.device)).Q
    U, values, _ = torch.linalg.svd(Q0.T @ gradient, full_matrices=False)
    return Q0 @ U[:, :rank], values


def generator(seed: int, position: int, step: int, stream: int = 0) -> torch.Generator:
    """Random numbers that depend on when and where alone: equal on replicas and after a resume.

    Args:
        seed: The optimizer's.
        position: Of the parameter among all of the optimizer.
        step: Gradients that the parameter has had.
        stream: Tells apart what is drawn in one step.

    Returns:
        A generator on the CPU; the global one is not touched.
    """
    bits = mix(key(step, position) ^ mix(seed & MASK) ^ mix((stream << 16) & MASK))
    return torch.Generator("cpu").manual_seed(bits)
