"""Training arguments that know the names, options and learning rates of the EFCP optimizers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..factory import OPTIMIZERS, default_lr, efcp_name, parse_optim_args, unknown
from ..family import AnyOptimizer

logger = logging.getLogger(__name__)


@dataclass
class EFCPTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` that also take the names of `hf_efcp.OPTIMIZERS` in `optim`.

    Defaults that differ from the parent's:

    - `learning_rate` is None: the default of the optimizer that `optim` names (the parent's own for a stock
      optimizer). It is filled in at construction, so that copies made with `dataclasses.replace` or from `to_dict`
      carry the number: a copy that changes `optim` needs `learning_rate=None` to take the new optimizer's.

    A dataclass that derives from this class and from another configuration, `Seq2SeqTrainingArguments` or TRL's
    `SFTConfig`, in either order, keeps the other's defaults; one for `learning_rate` then holds for every optimizer.

    `adam_beta1`, `adam_beta2`, `adam_epsilon` and `optim_target_modules` are of no use to an EFCP optimizer.

    Args:
        optim: A stock name or a key of `hf_efcp.OPTIMIZERS` ("-" may stand for "_").
        learning_rate: The initial learning rate; None takes the default of the optimizer.
        optim_args: For an EFCP optimizer, its options by name, such as "num_grads=256,density=0.01"; also
            `exclude` and `exclude_lr` of `hf_efcp.create_optimizer`. Checked at construction.
        efcp_diagnostics_steps: Log what preconditioning does to the gradient, measured every so many steps: see
            `hf_efcp.EFCPCallback`. 0 does not.

    Examples:
        >>> from hf_efcp import EFCPTrainingArguments
        >>> args = EFCPTrainingArguments("out", optim="lowrank_mfac", optim_args="num_grads=32,rank=8")
        >>> args.optim, args.learning_rate
        ('lowrank_mfac', 0.0001)
    """

    # Typed str, not the parent's enum, for HfArgumentParser would accept the members of the enum only.
    optim: str = field(
        default=TrainingArguments.optim,
        metadata={"help": f"The optimizer to use: {', '.join(OPTIMIZERS)}, or one of `OptimizerNames`."},
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "The initial learning rate; the default of the optimizer when it is not given."},
    )
    efcp_diagnostics_steps: int = field(
        default=0,
        metadata={"help": "Measure what preconditioning does every so many steps, and log it; 0 does not."},
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Declare in a subclass the fields that its bases have set and that `dataclass` would take from elsewhere.

        It takes a field from the first base that has it, declared or inherited: with this class first, the defaults of
        `TrainingArguments` would hide those of a second base, and with this class second the types of our fields.

        Args:
            **kwargs: Those of the class statement.
        """
        super().__init_subclass__(**kwargs)
        for name, (kind, found) in _hidden(cls).items():
            if name not in vars(cls):
                cls.__annotations__[name] = kind
                setattr(cls, name, copy.copy(found))

    def __post_init__(self) -> None:
        """Resolve the optimizer and its learning rate, check its options, and let the parent do the rest.

        Raises:
            TypeError: If the class has several bases and is no dataclass.
            ValueError: If `optim`, `optim_args`, `efcp_diagnostics_steps` or anything that the parent checks is not
                valid.
        """
        _check_class(type(self))
        if self.efcp_diagnostics_steps < 0:
            raise ValueError(
                "efcp_diagnostics_steps is the number of steps from one sample to the next, or 0 for none; got "
                f"{self.efcp_diagnostics_steps}"
            )
        optim = _optimizer(self.optim)
        # Before the parent's turn: a DeepSpeed configuration may copy the learning rate.
        self.learning_rate = self._rate(optim, self.learning_rate)
        self.optim = _stock(optim)
        super().__post_init__()
        self.optim = optim
        self._check_optimizer()

    def set_optimizer(
        self, name: str = "adamw_torch", learning_rate: float | None = None, *args: Any, **kwargs: Any
    ) -> EFCPTrainingArguments:
        """Set all that concerns the optimizer, as the parent's method does.

        Args:
            name: A stock name or a key of `hf_efcp.OPTIMIZERS`.
            learning_rate: The initial learning rate; None takes the default of the optimizer.
            *args: The parent's further arguments.
            **kwargs: The parent's further arguments; `args` is what the constructor calls `optim_args`.

        Returns:
            These arguments.

        Raises:
            ValueError: If a name or an option is not valid.
        """
        optim = _optimizer(name)
        super().set_optimizer(_stock(optim), self._rate(optim, learning_rate), *args, **kwargs)
        self.optim = optim
        self._check_optimizer()
        return self

    def set_training(self, learning_rate: float | None = None, *args: Any, **kwargs: Any) -> EFCPTrainingArguments:
        """Set all that concerns the training, as the parent's method does.

        Args:
            learning_rate: The initial learning rate; None takes the default of the optimizer.
            *args: The parent's further arguments.
            **kwargs: The parent's further arguments.

        Returns:
            These arguments.
        """
        super().set_training(self._rate(self.optim, learning_rate), *args, **kwargs)
        return self

    def _rate(self, optim: str, given: float | None) -> float:
        if given is not None:
            return given
        if isinstance(optim, OptimizerNames):
            # That of the next configuration that has one: TrainingArguments, if none between does.
            rates = (vars(base).get("learning_rate") for base in type(self).__mro__)
            default = next(float(rate) for rate in rates if rate is not None)
        else:
            default = default_lr(optim)
        logger.info("learning_rate is not given: taking %g, the default of %s", default, optim)
        return default

    def _check_optimizer(self) -> None:
        # The optimizer judges its options now: a mistake should not wait until the model is loaded.
        if efcp_name(self.optim) is None:
            return
        options = parse_optim_args(self.optim, self.optim_args)
        options.pop("exclude", None)  # needs the model
        if "num_grads" not in options:
            options.pop("memory_budget", None)  # needs the model, too
        preconditioned, excluded = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        adamw = {"params": [excluded], "preconditioned": False, "lr": options.pop("exclude_lr", self.learning_rate)}
        optimizer: Callable[..., AnyOptimizer] = OPTIMIZERS[self.optim]
        optimizer(
            [{"params": [preconditioned]}, adamw], lr=self.learning_rate, weight_decay=self.weight_decay, **options
        )
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules"):
            if getattr(self, key) != getattr(TrainingArguments, key):
                logger.warning("%s=%s has no effect on the optimizer %s", key, getattr(self, key), self.optim)


def _optimizer(name: str) -> str:
    # A key of OPTIMIZERS or a member of OptimizerNames.
    try:
        return efcp_name(name) or OptimizerNames(name)
    except ValueError:
        valid = [*OPTIMIZERS, *(stock.value for stock in OptimizerNames)]
        raise ValueError(unknown(name, valid)) from None


def _stock(optim: str) -> OptimizerNames:
    # A name that the parent's methods accept in the place of `optim`.
    return optim if isinstance(optim, OptimizerNames) else OptimizerNames.ADAMW_TORCH


def _declared(cls: type) -> dict[str, Field[Any]]:
    # The fields that a dataclass has itself: those inherited are its parents' objects.
    own = vars(cls).get("__dataclass_fields__", {})
    inherited = [getattr(base, "__dataclass_fields__", {}) for base in cls.__bases__]
    return {name: f for name, f in own.items() if all(f is not others.get(name) for others in inherited)}


def _hidden(cls: type) -> dict[str, tuple[Any, Field[Any]]]:
    # Types and fields by name. Ours give way to those of other bases, whose defaults were chosen for a task.
    ours = _declared(EFCPTrainingArguments)
    taken: dict[str, Field[Any]] = {}
    wanted: dict[str, tuple[type, Field[Any]]] = {name: (EFCPTrainingArguments, f) for name, f in ours.items()}
    for base in reversed(cls.__mro__[1:]):
        taken |= vars(base).get("__dataclass_fields__", {})
        if base not in (TrainingArguments, EFCPTrainingArguments):
            wanted |= {name: (base, f) for name, f in _declared(base).items()}
    return {
        name: (get_type_hints(EFCPTrainingArguments if name in ours else base)[name], f)
        for name, (base, f) in wanted.items()
        if f is not taken[name] or (name in ours and not issubclass(base, EFCPTrainingArguments))
    }


def _check_class(cls: type) -> None:
    made, *others = (base for base in cls.__mro__ if "__dataclass_fields__" in vars(base))
    if lost := [base.__name__ for base in others if not issubclass(made, base)]:
        raise TypeError(
            f"{cls.__name__} has the constructor of {made.__name__}, which does not know the fields and defaults of "
            f"{', '.join(lost)}: put @dataclass above class {cls.__name__}"
        )
