"""EFCP: compressor, window and preconditioner meet in one `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple, overload

import torch
from torch.optim.optimizer import ParamsT

from . import adamw, checks
from .compressors import Compressor
from .errors import error_store
from .kernels import Kernels, check_name, choose
from .preconditioners import Moment, Preconditioner

Group = dict[str, Any]


class Member(NamedTuple):
    """A parameter, its group, and its position among all parameters of the optimizer."""

    position: int
    group: Group
    param: torch.Tensor


class EFCP(torch.optim.Optimizer):
    """Full-matrix preconditioning over a window of compressed gradients, with error feedback.

    One step, for all parameters together (EFCP, arXiv 2306.06098, algorithm 1)::

        a_t   = e_t + g_t               accumulator: error + gradient
        row_t = C(a_t)                  compressor
        e_t+1 = a_t - row_t             error feedback
        G     <- row_t in the place of the oldest of the last m rows
        u_t   = P(G)^-1 row_t = G^T c   preconditioner, c from the Gram matrix G G^T
        v_t   = momentum v_t-1 + u_t    heavy ball on the update
        theta <- (1 - lr weight_decay) theta - lr v_t

    Parameter groups may set `lr`, `weight_decay`, `decoupled_weight_decay`, `momentum` and `preconditioned`; all else
    is one value for the optimizer, because the preconditioner is one matrix over all groups. `preconditioned=False`
    steps a group as `torch.optim.AdamW` would (betas 0.9 and 0.999, eps 1e-8) at the group's own learning rate.

    Arithmetic is float32, the Gram matrix and every sum over rows float64. A parameter without a gradient is neither
    decayed nor moved, its row is zero and its error kept; a step in which no parameter has a gradient does nothing.
    Parameters may be float32, bfloat16 or float16, contiguous or not, and all on one device. State is allocated at the
    first step; parameters that are added or unfrozen later have zeros in the rows that were pushed without them.

    Args:
        params: Parameters or groups, as for any `torch.optim.Optimizer`.
        lr: Learning rate, at least 0.
        compressor: `C`, for example `TopK(density=0.01)`.
        preconditioner: `P`, for example `MFAC(damp=1e-5)`.
        num_grads: Capacity `m` of the window, in gradients.
        momentum: Heavy-ball factor of the update, in [0, 1); costs 4 bytes per parameter unless it is 0.
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True shrinks the parameters (AdamW's way); False adds `weight_decay * theta` to the
            gradient before the accumulator (L2 regularisation).
        precondition: What `P(G)^-1` is applied to: "row", the compressed row, or "gradient", the dense gradient.
        scope: "model", one preconditioner over all parameters, or "layer", one for each parameter.
        error_dtype: How the error is kept.
        schedules: Hyperparameters of the preconditioner that are functions of the number of rows pushed so far, by
            name. The current value stands in the parameter groups, and is what is saved.
        backend: "auto" (numba on the CPU, plain torch elsewhere), "reference" (plain torch) or "numba".

    Raises:
        ValueError: A value outside its range.
        TypeError: `num_grads` is not an int, or a parameter has a dtype that is not supported.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        compressor: Compressor,
        preconditioner: Preconditioner,
        num_grads: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        precondition: str = "row",
        scope: str = "model",
        error_dtype: torch.dtype = torch.float32,
        schedules: Mapping[str, Callable[[int], float]] | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(num_grads, int) or isinstance(num_grads, bool):
            raise TypeError(f"num_grads must be an int, got {num_grads!r}")
        if num_grads < 1:
            raise ValueError(f"num_grads is the number of gradients in the window, at least 1; got {num_grads}")
        checks.check_choice("precondition", precondition, ("row", "gradient"))
        checks.check_choice("scope", scope, ("model", "layer"))
        if precondition == "gradient" and not preconditioner.uses_gram:
            raise ValueError(f'precondition="gradient" needs a full matrix; {type(preconditioner).__name__} has none')
        check_name(backend)
        self._preconditioner = preconditioner
        self._compressor = compressor
        self._window = compressor.window(num_grads)
        self._errors = error_store(error_dtype)
        self._precondition_gradient = precondition == "gradient"
        self._schedules = dict(schedules or {})
        self._backend = backend
        # What decides the shapes of the state, and so can neither change nor differ in a checkpoint.
        self._structure = {"num_grads": num_grads, "scope": scope, "error_dtype": error_dtype, **asdict(compressor)}
        self._tunable = tuple(asdict(preconditioner))
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "preconditioned": True,
        }
        super().__init__(params, {**defaults, **self._structure, **asdict(preconditioner)})

    def __getstate__(self) -> dict[str, Any]:
        """The base class drops every attribute that it does not know from copies and pickles."""
        own = {name: value for name, value in self.__dict__.items() if name in _OWN}
        return {**super().__getstate__(), **own}

    @property
    def backend(self) -> str:
        """The backend that steps the parameters where they are now: "numba" or "reference"."""
        return choose(self._backend, checks.check_one_device(member.param for member in self._members())).NAME

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, before or after the first step.

        Args:
            param_group: As for any `torch.optim.Optimizer`.

        Raises:
            ValueError: A value is outside its range, or differs from the optimizer's where it may not.
            TypeError: A parameter has a dtype that is not supported.
        """
        shared = self._shared()
        checks.check_group({**self.defaults, **shared, **param_group}, shared)
        super().add_param_group({**shared, **param_group})
        try:
            for param in self.param_groups[-1]["params"]:
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
                out of range or differ where they may not.
            TypeError: A gradient is sparse, or a parameter's dtype is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [m for m in self._members() if m.param.requires_grad or m.param.grad is not None]
        if all(member.param.grad is None for member in active):
            return loss
        device = checks.check_one_device(member.param for member in active)
        shared = self._shared()
        for group in self.param_groups:
            checks.check_group(group, shared)
        for member in active:
            checks.check_parameter(member.param, self._name)
            checks.check_gradient(member.param, self._name)
        tuned = {name: shared[name] for name in self._tunable} | self._scheduled()
        preconditioner = replace(self._preconditioner, **tuned)
        kernels = choose(self._backend, device)

        for group in self.param_groups:
            group.update(tuned)
        for member in active:
            self._allocate(member)
        for unit in self._units():
            self._step_unit(unit, preconditioner, kernels)
        for group in self.param_groups:
            if not group["preconditioned"]:
                params = [param for param in group["params"] if param.grad is not None]
                states = [self.state[param] for param in params]
                adamw.step(params, states, lr=float(group["lr"]), weight_decay=group["weight_decay"])
        return loss

    def memory(self) -> dict[str, int]:
        """Bytes of the state that exists now; `hf_efcp.estimate_memory` tells them beforehand.

        Returns:
            Bytes by part: `indices` and `values` of the window, `error`, `momentum` (with the moments and sums of
            diagonal rules), `gram`, and their `total`.
        """
        return _count(self.state[member.param] for member in self._members() if member.param in self.state)

    def planned_memory(self) -> dict[str, int]:
        """Bytes of the state once every parameter that requires a gradient has been stepped.

        Returns:
            As `memory`.
        """
        trainable = [member for member in self._members() if member.param.requires_grad]
        states = [self._fresh(member, "meta") for member in trainable]
        units = [member for member in trainable if member.group["preconditioned"]]
        keepers = len(units) if self._structure["scope"] == "layer" else min(1, len(units))
        return _count([*states, *(self._fresh_keeper("meta") for _ in range(keepers))])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, bit for bit.

        The base class would cast every tensor to its parameter's dtype, indices too. Hyperparameters come from the
        checkpoint, as in every `torch.optim.Optimizer`; those that decide the shapes of the state must be equal.

        Args:
            state_dict: A checkpoint of the same optimizer over the same groups.

        Raises:
            ValueError: It does not fit. Nothing was changed.
        """
        saved_groups = state_dict["param_groups"]
        checks.check_settings(saved_groups, self.param_groups, ("preconditioned", *self._structure))
        keys = [key for group in saved_groups for key in group["params"]]
        owners = [group for group in saved_groups for _ in group["params"]]
        loaded = []
        for key, saved_group, member in zip(keys, owners, self._members(), strict=True):
            if saved := state_dict["state"].get(key):
                self._check_saved(saved, member._replace(group=saved_group))
                loaded.append((member, saved))
        windows = [saved for member, saved in loaded if member.group["preconditioned"]]
        checks.check_keepers(windows, self._fresh_keeper("meta"), self._structure["scope"] == "layer")
        super().load_state_dict({**state_dict, "state": {}})
        for member, saved in loaded:
            self.state[member.param] = {
                name: value.detach().to("cpu" if name in ("gram", "step") else member.param.device, copy=True)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in saved.items()
            }

    def _members(self) -> list[Member]:
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        return [Member(position, group, param) for position, (group, param) in enumerate(pairs)]

    def _units(self) -> list[list[Member]]:
        """Parameters that share a preconditioner. One without a gradient takes part, with a row of zeros."""
        members = [m for m in self._members() if m.group["preconditioned"] and self.state.get(m.param)]
        if self._structure["scope"] == "layer":
            return [[member] for member in members if member.param.grad is not None]
        return [members] if any(member.param.grad is not None for member in members) else []

    def _shared(self) -> Group:
        """The settings that are one value for all groups, as they are now."""
        source = self.param_groups[0] if self.param_groups else self.defaults
        return {**self._structure, **{name: source[name] for name in self._tunable}}

    def _scheduled(self) -> Group:
        """The values of the schedules for this step."""
        keeper = self._keeper(self._members())
        return {name: float(f(keeper["pushed"] if keeper else 0)) for name, f in self._schedules.items()}

    def _name(self, param: torch.Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    if "param_names" in group:
                        return str(group["param_names"][position])
                    return f"parameter {position} of group {number} (shape {tuple(param.shape)})"
        raise KeyError("not a parameter of this optimizer")

    def _fresh(self, member: Member, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The state of a parameter that was never stepped. On "meta" it has shapes and no memory."""
        position, group, param = member
        if not group["preconditioned"]:
            return adamw.allocate(param, device)
        state = {} if self._compressor.lossless else self._errors.allocate(param.shape, device)
        if group["momentum"]:
            state["momentum"] = torch.zeros(param.shape, dtype=torch.float32, device=device)
        state |= self._window.allocate(param.shape, device)
        state |= self._compressor.allocate(param.shape, device, position)
        return state | self._preconditioner.allocate(param.shape, device)

    def _fresh_keeper(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """What a unit has in common: rows pushed, and the Gram matrix of its rows, float64 on the CPU."""
        if not self._preconditioner.uses_gram:
            return {"pushed": 0}
        capacity = self._structure["num_grads"]
        return {"pushed": 0, "gram": torch.zeros(capacity, capacity, dtype=torch.float64, device=device)}

    def _allocate(self, member: Member) -> None:
        group, state = member.group, self.state[member.param]
        if not state:
            state.update(self._fresh(member, member.param.device))
            if group["preconditioned"] and (self._structure["scope"] == "layer" or not self._keeper(self._members())):
                # With a parameter, since a checkpoint keeps nothing that no parameter owns.
                state.update(self._fresh_keeper())
        elif group["preconditioned"] and group["momentum"] and "momentum" not in state:
            state["momentum"] = torch.zeros(member.param.shape, dtype=torch.float32, device=member.param.device)

    def _keeper(self, members: Iterable[Member]) -> dict[str, Any]:
        """The state that holds what a unit has in common; empty before the first step."""
        return next((self.state[m.param] for m in members if "pushed" in self.state.get(m.param, ())), {})

    def _step_unit(self, unit: list[Member], preconditioner: Preconditioner, kernels: Kernels) -> None:
        """Push a row, and move the parameters that share it."""
        keeper, capacity = self._keeper(unit), self._structure["num_grads"]
        steps = keeper["pushed"] + 1
        moment = Moment((steps - 1) % capacity, min(steps, capacity), capacity, steps)
        present = [member for member in unit if member.param.grad is not None]
        for member in unit:
            if member.param.grad is None:
                self._window.clear(self.state[member.param], member.param.shape, moment.newest)
        for member in present:
            self._push(member, moment, kernels)
        gram = None
        if preconditioner.uses_gram:
            column = torch.zeros(moment.rows, dtype=torch.float64)
            for _, _, param in present:
                column += self._window.dots(self.state[param], param.shape, moment.newest, moment.rows, kernels)
            keeper["gram"][moment.newest, : moment.rows] = column
            keeper["gram"][: moment.rows, moment.newest] = column
            gram = keeper["gram"][: moment.rows, : moment.rows]
        keeper["pushed"] = steps
        if self._precondition_gradient and gram is not None:
            products = torch.zeros(moment.rows, dtype=torch.float64)
            for _, group, param in present:
                gradient = _gradient(group, param)
                products += self._window.project(self.state[param], param.shape, gradient, moment.rows, kernels)
            plan = preconditioner.plan_outside(gram, products, moment)
        else:
            plan = preconditioner.plan(gram, moment)
        for _, group, param in present:
            state = self.state[param]
            base = _gradient(group, param) if self._precondition_gradient else None
            updates = preconditioner.updates(plan, self._window, state, param.shape, kernels, base)
            _apply(group, param, state, updates)

    def _push(self, member: Member, moment: Moment, kernels: Kernels) -> None:
        """Compress a gradient into the window."""
        position, group, param = member
        state = self.state[param]
        row = self._window.row(state, param.shape, moment.newest)
        gradient = _gradient(group, param)
        if self._compressor.lossless:
            self._compressor.compress(gradient, None, row, state, kernels)
            return
        error = self._errors.load(state, param.shape, kernels)
        self._compressor.compress(gradient, error, row, state, kernels)
        self._errors.save(state, error, moment.steps, position, kernels)

    def _check_saved(self, saved: dict[str, Any], member: Member) -> None:
        expected = self._fresh(member._replace(group={**member.group, "momentum": 1.0}), "meta")
        if member.group["preconditioned"]:
            expected |= {name: v for name, v in self._fresh_keeper("meta").items() if name in saved}
        name = self._name(member.param)
        checks.check_tensors(saved, expected, {"momentum"}, name)
        if member.group["preconditioned"]:
            self._window.check(saved, member.param.shape, name)


_OWN = frozenset({
    "_preconditioner",
    "_compressor",
    "_window",
    "_errors",
    "_precondition_gradient",
    "_schedules",
    "_backend",
    "_structure",
    "_tunable",
})


def _gradient(group: Group, param: torch.Tensor) -> torch.Tensor:
    """The gradient in float32, contiguous, with L2 regularisation where it is not decoupled."""
    assert param.grad is not None
    gradient = param.grad.to(torch.float32).contiguous()
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        gradient = gradient.add(param.to(torch.float32), alpha=group["weight_decay"]).contiguous()
    return gradient


def _apply(
    group: Group, param: torch.Tensor, state: dict[str, Any], updates: Iterable[tuple[slice, torch.Tensor]]
) -> None:
    """`theta <- (1 - lr weight_decay) theta - lr v`, slab by slab of the flattened parameter."""
    lr = float(group["lr"])
    keep = 1.0 - lr * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
    in_place = param.dtype == torch.float32 and param.is_contiguous()
    # A view of a non-contiguous parameter may be a copy, and low precision would round every slab twice.
    theta = param if in_place else param.to(torch.float32).contiguous()
    flat = theta.view(-1)
    for span, update in updates:
        if group["momentum"]:
            update = state["momentum"].view(-1)[span].mul_(group["momentum"]).add_(update)
        flat[span].mul_(keep).add_(update, alpha=-lr)
    if not in_place:
        param.copy_(theta)


def _count(states: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the tensors in some states, by part."""
    parts = dict.fromkeys(("indices", "values", "error", "momentum", "gram"), 0)
    for state in states:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                parts[_PART.get(name.partition("_")[0], "values")] += value.nbytes
    return {**parts, "total": sum(parts.values())}


# By the first word of a tensor's name; all else is part of a window.
_PART = {
    "indices": "indices",
    "error": "error",
    "momentum": "momentum",
    "exp": "momentum",
    "step": "momentum",
    "sum": "momentum",
    "gram": "gram",
}
