"""What is refused, and the words for it. Every check runs before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from numbers import Real
from typing import Any, get_args, get_type_hints

import torch

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAVY_BALL = "heavy_ball"  # the argument `momentum` in the parameter groups: schedulers would cycle one of that name
# Names in the parameter groups that torch's base class and its schedulers give a meaning to.
_TAKEN = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "momentum", "betas")


# What is accepted for an annotation, and the words for it. A learning rate may be a tensor; True is no int.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("an int", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, Real | torch.Tensor)),
    torch.dtype: ("a torch.dtype such as torch.bfloat16", lambda value: isinstance(value, torch.dtype)),
}
_GROUP = {
    "lr": float,
    "momentum": float,
    "weight_decay": float,
    "decoupled_weight_decay": bool,
    "preconditioned": bool,
}


@lru_cache(maxsize=64)  # preconditioners are made anew in every step
def kinds(annotated: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function or of the fields of a class, by name."""
    return get_type_hints(annotated)


def check_kinds(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Refuse booleans, numbers and dtypes that are given as something else, such as text.

    Args:
        values: By name.
        annotations: What each should be. Names that are not in both are not looked at.

    Raises:
        TypeError: One of them is something else.
    """
    for name in values.keys() & annotations.keys():
        value, kind = values[name], annotations[name]
        if type(None) in get_args(kind):
            if value is None:
                continue
            kind, *others = (one for one in get_args(kind) if one is not type(None))
            kind = None if others else kind
        if kind in _KINDS and not _KINDS[kind][1](value):
            as_text = ": text is read in optim_args only" if isinstance(value, str) else ""
            raise TypeError(f"{name} must be {_KINDS[kind][0]}, got {value!r}{as_text}")


def check_fields(part: Any) -> None:
    """`check_kinds` of a dataclass.

    Args:
        part: It.

    Raises:
        TypeError: One of its fields is not what its annotation says.
    """
    kind: Callable[..., Any] = type(part)
    check_kinds(vars(part), kinds(kind))


def check_rate(lr: float | torch.Tensor) -> None:
    """Refuse a learning rate that the host would have to wait for in every step.

    Args:
        lr: A number or a tensor.

    Raises:
        ValueError: It is a tensor on a device.
    """
    if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
        raise ValueError(
            f"lr is a tensor on {lr.device}, and every step would wait to read it: give a number or a tensor on the "
            "CPU, or capturable=True to an optimizer that takes it"
        )


def check_group(group: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    """Refuse hyperparameters of a group that are out of range or that differ where they may not.

    Args:
        group: The group, complete.
        shared: Settings that belong to the optimizer as a whole.

    Raises:
        TypeError: One of them is no number, or neither true nor false.
        ValueError: One of them is wrong.
    """
    check_kinds({**group, "momentum": group[HEAVY_BALL]}, _GROUP)
    check_rate(group["lr"])
    for name in ("lr", "weight_decay"):
        if not (math.isfinite(group[name]) and group[name] >= 0.0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]}")
    if not 0.0 <= group[HEAVY_BALL] < 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {group[HEAVY_BALL]}")
    if "momentum" in group:
        raise ValueError(
            f"a parameter group was given momentum={group['momentum']} afterwards, which has no effect: there it is "
            f"called {HEAVY_BALL}, where schedulers do not cycle it. Set group[{HEAVY_BALL!r}], and delete "
            "group['momentum']"
        )
    for name, value in shared.items():
        if group[name] != value:
            raise ValueError(
                f"{name} belongs to the one preconditioner over all parameter groups: it is {value}, but a group says "
                f"{group[name]}. Give it to the optimizer, or change it in every group"
            )


def check_parameter(param: torch.Tensor, name: Callable[[torch.Tensor], str]) -> None:
    """Refuse a parameter whose dtype cannot be stepped.

    Args:
        param: The parameter.
        name: Tells what to call it, when it comes to that.

    Raises:
        TypeError: Its dtype is not one of `PARAMETER_DTYPES`.
    """
    if param.dtype not in PARAMETER_DTYPES:
        expected = ", ".join(str(dtype) for dtype in PARAMETER_DTYPES)
        raise TypeError(f"parameters must be one of {expected}; {name(param)} is {param.dtype}: convert or freeze it")


def check_gradient(param: torch.Tensor, name: Callable[[torch.Tensor], str]) -> None:
    """Refuse a gradient that is not dense.

    Args:
        param: A parameter, with or without a gradient.
        name: Tells what to call it, when it comes to that.

    Raises:
        TypeError: The gradient is sparse.
    """
    if param.grad is not None and param.grad.layout != torch.strided:
        raise TypeError(
            f"the gradient of {name(param)} is sparse ({param.grad.layout}); EFCP needs dense gradients: use "
            "sparse=False in the embedding, or leave the parameter to another optimizer"
        )


def check_one_device(params: Iterable[torch.Tensor]) -> torch.device:
    """Refuse parameters on more than one device.

    Args:
        params: The parameters.

    Returns:
        Their device; the CPU when there are none.

    Raises:
        ValueError: There are several.
    """
    devices = {(param.device.type, param.device.index or 0): param.device for param in params}
    if len(devices) > 1:
        names = ", ".join(str(device) for device in devices.values())
        raise ValueError(
            f"all parameters of one optimizer must be on one device, got {names}: its preconditioner is one matrix "
            "over all of them. Move the model to one device"
        )
    return next(iter(devices.values()), torch.device("cpu"))


def check_writer(saved_groups: list[dict[str, Any]], settings: Iterable[str], version: int, reader: str) -> None:
    """Refuse a checkpoint that another optimizer or another version has written.

    Args:
        saved_groups: `param_groups` of the checkpoint.
        settings: The names that every group of this optimizer has.
        version: The format of its state.
        reader: What to call this optimizer.

    Raises:
        ValueError: A group has another format, or lacks some of the settings.
    """
    own = set(settings)
    for saved in saved_groups:
        if saved.get("efcp_format", version) != version:
            raise ValueError(
                f"the checkpoint has the state in format {saved['efcp_format']}, this version of hf_efcp reads format "
                f"{version}: go on with the version that wrote it (format 2 is 0.1), or load the model "
                "alone and start the optimizer afresh"
            )
        if own - saved.keys():
            raise ValueError(
                f"the checkpoint was written by {_writer(saved, own)}, and this optimizer is {reader}, whose state is "
                "another. Resume with the optimizer that wrote it, or load the model alone and start this one afresh "
                "(with Trainer, without resume_from_checkpoint)"
            )


def _writer(saved: Mapping[str, Any], own: set[str]) -> str:
    """What to call the optimizer that has made a parameter group."""
    names = saved.keys() - {"params", "param_names", "initial_lr", "given_lr"}
    if "efcp_format" in names:
        differs = f"without {', '.join(sorted(own - names))}"
        if more := sorted(names - own):
            differs = f"with {', '.join(more)} and {differs}"
        return f"another optimizer of hf_efcp, one {differs}"
    # Of torch's own, one whose settings are in the group, and as many as can be. Adam and AdamW differ in a switch.
    found: dict[str, tuple[int, int]] = {}
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            defaults = cls([torch.zeros(1, 1)]).defaults  # type: ignore[call-arg]
            if defaults.keys() <= names:
                alike = sum(saved[key] == value for key, value in defaults.items() if isinstance(value, bool))
                found[name] = len(defaults), alike
    likely = [f"torch.optim.{name}" for name, score in found.items() if score == max(found.values())]
    return " or ".join(likely) or f"an optimizer with the settings {', '.join(sorted(names))}"


def changed_settings(
    saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]], names: Iterable[str]
) -> list[str]:
    """What was given to an optimizer that a checkpoint is about to replace.

    Learning rates are compared as they were given: a schedule changes those in use.

    Args:
        saved_groups: `param_groups` of the checkpoint, which fit.
        groups: `param_groups` of this optimizer.
        names: The settings to compare, beside the learning rate.

    Returns:
        Each difference in words, once.
    """
    found = []
    for saved, group in zip(saved_groups, groups, strict=True):
        given = group["given_lr"]
        if given not in (saved.get("given_lr", given), float(saved["lr"])):
            found.append(f"lr={given} (in the checkpoint {saved['given_lr']})")
        found += [
            f"{'momentum' if name == HEAVY_BALL else name}={group[name]} (in the checkpoint {saved[name]})"
            for name in names
            if saved[name] != group[name]
        ]
    return list(dict.fromkeys(found))


def check_settings(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]], structure: Iterable[str]) -> None:
    """Refuse a checkpoint whose parameter groups were made from other parameters or with other settings.

    Args:
        saved_groups: `param_groups` of the checkpoint, by the same kind of optimizer.
        groups: `param_groups` of this optimizer.
        structure: Names of the settings that decide the shapes of the state.

    Raises:
        ValueError: They do not fit, with the mismatch named.
    """
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        raise ValueError(
            "the checkpoint has parameter groups of "
            f"{[len(group['params']) for group in saved_groups]} parameters, this optimizer of "
            f"{[len(group['params']) for group in groups]}: build it from the same model with the same groups"
        )
    for saved, group in zip(saved_groups, groups, strict=True):
        for name in structure:
            if saved[name] != group[name]:
                raise ValueError(
                    f"the checkpoint was made with {name}={saved[name]}, this optimizer has {name}={group[name]}: its "
                    "state has another shape. Build the optimizer with the checkpoint's settings, or start afresh"
                )


def check_tensors(saved: Mapping[str, Any], expected: Mapping[str, Any], optional: set[str], name: str) -> None:
    """Refuse a saved state whose tensors are not those that the optimizer would have made.

    Args:
        saved: State of one parameter in the checkpoint.
        expected: The state it should have; only shapes and dtypes count.
        optional: Names that may be present or absent.
        name: What to call the parameter.

    Raises:
        ValueError: A tensor is missing, unknown, or has another shape or dtype.
    """
    wrong = ((saved.keys() ^ expected.keys()) - optional) | {
        key for key in saved.keys() & expected.keys() if _signature(saved[key]) != _signature(expected[key])
    }
    if wrong:
        key = min(wrong)
        raise ValueError(
            f"the checkpoint's state of {name} does not fit: {key} is {_describe(saved.get(key))}, expected "
            f"{_describe(expected.get(key))}"
        )


def check_gram_states(states: list[dict[str, Any]], expected: Mapping[str, Any], every: bool) -> None:
    """Refuse windows that come without what they have in common (the number of rows, the Gram matrix), or with several.

    Args:
        states: The saved states of all preconditioned parameters.
        expected: What the state with a Gram matrix holds, by name.
        every: Every state has one, not just one of them.

    Raises:
        ValueError: There are too few or too many of them, or one is incomplete.
    """
    held = [expected.keys() & state.keys() for state in states]
    gram_states = sum(names == expected.keys() for names in held)
    partial = any(names and names != expected.keys() for names in held)
    if partial or gram_states != (len(states) if every else min(1, len(states))):
        raise ValueError(
            f"the checkpoint is incomplete: {gram_states} of its {len(states)} windows come with "
            f"{' and '.join(expected)}, expected {'all' if every else 'one'}. Load another checkpoint"
        )


def check_names(names: Iterable[Iterable[str]]) -> None:
    """Refuse a compressor or a preconditioner whose fields are called as something else in the parameter groups.

    Args:
        names: The names that each of them puts there.

    Raises:
        ValueError: Two have one in common.
    """
    seen: set[str] = {*_TAKEN, "given_lr"}
    for some in map(set, names):
        if both := sorted(seen & some):
            raise ValueError(
                f"{both[0]} would stand for two things in the parameter groups, where the fields of compressor and "
                "preconditioner are kept: rename the field"
            )
        seen |= some


def check_momentum(precondition: str, metric: str, beta1: float) -> None:
    """Refuse a first moment without a decay, a decay of the dense gradient, and a moment without a metric.

    Args:
        precondition: As given to the optimizer.
        metric: As given to the optimizer.
        beta1: As given to the optimizer.

    Raises:
        ValueError: They do not go together.
    """
    if metric == "none" and (beta1 or precondition == "momentum"):
        raise ValueError(
            'beta1 and precondition="momentum" are AdamW\'s first moment, which metric="none" does not keep: use '
            'metric="adam", or leave them out'
        )
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"beta1 must be in [0, 1), got {beta1}")
    if (precondition == "momentum" and beta1 == 0.0) or (precondition == "gradient" and beta1 != 0.0):
        raise ValueError(
            f"beta1={beta1} does not go with precondition={precondition!r}: use beta1=0.9 with "
            'precondition="momentum", and beta1=0 with precondition="gradient"'
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Args:
        name: The argument.
        value: Its value.
        choices: What it may be.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _signature(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return "absent" if value is None else type(value).__name__
