"""What every optimizer of the package does with its parameter groups and its state, whatever it computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch

from . import checks, groups, loading
from .layout import State
from .leaves import Group, ParamRef

FORMAT = 3  # of the state; a checkpoint says which it has


class GroupedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: settings that are one value for all groups, checked, and state that loads to the bit.

    A subclass sets `_structure` (settings that decide the shapes of the state, and so can neither change nor differ in
    a checkpoint), `_tunable` (names of settings that may change, in all groups at once), `_settings` (the names that
    every group has) and `_own` (its attributes) before it calls the base class, and checks groups and states.
    """

    _structure: Group
    _tunable: tuple[str, ...]
    _settings: tuple[str, ...]
    _own: tuple[str, ...]

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
        param_group = {**shared, **groups.with_names(groups.renamed(groups.plain(param_group)), self.param_groups)}
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

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. What is wrong with the gradients is raised before anything has changed.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            ValueError: A gradient has NaN or infinity, parameters are on several devices, or a group's settings are
                out of range or differ where they may not. With a projected optimizer also if a gradient's norm is
                above 1e18, or parameters are sharded. With `EFCP` also if the update would overflow, for want of
                dampening: then no parameter has moved, but the window has the gradient.
            TypeError: A gradient is sparse, or a parameter's dtype is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, bit for bit.

        The base class would cast every tensor to its parameter's dtype, indices too. Hyperparameters come from the
        checkpoint, as in every `torch.optim.Optimizer`, with a warning if others were given; those that decide the
        shapes of the state must be equal.

        Args:
            state_dict: A checkpoint of the same optimizer over the same groups.

        Raises:
            ValueError: It does not fit. Nothing was changed.
        """
        state_dict = dict(state_dict)  # as hooks may change it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_groups(state_dict["param_groups"])
        saved = loading.saved_states(state_dict, self._refs())
        self._check_states(saved)
        loading.warn_of_changes(state_dict["param_groups"], self.param_groups, self._tunable)
        with self._without_load_hooks():
            super().load_state_dict({**state_dict, "state": {}})
        for ref, state in saved:
            self.state[ref.param] = {name: loading.copied(name, v, ref.param) for name, v in state.items()}
        self._forget()
        for finish in self._optimizer_load_state_dict_post_hooks.values():
            finish(self)

    @contextmanager
    def _without_load_hooks(self) -> Iterator[None]:
        """Hooks see the state before it is checked and when it is there; the base class would show them none."""
        names = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"
        hooks = {name: getattr(self, name) for name in names}
        try:
            self.__dict__.update({name: OrderedDict() for name in names})
            yield
        finally:
            self.__dict__.update(hooks)

    def _forget(self) -> None:
        """Drop what was made of the state that was there before."""

    def _step_all(self) -> None:
        """Step everything that has a gradient."""
        raise NotImplementedError

    def _check_group(self, group: Group, shared: Group) -> None:
        """Refuse settings of a group, complete, that are out of range or differ where they may not."""
        raise NotImplementedError

    def _check_groups(self, saved_groups: list[Group]) -> None:
        """Refuse the parameter groups of a checkpoint that does not fit."""
        checks.check_writer(saved_groups, self._settings, FORMAT, type(self).__name__)
        checks.check_settings(saved_groups, self.param_groups, ("preconditioned", *self._structure))

    def _check_states(self, saved: list[tuple[ParamRef, State]]) -> None:
        """Refuse saved states that do not fit their parameters."""
        raise NotImplementedError

    def _refs(self) -> list[ParamRef]:
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        return [ParamRef(position, group, param) for position, (group, param) in enumerate(pairs)]

    def _shared(self) -> Group:
        """The settings that are one value for all groups, as they are now."""
        source = self.param_groups[0] if self.param_groups else self.defaults
        return {**self._structure, **{name: source[name] for name in self._tunable}}

    def _name(self, param: torch.Tensor) -> str:
        return groups.name_of(param, self.param_groups)

    def _count_skipped(self) -> None:
        for group in self.param_groups:
            group["skipped_steps"] += 1
