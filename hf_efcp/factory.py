"""Optimizers by name: their defaults, `optim_args` parsing, parameter groups with exclusions."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from .budget import FORMS, in_bytes
from .checks import check_kinds, kinds
from .family import AnyOptimizer
from .projected import RELATIVES
from .variants import VARIANTS

logger = logging.getLogger(__name__)

EXCLUDE_LR = 5e-5  # Trainer's own rate for AdamW
OPTIMIZERS: dict[str, type[AnyOptimizer]] = {**VARIANTS, **RELATIVES}


def efcp_name(name: str) -> str | None:
    """Return the key of `OPTIMIZERS` that `name` means, or None when it is not one of ours.

    Args:
        name: An optimizer name; "-" may stand for "_".

    Returns:
        The key, or None.
    """
    key = name.replace("-", "_")
    return key if key in OPTIMIZERS else None


def unknown(name: Any, valid: Iterable[str] = OPTIMIZERS) -> str:
    """Say that a name is not that of an optimizer, what the names are, and which of them was meant.

    Args:
        name: What was given.
        valid: The names.

    Returns:
        The message.
    """
    valid = list(valid)
    meant = difflib.get_close_matches(str(name).lower().replace("-", "_"), valid, 1)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    return f"unknown optimizer {name!r}; expected one of: {', '.join(valid)}{hint}"


def maker(optimizer: str | Callable[..., AnyOptimizer]) -> Callable[..., AnyOptimizer]:
    """Return what makes the optimizer that a name means.

    Args:
        optimizer: A key of `OPTIMIZERS` ("-" may stand for "_"), or the class itself, or a function that returns one.

    Returns:
        The class or the function.

    Raises:
        TypeError: It is something else.
        ValueError: The name is unknown.
    """
    if callable(optimizer) and (not isinstance(optimizer, type) or issubclass(optimizer, AnyOptimizer)):
        return optimizer
    return OPTIMIZERS[_known(optimizer)]


def default_lr(name: str) -> float:
    """Return the learning rate that the optimizer called `name` takes when none is given.

    Args:
        name: A key of `OPTIMIZERS`.

    Returns:
        The default of `lr` in the signature of its class.

    Raises:
        ValueError: If `name` is not a key of `OPTIMIZERS`.
    """
    return float(inspect.signature(OPTIMIZERS[_known(name)]).parameters["lr"].default)


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    exclude: str | Sequence[str] = (),
    exclude_lr: float | None = None,
    **kwargs: Any,
) -> AnyOptimizer:
    """Create the optimizer called `name` over the trainable parameters of `model`.

    Weight decay goes to the parameters that `transformers.Trainer` would decay: all but biases and norm layers.
    Excluded parameters are trained as well: not preconditioned, but stepped as AdamW would at `exclude_lr`.

    Args:
        name: A key of `OPTIMIZERS`; "-" may stand for "_".
        model: Any module; its parameters with `requires_grad` are optimized.
        lr: The learning rate of the preconditioned parameters; None takes the optimizer's own default.
        weight_decay: Decoupled weight decay of the parameters that are decayed, excluded or not.
        exclude: Regular expression(s), searched for in parameter names: what they match is not preconditioned.
        exclude_lr: The learning rate of the excluded parameters; None takes 5e-5.
        **kwargs: Further arguments of the optimizer's class, such as `num_grads`, `memory_budget` or `density`.

    Returns:
        The optimizer.

    Raises:
        TypeError: If `name` is not a string, `model` is not a module, or an argument is not one of the optimizer's.
        ValueError: If the name is unknown, nothing is trainable, a pattern is not a regular expression or matches no
            trainable parameter, everything is excluded, `exclude_lr` is given without `exclude`, or an argument is not
            valid.

    Examples:
        >>> import torch
        >>> from hf_efcp import create_optimizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> optimizer = create_optimizer("lowrank_mfac", model, lr=2e-4, weight_decay=0.01, exclude="^2")
        >>> for group in optimizer.param_groups:
        ...     print(group["preconditioned"], group["lr"], group["weight_decay"], len(group["params"]))
        True 0.0002 0.01 1
        True 0.0002 0.0 3
        False 5e-05 0.01 1
        False 5e-05 0.0 1
    """
    name = _known(name)
    settings = _settings(name)
    for key in kwargs:
        if key not in settings:
            raise TypeError(f"{name} has no argument {key!r}; valid ones: {', '.join(settings)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad: there is nothing to optimize")
    excluded = _matching(exclude, list(trainable))
    if len(excluded) == len(trainable):
        raise ValueError(f"exclude={exclude!r} matches every trainable parameter: nothing is left to precondition")
    lr = default_lr(name) if lr is None else lr
    check_kinds({"exclude_lr": exclude_lr}, kinds(create_optimizer))  # to the optimizer it is the lr of a group
    if exclude_lr is not None and not excluded:
        raise ValueError(_useless(exclude_lr))
    exclude_lr = EXCLUDE_LR if exclude_lr is None else exclude_lr

    decayed = _decayed(model)
    groups: list[dict[str, Any]] = []
    for outside in (False, True):
        for decay in (True, False):
            named = [(key, p) for key, p in trainable.items() if (key in excluded, key in decayed) == (outside, decay)]
            group: dict[str, Any] = {"params": named, "weight_decay": weight_decay if decay else 0.0}
            if outside:
                group |= {"preconditioned": False, "lr": exclude_lr}
            if named:
                groups.append(group)

    factory: Callable[..., AnyOptimizer] = OPTIMIZERS[name]
    optimizer = factory(groups, lr=lr, weight_decay=weight_decay, **kwargs)

    numels = [(key in excluded, p.numel()) for key, p in trainable.items()]
    logger.info("%s: %s parameters preconditioned at lr %g", name, f"{sum(n for out, n in numels if not out):,}", lr)
    if excluded:
        logger.info(
            "%s: %s parameters in %d tensors excluded, stepped as AdamW at lr %g",
            name,
            f"{sum(n for out, n in numels if out):,}",
            len(excluded),
            exclude_lr,
        )
    if kwargs.get("memory_budget") is not None:
        logger.info(
            "%s: memory_budget=%s has room for num_grads=%d: %s bytes of state",
            name,
            kwargs["memory_budget"],
            optimizer.param_groups[0]["num_grads"],
            f"{optimizer.planned_memory()['total']:,}",
        )
    return optimizer


def parse_optim_args(name: str, text: str | None) -> dict[str, Any]:
    """Parse Trainer's `optim_args`, such as "num_grads=256,density=0.01,exclude=embeddings", into typed values.

    Commas inside brackets, braces and parentheses do not separate, so that a regular expression can hold them.

    Args:
        name: A key of `OPTIMIZERS`; "-" may stand for "_".
        text: Comma-separated `key=value` items; None and "" are no items.

    Returns:
        Keyword arguments for `create_optimizer`.

    Raises:
        TypeError: If `text` is neither a string nor None.
        ValueError: If a key is unknown, given twice, belongs elsewhere or is of no use, or a value is not of its type.
    """
    name = _known(name)
    if not isinstance(text, str | None):
        raise TypeError(f"optim_args must be a string such as 'num_grads=256,density=0.01', got {text!r}")
    parsers = {key: _parser(annotation) for key, annotation in _settings(name).items()}
    parsers |= {"exclude": ("a regular expression", _regex), "exclude_lr": _PARSERS[float]}
    hint = f"valid keys of optim_args for {name}: {', '.join(parsers)}"

    parsed: dict[str, Any] = {}
    for item in filter(None, _split(text or "")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"optim_args: expected key=value, got {item!r} (join regular expressions with |); {hint}")
        if key in _ELSEWHERE:
            raise ValueError(f"optim_args: {key} does not belong here, {_ELSEWHERE[key]}; {hint}")
        if key not in parsers:
            raise ValueError(f"optim_args: unknown key {key!r}; {hint}")
        if key in parsed:
            raise ValueError(f"optim_args: {key} is given twice; {hint}")
        expected, parse = parsers[key]
        try:
            if not value:
                raise ValueError("it is empty")
            parsed[key] = parse(value)
        except ValueError as error:
            raise ValueError(f"optim_args: {key} must be {expected}, got {value!r}: {error}; {hint}") from None
    if "exclude_lr" in parsed and "exclude" not in parsed:
        raise ValueError(f"optim_args: {_useless(parsed['exclude_lr'])}")
    return parsed


def _useless(exclude_lr: float) -> str:
    return (
        f"exclude_lr={exclude_lr} is the learning rate of excluded parameters, and exclude names none: give exclude, "
        "such as exclude=embeddings, or leave exclude_lr out"
    )


def _known(name: Any) -> str:
    if not isinstance(name, str):
        what = name.__name__ if isinstance(name, type) else type(name).__name__
        raise TypeError(
            f"an optimizer is named by a string, one of {', '.join(OPTIMIZERS)}; got {what}. In create_optimizer the "
            "name comes first and then the model"
        )
    key = efcp_name(name)
    if key is None:
        raise ValueError(unknown(name))
    return key


def _settings(name: str) -> dict[str, Any]:
    # The optimizer's arguments and their annotated types: its own, and those of the TypedDict in `**options`.
    found: dict[str, Any] = {}
    for key, parameter in inspect.signature(OPTIMIZERS[name], eval_str=True).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            for options in get_args(parameter.annotation):  # none, if it is no Unpack[...]
                found |= get_type_hints(options)
        else:
            found[key] = parameter.annotation
    return {key: annotation for key, annotation in found.items() if key not in _ELSEWHERE}


def _parser(annotation: Any) -> tuple[str, Callable[[str], Any]]:
    # What may be None is parsed as what else it may be: None is said by leaving the option out.
    if annotation not in _PARSERS and type(None) in get_args(annotation):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not type(None))
    return _PARSERS[annotation]


def _decayed(model: nn.Module) -> set[str]:
    from transformers import Trainer  # slow to import, and needed nowhere else here

    # The method does not use `self`: called unbound, its patterns cannot drift from those of the installed Trainer.
    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def _matching(exclude: str | Sequence[str], names: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        matches = {name for name in names if re.search(_regex(pattern), name)}
        if not matches:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"exclude: {pattern!r} matches no trainable parameter; they are named {some}")
        found |= matches
    return found


def _split(text: str) -> Iterator[str]:
    # At the commas outside brackets; what follows a backslash is never a bracket.
    depth, start = 0, 0
    for match in re.finditer(r"\\.|[(\[{]|[)\]}]|,", text):
        token = match.group()
        if token == "," and depth == 0:
            yield text[start : match.start()].strip()
            start = match.end()
        depth += (token in "([{") - (token in ")]}")
    if depth:
        raise ValueError(f"optim_args: unbalanced brackets in {text[start:]!r}; put a backslash before a literal one")
    yield text[start:].strip()


def _dtype(text: str) -> torch.dtype:
    value = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(value, torch.dtype):
        raise ValueError("torch has no such dtype")
    return value


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _budget(text: str) -> str:
    in_bytes(text, 1)
    return text


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("it is neither")
    return text.lower() == "true"


_PARSERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", _bool),
    int: ("an integer", int),
    float: ("a number", float),
    str: ("a name", str),
    int | str | None: (FORMS, _budget),
    torch.dtype: ("a torch dtype such as bfloat16", _dtype),
}
_ELSEWHERE = {
    "params": "parameters come from the model",
    "lr": "use learning_rate of the training arguments",
    "weight_decay": "use weight_decay of the training arguments",
}
