"""What preconditioning does to gradients, measured from outside the optimizer: rotation, scaling, error, rank.

In a loop of one's own, around any step:

    loss.backward()
    before = snapshot(optimizer)
    optimizer.step()
    print(measure(optimizer, before))
    optimizer.zero_grad()

Nothing here changes the optimizer, its parameters or their gradients. `hf_efcp.EFCPCallback` does the same in the
Trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import checks
from .family import AnyOptimizer
from .kernels import choose, widest
from .leaves import ParamRef
from .optimizer import EFCP
from .projected import ProjectedAdam
from .projected.diagnostics import subspaces
from .shards import is_sharded
from .threads import one_thread

QUANTILES = (0.05, 0.5, 0.95)

_SLAB = 1 << 20  # entries that exist in float64 at a time


@dataclass(frozen=True)
class Before:
    """A parameter before a step, and what its group will do to it.

    Args:
        param: The parameter.
        theta: A copy of it, flat.
        lr: Learning rate of the step.
        keep: What decoupled weight decay multiplies the parameter by.
        l2: Weight decay that is added to the gradient.
    """

    param: torch.Tensor
    theta: torch.Tensor
    lr: float
    keep: float
    l2: float


@dataclass(frozen=True)
class Snapshot:
    """What `measure` has to know from before the step.

    Args:
        params: The preconditioned parameters that have a gradient.
        pushed: Rows pushed so far.
    """

    params: list[Before]
    pushed: int


def snapshot(optimizer: AnyOptimizer) -> Snapshot:
    """Copy the preconditioned parameters that have a gradient: to be called between `backward()` and `step()`.

    Args:
        optimizer: The optimizer.

    Returns:
        What `measure` takes. It holds as many bytes as the parameters.
    """
    refuse_shards(optimizer)
    params = []
    for _, group, param in _preconditioned(optimizer):
        if param.grad is None:
            continue
        lr, decay, decoupled = (
            float(group["lr"]),
            float(group["weight_decay"]),
            group.get("decoupled_weight_decay", True),
        )
        theta = param.detach().clone(memory_format=torch.contiguous_format).view(-1)
        params.append(Before(param, theta, lr, 1.0 - lr * decay if decoupled else 1.0, 0.0 if decoupled else decay))
    return Snapshot(params, _pushed(optimizer))


def measure(optimizer: AnyOptimizer, before: Snapshot) -> dict[str, float]:
    """Compare a step's update with its gradient, and look at the state: to be called before `zero_grad()`.

    `g` is the gradient that the optimizer saw: clipped, unscaled, with L2 regularisation. `u` is what moved the
    parameters, divided by the learning rate, without decoupled weight decay, with momentum. It is read off the
    parameters, so an entry whose movement is lost in their rounding has not moved. Errors, rows and the Gram matrix are
    in the optimizer's metric, gradient and update are not.

    Args:
        optimizer: The optimizer, after the step.
        before: Its `snapshot` from right before the step.

    Returns:
        By name, each only where there is such a thing:

        - "gradient_norm", `|g|`. This and the next three: unless the step was skipped.
        - "update_norm", `|u|`, over the groups whose learning rate is not 0, as are the next two.
        - "cosine", of `u` and `g`: 1 where preconditioning does not rotate. Needs that both are not 0.
        - "scaling_p05", "scaling_p50", "scaling_p95": quantiles of `|u_i / g_i|`, over the entries where neither is 0.
        - "error_norm" and "error_share", see the functions. Unless nothing is compressed.
        - "effective_rank" of the Gram matrix; with `scope="layer"` the mean over parameters. Not for diagonal rules.
        - "subspace_rank", "energy_kept", "subspace_turn", "refreshes": see `hf_efcp.projected.diagnostics.subspaces`.
        - "state_bytes", and "state_bytes_per_parameter" over all parameters that have a state.

    Raises:
        ValueError: The gradients are gone.
    """
    refuse_shards(optimizer)
    values: dict[str, float] = {}
    if _pushed(optimizer) > before.pushed:
        values |= _compare(before.params)
    if isinstance(optimizer, ProjectedAdam):
        values |= subspaces(optimizer)
    elif units := _units(optimizer):
        if not optimizer._layout.compressor.lossless:
            error = _error_square(optimizer, units)
            values |= {"error_norm": math.sqrt(error), "error_share": _share(error, _row_square(optimizer, units))}
        if optimizer._preconditioner.uses_gram:
            ranks = [effective_rank(_written(optimizer, unit)) for unit in units]
            values["effective_rank"] = sum(ranks) / len(ranks)
    values["state_bytes"] = total = optimizer.memory()["total"]
    if stepped := sum(ref.param.numel() for ref in optimizer._refs() if optimizer.state.get(ref.param)):
        values["state_bytes_per_parameter"] = total / stepped
    return values


def error_norm(optimizer: EFCP) -> float:
    """`|e|` over all parameters: the sum of the gradients that are not in the window yet.

    Args:
        optimizer: The optimizer.

    Returns:
        The length of the error as it is kept, rounding included; 0 where nothing is compressed or before the first
        step.
    """
    refuse_shards(optimizer)
    return math.sqrt(_error_square(optimizer, _units(optimizer)))


def error_share(optimizer: EFCP) -> float:
    """`|e| / |a|` of the last step: which part of the accumulator `a = e_old + g` compression has left out.

    0 is no error; 1 is an error so long that a row does not shorten it. Neither `g` nor `e_old` is needed, since
    `a = row + e` with the newest row and the error that it left, and the two are orthogonal: Top-k's have no entry in
    common, and low rank's row is the projection of `a`. Hence `|a|^2 = |row|^2 + |e|^2`. Rows stored in bfloat16 leave
    their rounding in the error, which changes the share by at most 0.4 %. Parameters that were without a gradient count
    with their error, and with `scope="layer"` with their last row as well.

    Args:
        optimizer: The optimizer.

    Returns:
        The share; 0 where nothing is compressed, before the first step, or where all is zero.
    """
    refuse_shards(optimizer)
    units = _units(optimizer)
    return _share(_error_square(optimizer, units), _row_square(optimizer, units))


def effective_rank(gram: torch.Tensor) -> float:
    """The exponential of the entropy of a Gram matrix's eigenvalues, divided by their sum.

    It counts directions by their weight: m for orthogonal rows of equal length, 1 for rows that are multiples of one,
    and a real number in between (Roy & Vetterli, The effective rank, EUSIPCO 2007; of the Gram matrix itself, whose
    singular values are the squares of the window's).

    Args:
        gram: `G G^T`, symmetric, for example from `gram_matrix`.

    Returns:
        The effective rank; 0 for a matrix of zeros.
    """
    with one_thread():
        spectrum = torch.linalg.eigvalsh(gram.to("cpu", torch.float64)).clamp(min=0.0)
    total = spectrum.sum()
    if not total:
        return 0.0
    return math.exp(float(torch.special.entr(spectrum / total).sum()))


def gram_matrix(optimizer: EFCP, param: torch.Tensor | None = None) -> torch.Tensor:
    """The inner products of the window's rows, oldest row first.

    Args:
        optimizer: The optimizer.
        param: With `scope="layer"`, the parameter whose matrix is wanted; else there is one over all parameters.

    Returns:
        A copy, `(rows, rows)`, float64, on the CPU. Only rows that were pushed are in it.

    Raises:
        ValueError: There is no such matrix.
    """
    if not optimizer._preconditioner.uses_gram:
        raise ValueError(f"{type(optimizer._preconditioner).__name__} is a diagonal rule, which has no Gram matrix")
    units = _units(optimizer)
    if optimizer._structure["scope"] == "layer":
        if param is None:
            raise ValueError('scope="layer" has a Gram matrix for each parameter: say which one is wanted (param=...)')
        units = [unit for unit in units if unit[0].param is param]
    if not units:
        raise ValueError("there is no Gram matrix before the first step, or for a parameter that is not preconditioned")
    return _written(optimizer, units[0])


def refuse_shards(optimizer: AnyOptimizer) -> None:
    """Refuse an optimizer of which this process has a part only.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: Its parameters are sharded.
    """
    if any(is_sharded(ref.param) for ref in optimizer._refs()):
        raise ValueError(
            "diagnostics need whole parameters, but FSDP has sharded them, and a process sees its own shards only: "
            "measure on one device or with DDP, or turn the diagnostics off"
        )


def _preconditioned(optimizer: AnyOptimizer) -> list[ParamRef]:
    return [ref for ref in optimizer._refs() if ref.group["preconditioned"]]


def _units(optimizer: EFCP) -> list[list[ParamRef]]:
    """Parameters that share a preconditioner and have pushed a row, with gradients now or without."""
    optimizer._read_counters()
    refs = [ref for ref in _preconditioned(optimizer) if optimizer.state.get(ref.param)]
    units = [[ref] for ref in refs] if optimizer._structure["scope"] == "layer" else [refs]
    return [unit for unit in units if optimizer._gram_state(unit).get("pushed")]


def _pushed(optimizer: AnyOptimizer) -> int:
    """Rows pushed by all units, or gradients seen: it grows with every step that was not skipped."""
    if isinstance(optimizer, ProjectedAdam):
        return sum(int(state.get("steps", state.get("step", 0))) for state in optimizer.state.values())
    return sum(optimizer._gram_state(unit)["pushed"] for unit in _units(optimizer))


def _newest(optimizer: EFCP, gram_state: dict[str, Any]) -> tuple[int, int]:
    """Position of the newest row, and how many there are."""
    capacity = optimizer._structure["num_grads"]
    return (gram_state["pushed"] - 1) % capacity, min(gram_state["pushed"], capacity)


def _written(optimizer: EFCP, unit: list[ParamRef]) -> torch.Tensor:
    """The Gram matrix of a unit, oldest row first."""
    gram_state = optimizer._gram_state(unit)
    newest, rows = _newest(optimizer, gram_state)
    order = (newest + 1 + torch.arange(rows, device="cpu")) % rows
    gram: torch.Tensor = gram_state["gram"].to("cpu")[order][:, order]
    return gram


def _error_square(optimizer: EFCP, units: list[list[ParamRef]]) -> float:
    """`|e|^2`."""
    if optimizer._layout.compressor.lossless:
        return 0.0
    square = 0.0
    for unit in units:
        device = unit[0].param.device
        kernels = choose(optimizer._backend, device)
        for leaf in optimizer._leaves(unit):
            for start in range(0, leaf.shape.numel(), _SLAB):
                slab = slice(start, min(start + _SLAB, leaf.shape.numel()))
                error = optimizer._layout.errors.load(leaf.state, slab, kernels)
                square += float(torch.linalg.vector_norm(error, dtype=widest(device))) ** 2
    return square


def _row_square(optimizer: EFCP, units: list[list[ParamRef]]) -> float:
    """`|row|^2` of the newest row. It stands in the Gram matrix, if there is one."""
    square = 0.0
    for unit in units:
        gram_state = optimizer._gram_state(unit)
        newest, rows = _newest(optimizer, gram_state)
        if "gram" in gram_state:
            square += float(gram_state["gram"][newest, newest])
            continue
        kernels = choose(optimizer._backend, unit[0].param.device)
        held = [(leaf.state, leaf.shape) for leaf in optimizer._leaves(unit)]
        square += float(optimizer._layout.window.dots(held, newest, rows, kernels)[:, newest].sum())
    return square


def _share(error: float, row: float) -> float:
    return math.sqrt(error / (error + row)) if error else 0.0


def _compare(params: list[Before]) -> dict[str, float]:
    """Norms, cosine and ratios of update and gradient."""
    device = checks.check_one_device(before.param for before in params)
    wide = widest(device)
    # |g|^2 of all, and of what has a learning rate: |g|^2, |u|^2, <u, g>.
    sums = torch.zeros(4, dtype=wide, device=device)
    ratios = []
    for before in params:
        if before.param.grad is None:
            raise ValueError("a gradient that was there before the step is gone: call measure before zero_grad")
        after, gradient = before.param.detach().reshape(-1), before.param.grad.reshape(-1)
        for start in range(0, after.numel(), _SLAB):
            span = slice(start, start + _SLAB)
            g = gradient[span].to(wide)
            if before.l2:
                g = g.add(before.theta[span].to(wide), alpha=before.l2)
            square = g @ g
            sums[0] += square
            if not before.lr:
                continue
            # Decayed as the optimizer does it, so that the difference is 0 where the update is.
            still = before.theta[span].to(torch.float32).mul(before.keep).to(after.dtype)
            u = (still.to(wide) - after[span].to(wide)) / before.lr
            product = u * g
            sums[1:] += torch.stack((square, u @ u, product.sum()))
            ratios.append((u / g).to(torch.float32).abs()[product != 0])
    total, seen, moved, inner = sums.tolist()
    values = {"gradient_norm": math.sqrt(total)}
    if ratios:
        values["update_norm"] = math.sqrt(moved)
    if seen and moved:
        values["cosine"] = inner / (math.sqrt(seen) * math.sqrt(moved))
    if sum(len(slab) for slab in ratios):
        # numpy's, for torch's take 2^24 entries at most. "nearest" is an entry: nothing between two infinities.
        found = np.quantile(torch.cat(ratios).cpu().numpy(), QUANTILES, method="nearest", overwrite_input=True)
        values |= {f"scaling_p{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
    return values
