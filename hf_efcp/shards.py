"""Parameters that are split over processes (FSDP2): every rank compresses and stores its own shard.

A rank's shard of a parameter is, to the optimizer, a parameter of its own. What is global is the Gram matrix: one
all-reduce of its new column per step. The state of a shard has a size of its own on every rank, so it is kept as a row
of a `(ranks, longest)` DTensor, padded with zeros: checkpoints then hold every rank's row, where a plain tensor would
be saved once as if all ranks had the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

State = dict[str, Any]
# Makes the tensors that belong to a parameter of some shape, on some device.
Maker = Callable[[torch.Size, "torch.device | str"], State]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor. The module is not imported for it: where there is a DTensor, it is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory; the tensor itself if it is not split."""
    if not is_sharded(tensor):
        return tensor
    part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def check(params: Iterable[torch.Tensor]) -> torch.distributed.ProcessGroup | None:
    """Refuse ways of splitting that the optimizer does not understand.

    Args:
        params: All parameters that are stepped together.

    Returns:
        The processes over which the parameters are split; None if they are not.

    Raises:
        ValueError: Some are split and others are not, or not by rows over one row of processes.
    """
    if any(getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False) for param in params):
        raise ValueError(
            "the parameters were flattened by FSDP version 1, and every rank would precondition its part alone: use "
            "version 2 (fully_shard)"
        )
    split = {is_sharded(param): param for param in params}
    if True not in split:
        return None
    if False in split:
        raise ValueError(
            "some parameters are sharded and others are not, so that the others would count once for every rank: wrap "
            "the whole model with fully_shard"
        )
    from torch.distributed.tensor import Shard

    meshes = {(param.device_mesh, tuple(param.placements)) for param in params}  # type: ignore[attr-defined]
    mesh, placements = next(iter(meshes))
    if len(meshes) > 1 or mesh.ndim != 1 or placements != (Shard(0),):
        raise ValueError(
            "sharded parameters must all be split along their first dimension over one one-dimensional mesh "
            f"(fully_shard's default), got {sorted(str(found) for found in meshes)}"
        )
    group: torch.distributed.ProcessGroup = mesh.get_group()
    return group


def all_reduce(
    values: torch.Tensor,
    group: torch.distributed.ProcessGroup | None,
    device: torch.device,
    where: torch.device | str = "cpu",
) -> torch.Tensor:
    """Sum a small tensor over ranks; every rank gets the same bits.

    Args:
        values: What this rank has, in any place.
        group: The ranks; None for a process alone.
        device: Where the parameters are, and so what the group's backend can send from.
        where: Where the sum is wanted.

    Returns:
        The sum, float64.
    """
    if group is not None:
        values = values.to(device, copy=True)
        torch.distributed.all_reduce(values, group=group)
    return values.to(where, torch.float64)


def allocate(param: torch.Tensor, make: Maker, device: torch.device | str) -> State:
    """The state that belongs to a parameter or to this rank's shard of it.

    Args:
        param: The parameter.
        make: Makes the state of a parameter of a given shape.
        device: Where; "meta" gives shapes without memory.

    Returns:
        What `make` makes, or for a shard each tensor as a row of a `(ranks, longest)` DTensor.

    Raises:
        ValueError: The ranks' shards differ so much that they need other tensors.
    """
    if not is_sharded(param):
        return make(param.shape, device)
    from torch.distributed.tensor import DTensor, Shard

    mesh = param.device_mesh  # type: ignore[attr-defined]
    # As torch.chunk cuts: full pieces first, then a shorter one, then empty ones.
    most = -(-param.shape[0] // mesh.size())
    rows = {max(0, min(most, param.shape[0] - rank * most)) for rank in range(mesh.size())}
    plans = [make(torch.Size((count, *param.shape[1:])), "meta") for count in rows]
    if any(plan.keys() != plans[0].keys() for plan in plans):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} splits over {mesh.size()} ranks into shards that are "
            "compressed in different ways: use fewer ranks or another compressor"
        )
    own = make(local(param).shape, device)
    state: State = {}
    for name, tensor in own.items():
        longest = max(plan[name].numel() for plan in plans)
        if device == "meta":
            state[name] = torch.empty(mesh.size(), longest, dtype=tensor.dtype, device="meta")
            continue
        row = torch.zeros(1, longest, dtype=tensor.dtype, device=tensor.device)
        row[0, : tensor.numel()].copy_(tensor.view(-1))
        state[name] = DTensor.from_local(row, mesh, [Shard(0)], run_check=False)
    return state


def view(state: State, param: torch.Tensor, make: Maker) -> State:
    """The state as `make` laid it out, sharing memory with what `allocate` returned.

    Args:
        state: The parameter's state.
        param: The parameter.
        make: As for `allocate`.

    Returns:
        The state itself, or the views of this rank's rows.
    """
    if not is_sharded(param):
        return state
    plan = make(local(param).shape, "meta")
    return {name: local(state[name]).view(-1)[: t.numel()].view(t.shape) for name, t in plan.items()}
