"""What all named optimizers take, and the defaults that depend on the metric."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

_RELATIVE = {"damp": 0.01, "eps": 1e-4}  # without a metric
# In a metric: twice the best learning rate of AdamW on a BERT of 22 M parameters, the largest that it takes.
_TRUST_LR = 4e-4


class Options(TypedDict, total=False):
    """What every named optimizer takes beside its own arguments; `EFCP` says what each of them is.

    What is not given depends on the metric. With one: `precondition="row"` and `beta1=0.9`, AdamW's first moment over
    the window's rows (`beta1=0` for `precondition="gradient"`), `scope="layer"`, errors and a second moment of every
    entry in int8, and a dense first moment in bfloat16. With "none", the paper's rule: `precondition="row"`, `beta1=0`,
    `scope="model"`, errors in float32.
    """

    momentum: float
    weight_decay: float
    decoupled_weight_decay: bool
    precondition: str
    scope: str
    metric_dtype: torch.dtype
    metric_beta2: float
    metric_eps: float
    momentum_dtype: torch.dtype
    error_dtype: torch.dtype
    nonfinite: str
    capturable: bool
    backend: str
    memory_budget: int | str | None


class DiagonalOptions(Options, total=False):
    """Those of the optimizers without a matrix, which take "none" only."""

    metric: str


def dampening(
    name: str, absolute: float | None, relative: float | None, trust_lr: float | None, metric: str
) -> dict[str, float]:
    """The hyperparameters of a preconditioner that `damp` or `eps` stands for, all but one of them 0."""
    given = {name: absolute, f"relative_{name}": relative, "trust_lr": trust_lr}
    chosen = {key: value for key, value in given.items() if value is not None}
    if len(chosen) > 1:
        both = " and ".join(f"{key}={value}" for key, value in chosen.items())
        raise ValueError(
            f"{both} all choose the dampening: give {name}, in the units of the gradients, relative_{name}, a fraction "
            "of the window's mean, or trust_lr, a learning rate"
        )
    if not chosen:
        chosen = {f"relative_{name}": _RELATIVE[name]} if metric == "none" else {"trust_lr": _TRUST_LR}
    return {**dict.fromkeys(given, 0.0), **chosen}


def refuse_error(cls: type, options: Any) -> None:
    """Refuse `error_dtype` where nothing is compressed.

    Args:
        cls: The optimizer.
        options: What it was given.

    Raises:
        ValueError: `error_dtype` is among them.
    """
    if "error_dtype" in options:
        raise ValueError(f"{cls.__name__} compresses nothing, and so keeps no error: leave error_dtype out")


def in_metric(metric: str, beta1: float | None, options: Any) -> dict[str, Any]:
    """The options of an optimizer with a matrix, with the defaults of its metric."""
    if metric == "none":
        return {"metric": metric, "beta1": beta1 or 0.0, **options}
    dense = options.get("precondition") == "gradient"
    defaults = {
        "metric": metric,
        "metric_dtype": torch.int8 if metric == "adam" else torch.float32,
        "beta1": beta1 if beta1 is not None else 0.0 if dense else 0.9,
        "scope": "layer",
        "error_dtype": torch.int8,
        "momentum_dtype": torch.bfloat16,
    }
    return {**defaults, **options}
