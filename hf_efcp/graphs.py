"""What a CUDA graph of a step needs: everything that the host would do otherwise is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .layout import Layout
from .preconditioners import MFAC, Preconditioner

LARGEST_SOLVED = 64  # gradients of a window whose Gram matrix one program can hold


def is_captured(device: torch.device) -> bool:
    """Whether what is started now goes into a CUDA graph.

    Args:
        device: Where it would run.

    Returns:
        Whether it does.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check(layout: Layout, preconditioner: Preconditioner, nonfinite: str) -> None:
    """Refuse settings with which the host has to see numbers.

    Args:
        layout: What the state is made of.
        preconditioner: With its hyperparameters.
        nonfinite: What is done about gradients that are not finite.

    Raises:
        ValueError: There are such settings.
    """
    wants = {
        'nonfinite="ignore"': nonfinite == "ignore",
        'metric="adam" or "factored"': layout.metric is not None,
        "M-FAC without absolute dampening (damp)": isinstance(preconditioner, MFAC) and preconditioner.damp == 0.0,
        f"num_grads of at most {LARGEST_SOLVED}": layout.num_grads <= LARGEST_SOLVED,
    }
    missing = " and ".join(want for want, given in wants.items() if not given)
    if missing:
        raise ValueError(f"a CUDA graph cannot take a step with these settings: capturable=True needs {missing}")


def check_group(group: dict[str, Any]) -> dict[str, Any]:
    """Refuse a group that is stepped by other kernels.

    Args:
        group: The group.

    Returns:
        The group, with a number for a learning rate that only the device knows.

    Raises:
        ValueError: It is not preconditioned.
    """
    if not group["preconditioned"]:
        raise ValueError(
            "capturable=True takes groups that are preconditioned only: give the parameters of the others to "
            "torch.optim.AdamW(capturable=True)"
        )
    lr = group["lr"]
    return {**group, "lr": 0.0} if isinstance(lr, torch.Tensor) and lr.device.type != "cpu" else group


def check_rates(groups: Iterable[dict[str, Any]], device: torch.device) -> None:
    """Refuse learning rates that a graph would take as they are now, though they are tensors.

    Args:
        groups: Parameter groups.
        device: Where the parameters are.

    Raises:
        RuntimeError: One is a tensor elsewhere.
    """
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, torch.Tensor) and lr.device != device:
            raise RuntimeError(
                f"lr is a tensor on {lr.device}, whose changes a CUDA graph on {device} would not see: move it, "
                'group["lr"] = group["lr"].to(device), before the capture'
            )


def refuse_kernels(reason: str) -> None:
    """Refuse to step without the kernels that a graph can take.

    Args:
        reason: Why there are none.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"capturable=True needs the Triton kernels, which have no step for {reason}")
