"""EFCP: compressor, window and preconditioner meet in one `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

from . import adamw, checks
from .compressors import Compressor
from .kernels import Kernels, check_name, choose
from .preconditioners import Preconditioner

Group = dict[str, Any]
Member = tuple[Group, torch.Tensor]


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

    Parameter groups may set `lr`, `weight_decay`, `momentum` and `preconditioned`; all else is one value for the
    optimizer, because the preconditioner is one matrix over all groups. `preconditioned=False` steps a group as
    `torch.optim.AdamW` would (betas 0.9 and 0.999, eps 1e-8) at the group's own learning rate.

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
        weight_decay: Decoupled weight decay, at least 0.
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
        backend: str = "auto",
    ) -> None:
        if not isinstance(num_grads, int) or isinstance(num_grads, bool):
            raise TypeError(f"num_grads must be an int, got {num_grads!r}")
        if num_grads < 1:
            raise ValueError(f"num_grads is the number of gradients in the window, at least 1; got {num_grads}")
        check_name(backend)
        self._preconditioner = preconditioner
        self._compressor = compressor
        self._window = compressor.window(num_grads)
        self._backend = backend
        # What decides the shapes of the state, and so can neither change nor differ in a checkpoint.
        self._structure = {"num_grads": num_grads, **asdict(compressor)}
        self._tunable = tuple(asdict(preconditioner))
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "preconditioned": True}
        super().__init__(params, {**defaults, **self._structure, **asdict(preconditioner)})

    def __getstate__(self) -> dict[str, Any]:
        """The base class drops every attribute that it does not know from copies and pickles."""
        own = ("_preconditioner", "_compressor", "_window", "_backend", "_structure", "_tunable")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @property
    def backend(self) -> str:
        """The backend that steps the parameters where they are now: "numba" or "reference"."""
        return choose(self._backend, checks.check_one_device(param for _, param in self._parameters())).NAME

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
        active = [
            (group, param) for group, param in self._parameters() if param.requires_grad or param.grad is not None
        ]
        if all(param.grad is None for _, param in active):
            return loss
        device = checks.check_one_device(param for _, param in active)
        shared = self._shared()
        for group in self.param_groups:
            checks.check_group(group, shared)
        for _, param in active:
            checks.check_parameter(param, self._name)
            checks.check_gradient(param, self._name)
        preconditioner = replace(self._preconditioner, **{name: shared[name] for name in self._tunable})
        kernels = choose(self._backend, device)

        for group, param in active:
            self._allocate(group, param)
        members = [(group, param) for group, param in self._parameters() if "error" in self.state.get(param, ())]
        if members:
            coefficients = self._push(members, preconditioner, kernels)
            for group, param in members:
                if param.grad is not None:
                    self._update(group, param, coefficients, kernels)
        for group in self.param_groups:
            if not group["preconditioned"]:
                params = [param for param in group["params"] if param.grad is not None]
                states = [self.state[param] for param in params]
                adamw.step(params, states, lr=float(group["lr"]), weight_decay=group["weight_decay"])
        return loss

    def memory(self) -> dict[str, int]:
        """Bytes of the state that exists now; `hf_efcp.estimate_memory` tells them beforehand.

        Returns:
            Bytes by part: `indices` and `values` of the window, `error`, `momentum` (with AdamW's moments of groups
            that are not preconditioned), `gram`, and their `total`.
        """
        return _count(self.state[param] for _, param in self._parameters() if param in self.state)

    def planned_memory(self) -> dict[str, int]:
        """Bytes of the state once every parameter that requires a gradient has been stepped.

        Returns:
            As `memory`.
        """
        states = [self._fresh(group, param, "meta") for group, param in self._parameters() if param.requires_grad]
        if any("error" in state for state in states):
            states.append({"gram": self._fresh_gram("meta")})
        return _count(states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, bit for bit.

        The base class would cast every tensor to its parameter's dtype, indices too. Hyperparameters come from the
        checkpoint, as in every `torch.optim.Optimizer`; those that decide the shapes of the state must be equal.

        Args:
            state_dict: A checkpoint of the same optimizer over the same groups.

        Raises:
            ValueError: It does not fit. Nothing was changed.
        """
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        checks.check_settings(saved_groups, groups, ("preconditioned", *self._structure))
        loaded = []
        for saved_group, group in zip(saved_groups, groups, strict=True):
            for key, param in zip(saved_group["params"], group["params"], strict=True):
                if saved := state_dict["state"].get(key):
                    self._check_saved(saved, saved_group, param)
                    loaded.append((param, saved))
        checks.check_keeper([saved for _, saved in loaded])
        super().load_state_dict({**state_dict, "state": {}})
        for param, saved in loaded:
            self.state[param] = {
                name: value.detach().to("cpu" if name in ("gram", "step") else param.device, copy=True)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in saved.items()
            }

    def _parameters(self) -> list[Member]:
        return [(group, param) for group in self.param_groups for param in group["params"]]

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

    def _fresh(self, group: Group, param: torch.Tensor, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The state of a parameter that was never stepped. On "meta" it has shapes and no memory."""
        if not group["preconditioned"]:
            return adamw.allocate(param, device)
        state = {"error": torch.zeros(param.shape, dtype=torch.float32, device=device)}
        if group["momentum"]:
            state["momentum"] = torch.zeros_like(state["error"])
        return {**state, **self._window.allocate(param.shape, device)}

    def _fresh_gram(self, device: torch.device | str = "cpu") -> torch.Tensor:
        capacity = self._structure["num_grads"]
        return torch.zeros(capacity, capacity, dtype=torch.float64, device=device)

    def _allocate(self, group: Group, param: torch.Tensor) -> None:
        state = self.state[param]
        if not state:
            state.update(self._fresh(group, param, param.device))
            if "error" in state and self._keeper() is None:
                # The Gram matrix lives with the first parameter: a checkpoint keeps nothing that no parameter owns.
                state.update(gram=self._fresh_gram(), pushed=0)
        elif group["preconditioned"] and group["momentum"] and "momentum" not in state:
            state["momentum"] = torch.zeros_like(state["error"])

    def _keeper(self) -> dict[str, Any] | None:
        """The state that holds the Gram matrix and the number of rows pushed."""
        return next((self.state[p] for _, p in self._parameters() if "gram" in self.state.get(p, ())), None)

    def _push(self, members: Iterable[Member], preconditioner: Preconditioner, kernels: Kernels) -> torch.Tensor:
        """Compress the gradients into the window's oldest row; the coefficients of the update."""
        keeper = self._keeper()
        assert keeper is not None  # whoever allocates a window allocates the Gram matrix
        capacity = self._structure["num_grads"]
        newest = keeper["pushed"] % capacity
        rows = min(keeper["pushed"] + 1, capacity)
        column = torch.zeros(rows, dtype=torch.float64)
        for _, param in members:
            state = self.state[param]
            if param.grad is None:
                self._window.clear(state, param.shape, newest)
                continue
            row = self._window.row(state, param.shape, newest)
            gradient = param.grad.to(torch.float32).contiguous()
            self._compressor.compress(gradient, state["error"], row, kernels)
            column += self._window.dots(state, param.shape, newest, rows, kernels)
        keeper["pushed"] += 1
        gram = keeper["gram"]
        gram[newest, :rows] = column
        gram[:rows, newest] = column
        return preconditioner.coefficients(gram[:rows, :rows], newest, capacity)

    def _update(self, group: Group, param: torch.Tensor, coefficients: torch.Tensor, kernels: Kernels) -> None:
        """`theta <- (1 - lr weight_decay) theta - lr v`, slab by slab of the flattened parameter."""
        state, lr = self.state[param], float(group["lr"])
        in_place = param.dtype == torch.float32 and param.is_contiguous()
        # A view of a non-contiguous parameter may be a copy, and low precision would round every slab twice.
        theta = param if in_place else param.to(torch.float32).contiguous()
        flat = theta.view(-1)
        for span, update in self._window.combine(state, param.shape, coefficients, kernels):
            if group["momentum"]:
                update = state["momentum"].view(-1)[span].mul_(group["momentum"]).add_(update)
            flat[span].mul_(1.0 - lr * group["weight_decay"]).add_(update, alpha=-lr)
        if not in_place:
            param.copy_(theta)

    def _check_saved(self, saved: dict[str, Any], saved_group: Group, param: torch.Tensor) -> None:
        expected = self._fresh({**saved_group, "momentum": 1.0}, param, "meta")
        if "gram" in saved:
            expected["gram"] = self._fresh_gram("meta")
        name = self._name(param)
        checks.check_tensors(saved, expected, {"momentum", "pushed"}, name)
        if saved_group["preconditioned"]:
            self._window.check(saved, param.shape, name)


def _count(states: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the tensors in some states, by part."""
    parts = dict.fromkeys(("indices", "values", "error", "momentum", "gram"), 0)
    for state in states:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                part = name if name in parts else "momentum" if name in adamw.STATE else "values"
                parts[part] += value.nbytes
    return {**parts, "total": sum(parts.values())}
