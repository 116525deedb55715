"""What each process does with its shards."""

import copy

import torch
from papers import DenseMFAC, LowRankMFAC, MicroAdam, SparseGGT, SparseMFAC
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_efcp import EFCP
from hf_efcp.compressors import TopK
from hf_efcp.preconditioners import MFAC

STEPS = 12


SETTINGS = {
    "dense": (DenseMFAC, dict(lr=0.03, num_grads=5, damp=1e-3, momentum=0.5, weight_decay=0.1)),
    "sparse at density 1": (
        SparseMFAC,
        dict(lr=0.03, num_grads=5, damp=1e-3, density=1.0, block_size=16, value_dtype=torch.float32),
    ),
    "sparse": (SparseMFAC, dict(lr=0.03, num_grads=5, damp=1e-3, density=0.1, block_size=16, momentum=0.5)),
    "int8": (
        SparseMFAC,
        dict(
            lr=0.03, num_grads=5, damp=1e-3, density=0.1, block_size=16, value_dtype=torch.int8, error_dtype=torch.uint4
        ),
    ),
    "wide indices": (SparseMFAC, dict(lr=0.03, num_grads=5, damp=1e-3, density=0.1)),
    "low rank": (LowRankMFAC, dict(lr=0.03, num_grads=5, damp=1e-3, rank=1, momentum=0.5)),
    "4-bit error": (MicroAdam, dict(lr=0.02, num_grads=5, density=0.2, block_size=16)),
    "ggt": (SparseGGT, dict(lr=0.1, num_grads=5, eps=1e-3, density=0.1, block_size=16)),
    "metric": (
        DenseMFAC,
        dict(
            lr=0.01, num_grads=5, metric="adam", precondition="momentum", momentum_dtype=torch.float32,
            metric_dtype=torch.float32,
            trust_lr=0.01,
        ),
    ),
    "metric of the model": (
        SparseGGT,
        dict(
            lr=0.01, num_grads=5, density=1.0, value_dtype=torch.float32, metric="adam",
            metric_dtype=torch.float32,
            precondition="gradient", scope="model", error_dtype=torch.float32, trust_lr=0.01,
        ),
    ),
    "metric in few bits": (
        LowRankMFAC,
        dict(lr=0.01, num_grads=5, rank=1, metric="adam", precondition="momentum"),
    ),
    "factored": (LowRankMFAC, dict(lr=0.01, num_grads=5, rank=1, metric="factored")),
}  # fmt: skip


RESUMED = ("dense", "sparse", "int8", "wide indices", "low rank", "4-bit error", "metric in few bits", "factored")


def network():
    """Rows that two and three ranks do not divide, and one that leaves a rank without any."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, 6, generator=generator)
    return x, x.sum(dim=1, keepdim=True).sin()


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, steps, rank=0, ranks=1):
    for step in steps:
        optimizer.zero_grad()
        x, y = (part.chunk(ranks)[rank] for part in batch(step))
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def whole(model):
    """The parameters, gathered."""
    return [
        (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for param in model.parameters()
    ]


def sharded_run(rank, name, ranks):
    cls, settings = SETTINGS[name]
    model = shard(network())
    optimizer = cls(model.parameters(), **settings)
    planned = optimizer.planned_memory()
    train(model, optimizer, range(STEPS), rank, ranks)
    grams = [state["gram"] for state in optimizer.state.values() if "gram" in state]
    assert len(grams) == (1 if optimizer._structure["scope"] == "model" else len(list(model.parameters())))
    return whole(model), torch.stack(grams), optimizer.memory(), planned


def moved(ends, start):
    return torch.cat([(end - begin).flatten() for end, begin in zip(ends, start, strict=True)])


def resumed_run(rank, name, full, folder):
    """Train, save through torch.distributed.checkpoint in the middle, load into fresh ones, go on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    cls, settings = SETTINGS[name]
    model = shard(network())
    optimizer = cls(model.parameters(), **settings)
    train(model, optimizer, range(7), rank, 2)
    middle = copy.deepcopy(model.state_dict())
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if full:
        saved = copy.deepcopy(saved)  # what is not split is handed out as it is, and training goes on
    else:
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
    train(model, optimizer, range(7, STEPS), rank, 2)

    other = shard(network())
    other.load_state_dict(middle)
    fresh = cls(other.parameters(), **settings)
    if not full:
        saved = get_optimizer_state_dict(other, fresh, options=options)
        container = {"optimizer": saved}
        dcp.load(container, checkpoint_id=folder)
        saved = container["optimizer"]
    set_optimizer_state_dict(other, fresh, saved, options=options)
    train(other, fresh, range(7, STEPS), rank, 2)
    dtypes = {str(value.dtype) for state in fresh.state.values() for value in state.values() if torch.is_tensor(value)}
    return whole(model), whole(other), middle["0.weight"].full_tensor(), dtypes


def broadcast_run(rank):
    """Whole parameters, of which rank 0 alone has the checkpoint."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    cls, settings = SETTINGS["wide indices"]
    model, other = network(), network()
    optimizer, fresh = (cls(some.parameters(), **settings) for some in (model, other))
    train(model, optimizer, range(7))
    other.load_state_dict(model.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options)) if rank == 0 else {}
    set_optimizer_state_dict(other, fresh, saved, options=options)
    middle = whole(model)
    for some, each in ((model, optimizer), (other, fresh)):
        train(some, each, range(7, STEPS))
    return whole(model), whole(other), middle


def excluded(params):
    """The last layer is preconditioned, and nothing else."""
    params = list(params)
    return LowRankMFAC([{"params": params[:-2], "preconditioned": False}, {"params": params[-2:]}], lr=0.02)


def given(step, params):
    """Gradients of whole parameters, some beyond what has a square."""
    generator = torch.Generator().manual_seed(step)
    return [10 ** (25.0 * (step == 2)) * torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def excluded_run(rank):
    """Sharded bfloat16 parameters that are stepped as AdamW, resumed from moments in bfloat16."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.tensor import distribute_tensor

    def stepped(model, optimizer, steps):
        for step in steps:
            for param, grad in zip(model.parameters(), given(step, model.parameters()), strict=True):
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
            optimizer.step()
        return whole(model)

    models = [shard(network().to(torch.bfloat16)) for _ in range(2)]
    optimizer, fresh = (excluded(model.parameters()) for model in models)
    planned = optimizer.planned_memory()
    first = stepped(models[0], optimizer, range(6))
    moments = [state for state in optimizer.state.values() if "exp_avg" in state]
    found = {value.dtype for state in moments for value in state.values()}, optimizer.memory() == planned
    for state in moments:
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(state[name].to(torch.bfloat16))
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], optimizer))
    for state in saved["state"].values():
        for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
            state[name] = state[name].to(torch.bfloat16)
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], fresh, saved)
    ends = [stepped(model, some, range(6, 9)) for model, some in zip(models, (optimizer, fresh), strict=True)]
    return first, *found, *ends


def faulty_run(rank, policy):
    """A gradient that is not finite on rank 1 only."""
    model = shard(network())
    optimizer = EFCP(
        model.parameters(), 0.1, compressor=TopK(0.5, 16), preconditioner=MFAC(1e-2), num_grads=4, nonfinite=policy
    )
    train(model, optimizer, range(3), rank, 2)
    before, states = whole(model), copy.deepcopy(optimizer.state_dict()["state"])
    if rank == 1:
        next(iter(model.parameters())).grad.to_local()[0, 0] = float("nan")
    message = None
    try:
        optimizer.step()
    except ValueError as error:
        message = str(error)
    same = all(torch.equal(one, other) for one, other in zip(before, whole(model), strict=True))
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            old = states[key][name]
            same &= torch.equal(value.to_local(), old.to_local()) if hasattr(value, "to_local") else True
            same &= value == old if isinstance(value, int) else True
    skipped = optimizer.skipped_steps
    train(model, optimizer, range(3, 5), rank, 2)
    return message, same, skipped, not torch.equal(before[0], whole(model)[0])


def refused_run(rank):
    """What cannot work on shards."""
    messages = []
    model = shard(network())
    plain = nn.Parameter(torch.ones(3))
    optimizer = SparseMFAC([*model.parameters(), plain])
    x, y = batch(0)
    nn.functional.mse_loss(model(x), y).backward()
    plain.grad = torch.ones(3)
    try:
        optimizer.step()
    except ValueError as error:
        messages.append(str(error))
    flattened = FullyShardedDataParallel(nn.Linear(8, 8), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = SparseMFAC(flattened.parameters())
    flattened(torch.ones(2, 8)).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        messages.append(str(error))
    optimizer = SparseMFAC(model.parameters(), num_grads=4, block_size=256)
    optimizer.step()
    gathered = optimizer.state_dict()
    gathered["state"] = {
        key: {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
        for key, state in gathered["state"].items()
    }
    try:
        optimizer.load_state_dict(gathered)
    except ValueError as error:
        messages.append(str(error))
    return messages


def everything(rank, ranks, folder):
    """All runs in one pair of processes: starting them is what takes the time."""
    compared = ("dense", "sparse at density 1", "sparse", "ggt", "metric", "metric of the model")
    results = {name: sharded_run(rank, name, ranks) for name in compared}
    if ranks == 2:
        for name in RESUMED:
            for full in (False, True):
                results["resumed", name, full] = resumed_run(rank, name, full, f"{folder}/{name}")
        results["broadcast"] = broadcast_run(rank)
        results["faults"] = [faulty_run(rank, policy) for policy in ("raise", "skip")]
        results["refused"] = refused_run(rank)
        results["excluded"] = excluded_run(rank)
    return results
