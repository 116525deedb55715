"""Adam on gradients that are projected into a subspace: what GaLore and its relatives have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import torch
from torch.optim.optimizer import ParamsT

from .. import adamw, checks
from ..eager import never_compiled
from ..kernels import pool
from ..layout import State
from ..leaves import Group, ParamRef, dense
from ..shards import is_sharded
from ..threads import one_thread
from . import subspace
from .grouped import Grouped

# By the name of a tensor in the state; all else are moments, AdamW's step counters among them.
_PART = {"basis": "subspace", "factor": "subspace", "values": "window", "gram": "window"}


class ProjectedOptions(TypedDict, total=False):
    """What GaLore and its relatives take beside their own arguments; `ProjectedAdam` says what each of them is."""

    weight_decay: float
    proj_type: str
    beta1: float
    beta2: float
    eps: float
    nonfinite: str


class ProjectedAdam(Grouped):
    """Adam on the projection of every matrix on a few directions, and AdamW on all else.

    For a matrix of more than `rank` rows and columns (n-D parameters flattened behind their first dimension), with its
    gradient `G` and an orthonormal basis `P` of `rank` columns on its shorter side:

        R = P^T G                          (P^T G^T where columns are projected)
        N = Adam(R) = m_hat / (sqrt(v_hat) + eps)
        theta <- (1 - lr weight_decay) theta - lr scale P N

    The base finds `P` as GaLore does: the first singular vectors of the gradient, anew every `update_gap` steps. A
    subclass overrides `subspace_of`, and perhaps `is_due`, `turn`, `direction` and `extra_state`.

    Bytes: `4 rank (short + 2 long)` for a matrix, where AdamW takes `8 short long`. Settings are one value for all
    groups, except for `lr` and `weight_decay`; `preconditioned=False` steps a group as `torch.optim.AdamW` with its
    defaults would. A gradient that is all zero has no subspace: the next one is asked. A parameter without a gradient
    stays as it is, with its state. Arithmetic and state are float32, whatever the parameters are.

    Nothing is random unless a subclass says so, and then it depends on the seed, the parameter's position and the step
    alone: replicas (DDP) stay equal to the bit. Parameters that FSDP2 has sharded are refused, for a shard has another
    subspace than the whole.

    Args:
        params: Parameters or groups, as for any `torch.optim.Optimizer`.
        lr: Learning rate, at least 0.
        rank: Capacity of a subspace, in directions, at least 1.
        scale: Factor of the update of projected matrices, at least 0.
        update_gap: Steps from one subspace to the next, at least 1.
        proj_type: Which side is projected: "std", the shorter one; "reverse_std", the other; "left", rows; "right",
            columns.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: What is added to the root of the second moment, positive.
        weight_decay: Decoupled weight decay, at least 0.
        nonfinite: What to do about a gradient with NaN or infinity, or with a norm above 1e18: "raise" an error, or
            "skip" the step and count it in `skipped_steps`.
        structure: A subclass's further settings that decide the shapes of the state.
        tunable: A subclass's further settings that may change.

    Raises:
        ValueError: A value outside its range.
        TypeError: An argument of another type, or a parameter has a dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import ProjectedAdam
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = ProjectedAdam(layer.parameters(), lr=1e-3, rank=4)
        >>> layer(torch.ones(4, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.memory()["moments"] == 4 * 2 * 4 * 64 + 2 * 4 * 32 + 4  # the bias is AdamW's
        True
    """

    paper: ClassVar[tuple[str, str]] = ("GaLore", "https://arxiv.org/abs/2403.03507")
    rank_name: ClassVar[str] = "rank"  # what the capacity of a subspace is called
    gap_name: ClassVar[str] = "update_gap"  # and the most steps that one is used for
    positive: ClassVar[tuple[str, ...]] = ("eps", "rank", "update_gap")
    fractions: ClassVar[tuple[str, ...]] = ("beta1", "beta2")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        rank: int = 128,
        scale: float = 0.25,
        update_gap: int = 200,
        proj_type: str = "std",
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        nonfinite: str = "raise",
        structure: Mapping[str, Any] | None = None,
        tunable: Mapping[str, Any] | None = None,
    ) -> None:
        checks.check_choice("proj_type", proj_type, subspace.PROJ_TYPES)
        numbers = {"scale": scale, self.gap_name: update_gap, "beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(
            params,
            lr,
            weight_decay,
            nonfinite,
            structure={self.rank_name: rank, "proj_type": proj_type, **(structure or {})},
            tunable=numbers | dict(tunable or {}),
        )

    # What a subclass may change

    def subspace_of(
        self, gradient: torch.Tensor, left: bool, position: int, state: State, group: Group
    ) -> torch.Tensor:
        """A basis for a matrix, from its gradient, which is not all zero.

        Args:
            gradient: `G`, (rows, columns), float32.
            left: Whether rows are projected.
            position: Of the parameter among all of the optimizer.
            state: Of the parameter; `steps` counts its gradients before this one.
            group: Its settings.

        Returns:
            Orthonormal columns, at most `rank`: (rows, number), or (columns, number) where columns are projected.
        """
        return subspace.exact(gradient, group[self.rank_name], left)

    def is_due(self, projected: torch.Tensor, state: State, group: Group) -> bool:
        """Whether a matrix gets a new subspace in this step.

        Args:
            projected: `R` of this step, in the present subspace.
            state: Of the parameter; `since` counts the steps that its subspace has been used for.
            group: Its settings.

        Returns:
            True for a new one.
        """
        return bool(state["since"] >= group[self.gap_name])

    def turn(self, turned: torch.Tensor, state: State) -> None:
        """Carry what is kept in the old subspace into the new one; GaLore leaves the moments as they are.

        Args:
            turned: `P_new^T P_old`, (rank, rank), zero where a subspace does not use its capacity.
            state: Of the parameter, still with the old basis.
        """

    def settled(self, projected: torch.Tensor, state: State) -> None:
        """Note what a new subspace made of the gradient that it was found in.

        Args:
            projected: `R`, (number, long).
            state: Of the parameter.
        """

    def direction(self, projected: torch.Tensor, state: State, group: Group) -> torch.Tensor:
        """What Adam is given in the place of `R`.

        Args:
            projected: `R`, (number, long), float32.
            state: Of the parameter.
            group: Its settings.

        Returns:
            The same shape.
        """
        return projected

    def extra_state(self, short: int, long: int, device: torch.device | str) -> State:
        """What a subclass keeps beside basis and moments.

        Args:
            short: Entries of the side that is projected.
            long: Entries of the other side.
            device: Where; "meta" gives shapes without memory.

        Returns:
            Plain tensors and numbers by name.
        """
        return {}

    # The step

    def memory(self) -> dict[str, int]:
        """Bytes of the state that exists now; `hf_efcp.estimate_memory` tells them beforehand.

        Returns:
            Bytes by part: `subspace`, `moments` (AdamW's among them), `window`, and their `total`.
        """
        return _count(self.state[ref.param] for ref in self._refs() if ref.param in self.state)

    def planned_memory(self) -> dict[str, int]:
        """Bytes of the state once every parameter that requires a gradient has been stepped.

        Returns:
            As `memory`.
        """
        return _count(self._fresh(ref, "meta") for ref in self._refs() if ref.param.requires_grad)

    @never_compiled
    def _step_all(self) -> None:
        """Step everything that has a gradient."""
        active = [ref for ref in self._refs() if ref.param.grad is not None]
        if not active:
            return
        with one_thread():
            self._check(active)
            if self._refuses_nonfinite(active):
                return
            for ref in active:
                if not self.state[ref.param]:
                    self.state[ref.param].update(self._fresh(ref, ref.param.device))
            projected = [ref for ref in active if "basis" in self.state[ref.param]]

            def work(index: int, begin: int, end: int) -> None:
                with torch.no_grad():  # which is of each thread
                    self._advance(projected[index])

            if projected:
                pool.run_torch(work, len(projected), 1, projected[0].param.device)
        for group in self.param_groups:
            self._step_plain(group)

    def _step_plain(self, group: Group) -> None:
        """Step what is not projected in a group as AdamW."""
        params = [p for p in group["params"] if p.grad is not None and "basis" not in self.state[p]]
        own = {"betas": (group["beta1"], group["beta2"]), "eps": group["eps"]} if group["preconditioned"] else {}
        if params:
            states, decay = [self.state[param] for param in params], group["weight_decay"]
            adamw.step(params, states, lr=float(group["lr"]), weight_decay=decay, **own)

    def _advance(self, ref: ParamRef) -> None:
        """Step a matrix."""
        _, group, param = ref
        assert param.grad is not None
        state, (rows, columns) = self.state[param], subspace.matrix_shape(param.shape)
        left = subspace.is_left(rows, columns, group["proj_type"])
        gradient = dense(param.grad).view(rows, columns)
        oriented = gradient if left else gradient.T
        projected = state["basis"][:, : state["rank"]].T @ oriented
        if (not state["rank"] or self.is_due(projected, state, group)) and gradient.any():
            self._refresh(gradient, left, ref, state)
            projected = state["basis"][:, : state["rank"]].T @ oriented
            self.settled(projected, state)
        state["since"] += 1
        state["steps"] += 1
        theta = param.to(torch.float32).mul(1.0 - float(group["lr"]) * group["weight_decay"])
        if state["rank"]:  # else every gradient so far was zero
            moved = self._adam(self.direction(projected, state, group), state, group)
            update = state["basis"][:, : state["rank"]] @ moved
            update = (update if left else update.T).reshape(param.shape)
            theta.sub_(update, alpha=float(group["lr"]) * group["scale"])
        param.copy_(theta)

    def _refresh(self, gradient: torch.Tensor, left: bool, ref: ParamRef, state: State) -> None:
        """Give a matrix a new subspace."""
        found = self.subspace_of(gradient, left, ref.position, state, ref.group)
        basis, number = torch.zeros_like(state["basis"]), found.shape[1]
        basis[:, :number] = found
        if state["rank"]:
            turned = basis.T @ state["basis"]
            self.turn(turned, state)
            state["turned"] = 1.0 - float(turned.square().sum()) / min(number, state["rank"])
        state["basis"].copy_(basis)
        state.update(rank=number, since=0, refreshes=state["refreshes"] + 1)

    def _adam(self, direction: torch.Tensor, state: State, group: Group) -> torch.Tensor:
        """`m_hat / (sqrt(v_hat) + eps)`, (number, long)."""
        m, v = state["exp_avg"][: len(direction)], state["exp_avg_sq"][: len(direction)]
        beta1, beta2 = group["beta1"], group["beta2"]
        m.lerp_(direction, 1.0 - beta1)
        v.mul_(beta2).addcmul_(direction, direction, value=1.0 - beta2)
        root = v.sqrt().div_(math.sqrt(1.0 - beta2 ** state["steps"])).add_(group["eps"])
        moved: torch.Tensor = (m / (1.0 - beta1 ** state["steps"])).div_(root)
        return moved

    def _is_projected(self, ref: ParamRef) -> bool:
        sides = subspace.matrix_shape(ref.param.shape)
        return bool(ref.group["preconditioned"]) and min(sides) > self._structure[self.rank_name]

    def _fresh(self, ref: ParamRef, device: torch.device | str) -> State:
        """The state of a parameter that was never stepped."""
        rows, columns = subspace.matrix_shape(ref.param.shape)
        rank, proj_type = self._structure[self.rank_name], self._structure["proj_type"]
        if not self._is_projected(ref):
            return adamw.allocate(ref.param, device)
        left = subspace.is_left(rows, columns, proj_type)
        short, long = (rows, columns) if left else (columns, rows)
        state: State = {"steps": 0, "since": 0, "rank": 0, "refreshes": 0, "turned": 0.0}
        shapes = {"basis": (short, rank), "exp_avg": (rank, long), "exp_avg_sq": (rank, long)}
        state |= {name: torch.zeros(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
        return state | self.extra_state(short, long, device)

    def _check(self, active: list[ParamRef]) -> None:
        """Refuse what cannot be stepped, before anything has changed."""
        checks.check_one_device(ref.param for ref in active)
        shared = self._shared()
        for group in self.param_groups:
            self._check_group(group, shared)
        for ref in active:
            checks.check_parameter(ref.param, self._name)
            checks.check_gradient(ref.param, self._name)
            if is_sharded(ref.param):
                raise ValueError(
                    f"{type(self).__name__} projects whole matrices, but {self._name(ref.param)} is sharded, and a "
                    "shard has another subspace than the whole: train with DDP (torchrun), or shard with an optimizer "
                    "of hf_efcp that takes shards, such as lowrank_mfac"
                )
            state = self.state.get(ref.param)
            if state and ("basis" in state) != self._is_projected(ref):
                raise ValueError(
                    f"preconditioned of a group was changed after the first step, and {self._name(ref.param)} has "
                    "the other kind of state: set it before the first step"
                )


def _count(states: Any) -> dict[str, int]:
    """Bytes of the tensors in some states, by part."""
    parts = dict.fromkeys(("subspace", "moments", "window"), 0)
    for state in states:
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                parts[_PART.get(name, "moments")] += value.nbytes
    return {**parts, "total": sum(parts.values())}
