"""The AdamW step for parameters that are excluded from preconditioning (embeddings, a new head)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPS = 1e-8


def allocate(param: torch.Tensor, device: torch.device | str) -> dict[str, torch.Tensor]:
    """AdamW's state of one parameter, as `torch.optim.AdamW` keeps it.

    Args:
        param: The parameter.
        device: Where; "meta" gives the shapes without the memory.

    Returns:
        The two moments and the step counter.
    """
    return {
        "step": torch.zeros((), dtype=torch.float32, device="meta" if device == "meta" else "cpu"),
        "exp_avg": torch.zeros_like(param, device=device),
        "exp_avg_sq": torch.zeros_like(param, device=device),
    }


def step(
    params: list[torch.Tensor],
    states: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
) -> None:
    """One step of AdamW, with PyTorch's own kernel.

    Args:
        params: Parameters that have a gradient.
        states: Their states, from `allocate`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decays of the moments; PyTorch's defaults.
        eps: What is added to the root of the second moment; PyTorch's default.
    """
    adamw(
        params,
        [param.grad for param in params if param.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def step_excluded(groups: list[dict[str, Any]], states: Mapping[torch.Tensor, dict[str, Any]]) -> None:
    """Step the groups that are not preconditioned.

    Args:
        groups: All parameter groups.
        states: Of all parameters.
    """
    for group in groups:
        if not group["preconditioned"]:
            params = [param for param in group["params"] if param.grad is not None]
            own = [states[param] for param in params]
            step(params, own, lr=float(group["lr"]), weight_decay=group["weight_decay"])
