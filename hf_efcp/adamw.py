"""AdamW in float32, for parameters that are excluded from preconditioning (embeddings, a new head)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.optim.adamw import adamw

from .compressors import span_length
from .compressors.matrices import cuts
from .leaves import ParamRef
from .shards import local

BETAS = (0.9, 0.999)
EPS = 1e-8
LARGEST = 1.8e19  # of a gradient's entries: its square, 3.2e38, is about the last that float32 has
_ROWS = 64  # a multiple of every vector's length, so that kernels round an entry as they would in the whole


class _Part(NamedTuple):
    """A parameter or some of its rows, with gradient, moments and the number of steps."""

    theta: torch.Tensor
    gradient: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    steps: torch.Tensor
    large: bool  # the gradient may have entries beyond `LARGEST`


def allocate(param: torch.Tensor, device: torch.device | str) -> dict[str, torch.Tensor]:
    """AdamW's state of one parameter, as `torch.optim.AdamW` keeps it of a float32 one.

    In bfloat16 the second moment would never decay (0.999 v is rounded to v), and in float16 it would be 0, as eps is.

    Args:
        param: The parameter.
        device: Where; "meta" gives the shapes without the memory.

    Returns:
        The two moments, float32, and the step counter.
    """
    return {
        "step": torch.zeros((), dtype=torch.float32, device="meta" if device == "meta" else "cpu"),
        "exp_avg": torch.zeros_like(param, dtype=torch.float32, device=device),
        "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32, device=device),
    }


def widened(state: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """A saved state with AdamW's moments in float32: once they were kept in the parameter's dtype.

    Args:
        state: Of one parameter, whatever kind of state it is.
        param: The parameter.

    Returns:
        The state itself, or a copy whose moments have the same values in float32.
    """
    if "step" not in state:
        return state
    narrow = {
        name: value.to(torch.float32)
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq") and torch.is_tensor(value) and value.dtype == param.dtype
    }
    return {**state, **narrow}


def step(
    params: list[torch.Tensor],
    states: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
    large: Iterable[bool] | None = None,
) -> None:
    """One step of AdamW, with PyTorch's own kernel; parameters in low precision are rounded once, to nearest.

    Args:
        params: Parameters that have a gradient.
        states: Their states, from `allocate`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decays of the moments; PyTorch's defaults.
        eps: What is added to the root of the second moment; PyTorch's default.
        large: Whose gradients may have entries beyond `LARGEST`, which count as that: with the square of a larger one
            the second moment would be infinite, and the entry would never move again. None for nobody's.
    """

    def advance(parts: list[_Part], thetas: list[torch.Tensor]) -> None:
        adamw(
            thetas,
            [_gradient(part) for part in parts],
            [part.m for part in parts],
            [part.v for part in parts],
            [],
            [part.steps for part in parts],
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )

    exact: list[_Part] = []
    rounded: list[_Part] = []
    for param, state, beyond in zip(params, states, [False] * len(params) if large is None else large, strict=True):
        assert param.grad is not None
        moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
        part = _Part(local(param), local(param.grad), *moments, state["step"], beyond)
        (exact if param.dtype == torch.float32 else rounded).append(part)
    if exact:
        advance(exact, [part.theta for part in exact])
    for batch in _batches(rounded):  # so much has a copy in float32 at a time
        thetas = [part.theta.to(torch.float32) for part in batch]
        advance(batch, thetas)
        for part, theta in zip(batch, thetas, strict=True):
            part.theta.copy_(theta)
    for part in rounded:
        part.steps.add_(1)


def step_excluded(
    refs: Iterable[ParamRef], states: Mapping[torch.Tensor, dict[str, Any]], squares: Mapping[int, float]
) -> None:
    """Step the groups that are not preconditioned.

    Args:
        refs: Parameters, in the order of the groups.
        states: Of all parameters.
        squares: `|g|^2` of the gradients by position, as far as they are known.
    """
    excluded = [ref for ref in refs if not ref.group["preconditioned"] and ref.param.grad is not None]
    for _, same in groupby(excluded, key=lambda ref: id(ref.group)):
        own = list(same)
        group, params = own[0].group, [ref.param for ref in own]
        step(
            params,
            [states[param] for param in params],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            large=[squares.get(ref.position, math.inf) > LARGEST**2 for ref in own],
        )


def _gradient(part: _Part) -> torch.Tensor:
    """The gradient in float32, and not to be written to."""
    gradient = part.gradient.to(torch.float32)
    return gradient.clamp(-LARGEST, LARGEST) if part.large else gradient


def _batches(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Parts in lists of about `span_length` entries, large ones cut by rows, each with a counter of its own."""
    batch: list[_Part] = []
    count = 0
    for part in parts:
        for piece in _pieces(part):
            batch.append(piece)
            count += piece.theta.numel()
            if count >= span_length(piece.theta.device):
                yield batch
                batch, count = [], 0
    if batch:
        yield batch


def _pieces(part: _Part) -> Iterator[_Part]:
    """A part by rows, at most `span_length` entries unless `_ROWS` have more."""
    entries, most = part.theta.numel(), span_length(part.theta.device)
    if entries <= most:
        yield part._replace(steps=part.steps.clone())
        return
    rows = max(_ROWS, most * len(part.theta) // entries // _ROWS * _ROWS)
    for cut in cuts(len(part.theta), rows):
        yield _Part(part.theta[cut], part.gradient[cut], part.m[cut], part.v[cut], part.steps.clone(), part.large)
