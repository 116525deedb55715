"""What the subspaces of a projected optimizer hold, in numbers."""

from __future__ import annotations

import torch

from ..kernels import widest
from ..leaves import dense
from . import subspace
from .base import ProjectedAdam


def subspaces(optimizer: ProjectedAdam) -> dict[str, float]:
    """Look at the subspaces after a step, with its gradients still there.

    Args:
        optimizer: The optimizer.

    Returns:
        By name, means over the matrices that have a subspace; nothing where none has:

        - "subspace_rank", directions in use.
        - "energy_kept", `|P^T g|^2 / |g|^2`, of those whose gradient is not zero.
        - "subspace_turn", `1 - |P_new^T P_old|^2 / rank` of the last change, by the smaller of both ranks: 0 where one
          subspace holds the other, 1 where they are orthogonal.
        - "refreshes", subspaces found so far.
    """
    refs = [m for m in optimizer._refs() if optimizer.state.get(m.param, {}).get("rank")]
    states = [optimizer.state[ref.param] for ref in refs]
    if not states:
        return {}
    values = {
        name: sum(float(state[key]) for state in states) / len(states)
        for name, key in (("subspace_rank", "rank"), ("subspace_turn", "turned"), ("refreshes", "refreshes"))
    }
    kept = []
    for ref, state in zip(refs, states, strict=True):
        if ref.param.grad is None:
            continue
        rows, columns = subspace.matrix_shape(ref.param.shape)
        gradient = dense(ref.param.grad).view(rows, columns)
        oriented = gradient if subspace.is_left(rows, columns, ref.group["proj_type"]) else gradient.T
        wide = widest(gradient.device)
        whole = float(torch.linalg.vector_norm(gradient, dtype=wide)) ** 2
        if whole:
            inside = state["basis"][:, : state["rank"]].T @ oriented
            kept.append(float(torch.linalg.vector_norm(inside, dtype=wide)) ** 2 / whole)
    if kept:
        values["energy_kept"] = sum(kept) / len(kept)
    return values
