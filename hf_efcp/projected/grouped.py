"""Parameter groups whose settings are one value for all, checked, and state that is loaded to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .. import checks
from ..kernels import widest
from ..optimizer import FORMAT
from ..sites import Group, Member
from .settings import check_group, check_writer

State = dict[str, Any]
_LONGEST = 1e18  # of a gradient; the second moment has its square


class Grouped(torch.optim.Optimizer):
    """What a projected optimizer does with its groups and its state, whatever it computes.

    A subclass makes the state of a parameter in `_fresh`, and steps.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        nonfinite: "raise" or "skip".
        structure: Settings that decide the shapes of the state, and so can neither change nor differ in a checkpoint.
        tunable: Settings that may change, in all groups at once.
    """

    positive: ClassVar[tuple[str, ...]] = ()  # settings that must be above 0
    fractions: ClassVar[tuple[str, ...]] = ()  # settings in [0, 1)

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        weight_decay: float,
        nonfinite: str,
        *,
        structure: Mapping[str, Any],
        tunable: Mapping[str, Any],
    ) -> None:
        checks.check_choice("nonfinite", nonfinite, ("raise", "skip"))
        self._structure: Group = dict(structure)
        self._tunable = tuple(tunable)
        self._skip_nonfinite = nonfinite == "skip"
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "preconditioned": True,
            "skipped_steps": 0,
            "efcp_format": FORMAT,
            "projected": type(self).__name__,
            **structure,
            **tunable,
        }
        annotated: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__):
            annotated |= checks.kinds(cls.__init__) if issubclass(cls, Grouped) else {}
        self._kinds = {name: annotated.get(name, type(value)) for name, value in defaults.items()}
        self._settings = tuple(defaults)
        self._own = tuple(self.__dict__)  # what the base class does not know
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """The base class drops every attribute that it does not know from copies and pickles."""
        return {**super().__getstate__(), "_own": self._own, **{name: self.__dict__[name] for name in self._own}}

    @property
    def skipped_steps(self) -> int:
        """Steps that `nonfinite="skip"` left out, since the start and over all resumes."""
        return int(self.param_groups[0]["skipped_steps"])

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, before or after the first step.

        Args:
            param_group: As for any `torch.optim.Optimizer`.

        Raises:
            ValueError: A value is outside its range, or differs from the optimizer's where it may not.
            TypeError: A value is of another type, or a parameter has a dtype that is not supported.
        """
        shared = self._shared()
        param_group = {**shared, **param_group}
        self._check_group({**self.defaults, **param_group}, shared)
        # Schedules change the learning rate: what was given is kept to be compared with what a checkpoint has.
        param_group.setdefault("given_lr", float(param_group.get("lr", self.defaults["lr"])))
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                if param.requires_grad:
                    checks.check_parameter(param, self._name)
        except TypeError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, bit for bit, whatever the parameters' dtype.

        Hyperparameters come from the checkpoint, as in every `torch.optim.Optimizer`, with a warning if others were
        given; those that decide the shapes of the state must be equal.

        Args:
            state_dict: A checkpoint of the same optimizer over the same groups.

        Raises:
            ValueError: It does not fit. Nothing was changed.
        """
        saved_groups = state_dict["param_groups"]
        self._check_groups(saved_groups)
        keys = [key for group in saved_groups for key in group["params"]]
        loaded = [
            (member, state_dict["state"][key])
            for key, member in zip(keys, self._members(), strict=True)
            if state_dict["state"].get(key)
        ]
        for member, saved in loaded:
            checks.check_tensors(saved, self._fresh(member, "meta"), set(), self._name(member.param))
        names = ("weight_decay", *self._tunable)
        if changed := checks.changed_settings(saved_groups, self.param_groups, names):
            warnings.warn(
                "the settings of the checkpoint are taken, as in every torch.optim.Optimizer, and not those that were "
                f"given: {', '.join(changed)}. To use yours, set them in optimizer.param_groups after loading",
                stacklevel=2,
            )
        super().load_state_dict({**state_dict, "state": {}})
        for member, saved in loaded:
            self.state[member.param] = {name: _copied(name, value, member.param) for name, value in saved.items()}

    def _check_groups(self, saved_groups: list[Group]) -> None:
        """Refuse the parameter groups of a checkpoint that does not fit."""
        check_writer(saved_groups, self._settings, type(self).__name__)
        checks.check_settings(saved_groups, self.param_groups, ("preconditioned", *self._structure))

    def _check_group(self, group: Group, shared: Group) -> None:
        check_group(group, shared, self._kinds, self.positive, self.fractions)

    def _refuses_nonfinite(self, active: list[Member]) -> bool:
        """Whether the step is to be skipped, for a gradient that is not finite or whose square is not."""
        wide = widest(active[0].param.device)
        lengths = torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad in _gradients(active)]).tolist()
        found = list(zip(active, _gradients(active), lengths, strict=True))
        bad = [member.param for member, grad, length in found if not checks.is_finite(grad, length)]
        large = [(member.param, length) for member, _, length in found if length > _LONGEST]
        if not self._skip_nonfinite:
            if bad:
                raise ValueError(checks.nonfinite_message(bad, self._name))
            for param, length in large:
                raise ValueError(
                    f"the gradient of {self._name(param)} has norm {length:.3g}, and at most {_LONGEST:g} can be "
                    "squared in float32; nothing was changed. Skip such steps (nonfinite='skip') or clip the gradients"
                )
        for group in self.param_groups if bad or large else ():
            group["skipped_steps"] += 1
        return bool(bad or large)

    def _members(self) -> list[Member]:
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        return [Member(position, group, param) for position, (group, param) in enumerate(pairs)]

    def _shared(self) -> Group:
        """The settings that are one value for all groups, as they are now."""
        source = self.param_groups[0] if self.param_groups else self.defaults
        return {**self._structure, **{name: source[name] for name in self._tunable}}

    def _name(self, param: torch.Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    if "param_names" in group:
                        return str(group["param_names"][position])
                    return f"parameter {position} of group {number} (shape {tuple(param.shape)})"
        raise KeyError("not a parameter of this optimizer")

    def _fresh(self, member: Member, device: torch.device | str) -> State:
        """The state of a parameter that was never stepped; on "meta", its shapes without memory."""
        raise NotImplementedError


def _copied(name: str, value: Any, param: torch.Tensor) -> Any:
    """A copy of a saved value, on the device where it belongs."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("cpu" if name in ("gram", "step") else param.device, copy=True)


def _gradients(members: list[Member]) -> list[torch.Tensor]:
    return [member.param.grad for member in members if member.param.grad is not None]
