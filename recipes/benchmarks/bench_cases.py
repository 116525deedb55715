"""Who takes part in the benchmark: cases as "label: optimizer options", built, stepped once, windows filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from bench_baselines import BASELINES, PUBLISHED_ROWS, AsPublished, published_rows
from peers import parse_options
from training import state_bytes

from hf_efcp import EFCP, OPTIMIZERS, create_optimizer
from hf_efcp.blocks import Piece, as_indices, cut
from hf_efcp.factory import efcp_name, parse_optim_args

# Tensors of a state that are the window. All else (errors, sums, moments) stays as the first step left it.
WINDOW = ("indices", "values", "scales", "left", "right")
_ROOM = 0.8  # of the memory that is available


@dataclass(frozen=True)
class Case:
    """An optimizer and its options.

    Args:
        label: Its name in tables and figures.
        optimizer: A key of `hf_efcp.OPTIMIZERS` or of `BASELINES`.
        options: As in `optim_args` of training arguments.
        optional: It is left out, with the reason, where it cannot be built.
    """

    label: str
    optimizer: str
    options: str = ""
    optional: bool = False


ADAMW = "AdamW (fused)"
PUBLISHED = "as published, m = 1024"
SPARSE_256 = "sparse M-FAC, m = 256"
SPARSE_1024 = "sparse M-FAC, m = 1024"
SMALLEST = "sparse M-FAC, m = 256, 8 bits"
LOW_RANK = "low-rank M-FAC"
MOMENTS = "low-rank M-FAC, both moments"
# Ours at its defaults, and with both moments of AdamW; then the papers' rules, which have no metric.
DEFAULTS = tuple(
    Case(label, optimizer, options, optional=True)
    for label, optimizer, options in (
        (ADAMW, "adamw", ""),
        ("SGD, momentum (fused)", "sgd", ""),
        ("GaLore, rank 128, between its SVDs", "galore_torch", ""),
        ("AdamW, 8 bits", "adamw_8bit", ""),
        ("Adafactor", "adafactor", ""),
        ("Muon", "muon", ""),
        ("SOAP, between its QRs", "soap", "precondition_frequency=1000"),
        ("SOAP, a QR at every step", "soap", "precondition_frequency=1"),
        ("Shampoo, between its roots", "shampoo", "preconditioning_compute_steps=1000"),
        (LOW_RANK, "lowrank_mfac", ""),
        (MOMENTS, "lowrank_mfac", "metric_dtype=float32,precondition=momentum"),
        ("sparse M-FAC, m = 64", "sparse_mfac", "num_grads=64,metric=none"),
        (SPARSE_256, "sparse_mfac", "num_grads=256,metric=none"),
        (SPARSE_1024, "sparse_mfac", "num_grads=1024,metric=none"),
        ("sparse M-FAC, m = 1024, 0.1 %", "sparse_mfac", "num_grads=1024,density=0.001,metric=none"),
        ("sparse M-FAC, m = 256, blocks of 256", "sparse_mfac", "num_grads=256,block_size=256,metric=none"),
        (SMALLEST, "sparse_mfac", "num_grads=256,block_size=256,value_dtype=int8,error_dtype=int8,metric=none"),
        ("low-rank M-FAC, m = 32, rank 4", "lowrank_mfac", "num_grads=32,rank=4,metric=none"),
        ("sparse GGT, m = 32", "sparse_ggt", "num_grads=32,metric=none"),
        ("MicroAdam, m = 10", "microadam", "num_grads=10"),
        ("sparse AdaGrad", "sparse_adagrad", ""),
        ("dense M-FAC, m = 32", "dense_mfac", "num_grads=32,metric=none"),
        (PUBLISHED, "published", "num_grads=1024"),
    )
)


def parse_case(text: str) -> Case:
    """Read "label: optimizer options"; without a label, the rest is the label.

    Args:
        text: For example "small: sparse_mfac num_grads=64,block_size=256", or "dense_ggt".

    Returns:
        The case.

    Raises:
        ValueError: There is no such optimizer.
    """
    label, colon, rest = text.partition(": ")
    name, _, options = (rest if colon else label).strip().partition(" ")
    if efcp_name(name) is None and name not in BASELINES:
        raise ValueError(
            f"unknown optimizer {name!r} in {text!r}; expected one of {', '.join([*OPTIMIZERS, *BASELINES])}"
        )
    return Case(label.strip(), name, options.strip())


def build(case: Case, model: torch.nn.Module, seed: int, available: Callable[[], int]) -> torch.optim.Optimizer:
    """Make an optimizer over the model at learning rate 0, step it so that its state exists, and fill its window.

    At learning rate 0 the parameters stay what they are, for all cases, and the work is the same.

    Args:
        case: Which.
        model: Its parameters have gradients.
        seed: Seed of the window's rows.
        available: Tells the bytes that are free.

    Returns:
        The optimizer. The published algorithm has fewer rows than were asked for where memory is short.

    Raises:
        MemoryError: Its state would not fit.
    """
    room = int(_ROOM * available())
    numel = sum(param.numel() for param in model.parameters())
    if case.optimizer in BASELINES:
        options = parse_options(case.options)
        if case.optimizer == "published":
            wanted, density = options.get("num_grads", PUBLISHED_ROWS), options.get("density", 0.01)
            options["num_grads"] = published_rows(numel, wanted, density, room)
            if not options["num_grads"]:
                raise MemoryError(f"{case.label} has no room for a single row in {room / 2**30:.1f} GiB")
        optimizer = BASELINES[case.optimizer](model, **options)
        if isinstance(optimizer, AsPublished):
            optimizer.fill(seed)
        return optimizer

    arguments = parse_optim_args(case.optimizer, case.options)
    efcp = create_optimizer(case.optimizer, model, lr=0.0, **arguments)
    for group in efcp.param_groups:
        group["lr"] = 0.0  # of excluded parameters too
    need = efcp.planned_memory()["total"]
    if need > room:
        raise MemoryError(f"{case.label} needs {need / 2**30:.1f} GiB of state, and {room / 2**30:.1f} GiB may be used")
    efcp.step()
    if isinstance(efcp, EFCP):
        fill_window(efcp, seed)
    return efcp


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    return int(psutil.virtual_memory().available)


def fill_window(optimizer: EFCP, seed: int) -> None:
    """Fill the window of an optimizer that was stepped once, from nothing, with random rows.

    The rows are about as long as the one that the step has pushed, and nearly orthogonal. The Gram matrix is a random
    symmetric positive definite one of that size, not that of the rows: computing it would take as many steps as there
    are rows. It stays positive definite while its columns are replaced by true ones, one a step, unless it belongs to
    few entries, as that of a bias may: their rows cannot be orthogonal.

    Args:
        optimizer: Updated.
        seed: Seed of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    group = optimizer.param_groups[0]
    capacity = group["num_grads"]
    for param, state in optimizer.state.items():
        for name in WINDOW:
            if name in state and name != "indices":
                _fill_values(state[name], capacity, generator, positive=name == "scales")
        if "indices" in state:
            pieces = cut(param.numel(), group["block_size"], group["density"])
            _fill_indices(as_indices(state["indices"], group["block_size"]), pieces, capacity, generator)
        if "pushed" in state:
            state["pushed"] = capacity
        if "gram" in state:
            noise = torch.randn(capacity, capacity, dtype=torch.float64, generator=generator)
            spread = torch.eye(capacity, dtype=torch.float64).mul_(0.9).addmm_(noise, noise.T, alpha=0.1 / capacity)
            state["gram"].copy_(state["gram"][0, 0] * spread)


def _fill_values(tensor: torch.Tensor, capacity: int, generator: torch.Generator, *, positive: bool) -> None:
    """Random entries of the mean square of the one row that is there; integers are levels."""
    if not tensor.is_floating_point():
        tensor.random_(-127, 128, generator=generator)
        return
    size = math.sqrt(capacity / max(1, tensor.numel())) * float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
    if positive:
        tensor.uniform_(0.5 * size, 1.5 * size, generator=generator)
    else:
        tensor.normal_(0.0, size, generator=generator)


def _fill_indices(indices: torch.Tensor, pieces: tuple[Piece, ...], capacity: int, generator: torch.Generator) -> None:
    """One entry from each of `kept` equal stretches of a block: distinct, ascending, everywhere."""
    for piece in pieces:
        start = capacity * piece.offset
        edges = torch.arange(piece.kept + 1) * piece.length // piece.kept
        width = edges.diff()
        at_a_time = max(1, (1 << 22) // (capacity * piece.kept))
        for block in range(0, piece.blocks, at_a_time):
            shape = (min(at_a_time, piece.blocks - block), capacity, piece.kept)
            at = edges[:-1] + (torch.rand(shape, generator=generator) * width).long()
            begin = start + block * capacity * piece.kept
            indices[begin : begin + at.numel()] = at.view(-1).to(indices.dtype)


def window_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors that the window consists of; none for optimizers without one."""
    if isinstance(optimizer, AsPublished):
        return [optimizer.indices, optimizer.values]
    if not isinstance(optimizer, EFCP):
        return []
    return [state[name] for state in optimizer.state.values() for name in WINDOW if name in state]


def state_memory(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the state by part; another library's state is one part, its moments."""
    if isinstance(optimizer, EFCP | AsPublished):
        return optimizer.memory()
    total = state_bytes(optimizer)
    return {**dict.fromkeys(("indices", "values", "error", "metric", "gram"), 0), "momentum": total, "total": total}
