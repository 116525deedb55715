"""EFCP optimizers for Trainers that know nothing of them: transformers' own, and those of other libraries."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from ..factory import OPTIMIZERS, create_optimizer, efcp_name, parse_optim_args
from ..projected import LORENZA


class OptimizerFactory:
    """What `optimizer_cls_and_kwargs` may hold instead of a class: the model is given, and with it the names.

    transformers calls `OptimizerFactory()(model, **kwargs)`.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
        """As `create_optimizer(model=model, **kwargs)`."""
        return create_optimizer(model=model, **kwargs)


def for_trainer(name: str, args: Any, optim_args: str | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The `optimizer_cls_and_kwargs` of any Trainer of transformers or built on it, with an EFCP optimizer.

    Learning rate and weight decay are those of the training arguments, and biases and norms are not decayed, as Trainer
    has it. `EFCPTrainer` does more: see there. Its true gradient is the one thing that matters here: where loss and
    gradient come out too large by the number of accumulated batches, clipping bites sooner.

    Args:
        name: A key of `OPTIMIZERS`, such as "lowrank_mfac".
        args: `TrainingArguments`, or what is derived from them.
        optim_args: Options as text, as in `EFCPTrainingArguments`.
        **options: The same as values: of `create_optimizer`.

    Returns:
        The factory, and what it is called with.

    Raises:
        RuntimeError: If transformers is older than 5, whose Trainers take no factory.
        TypeError: If an option is given as text and as a value.
        ValueError: If the name or an option is not valid, or the optimizer is one that needs `EFCPTrainer`.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from hf_efcp import for_trainer
        >>> cls, kwargs = for_trainer("lowrank_mfac", TrainingArguments("out", learning_rate=2e-4), num_grads=32)
        >>> kwargs
        {'name': 'lowrank_mfac', 'lr': 0.0002, 'weight_decay': 0.0, 'num_grads': 32}
    """
    if transformers.__version__.startswith("4."):
        raise RuntimeError(
            f"Trainers take a factory since transformers 5, and this is {transformers.__version__}: give them "
            f"optimizers=(create_optimizer({name!r}, model, lr=..., weight_decay=...), None)"
        )
    parsed = parse_optim_args(name, optim_args)
    if twice := parsed.keys() & options.keys():
        raise TypeError(f"given in optim_args and as arguments: {', '.join(sorted(twice))}; leave out one of them")
    made: Any = OPTIMIZERS[efcp_name(name) or name]
    if issubclass(made, LORENZA) and {"rho": True, **parsed, **options}["rho"]:
        raise ValueError(
            f"{name} evaluates the loss before the backward pass, and other Trainers cannot give it the loss: use "
            "EFCPTrainer, a loop of your own with step(closure), or rho=0, which leaves the sharpness out"
        )
    lr, weight_decay = float(args.learning_rate), float(args.weight_decay)
    return OptimizerFactory, {"name": name, "lr": lr, "weight_decay": weight_decay, **parsed, **options}
