"""Parameter groups whose settings are one value for all, checked, and state that is loaded to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .. import checks, finite
from ..base import FORMAT, GroupedOptimizer
from ..kernels import widest
from ..layout import State
from ..leaves import Group, ParamRef
from .settings import check_group, check_writer

_LONGEST = 1e18  # of a gradient; the second moment has its square


class Grouped(GroupedOptimizer):
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

    def _check_groups(self, saved_groups: list[Group]) -> None:
        """Refuse the parameter groups of a checkpoint that does not fit."""
        check_writer(saved_groups, self._settings, type(self).__name__)
        checks.check_settings(saved_groups, self.param_groups, ("preconditioned", *self._structure))

    def _check_states(self, saved: list[tuple[ParamRef, State]]) -> None:
        for ref, state in saved:
            checks.check_tensors(state, self._fresh(ref, "meta"), set(), self._name(ref.param))

    def _check_group(self, group: Group, shared: Group) -> None:
        check_group(group, shared, self._kinds, self.positive, self.fractions)

    def _refuses_nonfinite(self, active: list[ParamRef]) -> bool:
        """Whether the step is to be skipped, for a gradient that is not finite or whose square is not."""
        wide = widest(active[0].param.device)
        lengths = torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad in _gradients(active)]).tolist()
        found = list(zip(active, _gradients(active), lengths, strict=True))
        bad = [ref.param for ref, grad, length in found if not finite.is_finite(grad, length)]
        large = [(ref.param, length) for ref, _, length in found if length > _LONGEST]
        if not self._skip_nonfinite:
            if bad:
                raise ValueError(finite.message(bad, self._name))
            for param, length in large:
                raise ValueError(
                    f"the gradient of {self._name(param)} has norm {length:.3g}, and at most {_LONGEST:g} can be "
                    "squared in float32; nothing was changed. Skip such steps (nonfinite='skip') or clip the gradients"
                )
        if bad or large:
            self._count_skipped()
        return bool(bad or large)

    def _fresh(self, ref: ParamRef, device: torch.device | str) -> State:
        """The state of a parameter that was never stepped; on "meta", its shapes without memory."""
        raise NotImplementedError


def _gradients(refs: list[ParamRef]) -> list[torch.Tensor]:
    return [ref.param.grad for ref in refs if ref.param.grad is not None]
