"""From a plan to the parameters: how long each update is, and how it gets there.

There are two ways. An update that is a combination of a sparse window's rows and nothing else is made, measured and
applied by one kernel, all tensors at once. Every other is made slab by slab, tensor by tensor: also those of joint
vectors, of shards, and of large tensors whose length is not known or whose rows and blocks do not fit together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from . import shards, step_size
from .blocks import sharing
from .kernels import Kernels, Move
from .layout import Layout
from .preconditioners import Combination, Moment, Preconditioner
from .shards import local
from .sites import Member, Site, apply_updates, flat, gradient_of, kept, split_updates
from .step_size import Sized, Stretch, Updates
from .windows import Row, Slab

_WHOLE = 1 << 20  # entries of a tensor that is moved in one, by one thread
_RANGE = 1 << 18  # the same of ranges of larger ones
_COPIED = 4 << 20  # entries of float32 copies of parameters that exist at a time


class Planned(NamedTuple):
    """The update of the parameters that share a preconditioner.

    `sites` have a gradient; `length` is that of the whole update, 0 where nothing bounds it; `rows` and `updates` are
    `|row|^2` and `|u|^2` of sites, by the position of their first member, where they are known.
    """

    sites: list[Site]
    moment: Moment
    plan: Any
    length: float
    rows: dict[int, float]
    updates: dict[int, float]

    def scaled(self) -> tuple[Planned, float]:
        """The same with an update of a length near 1, and the factor that was taken out.

        What is measured and made longer or shorter has to fit float32 first. A power of two changes no bits.

        Returns:
            The plan and the factor; as it is where no tensor takes its length from elsewhere.
        """
        members = (member for site in self.sites for member in site.members)
        if not self.length or all(member.group["update_scale"] == "none" for member in members):
            return self, 1.0
        unit = 2.0 ** math.floor(math.log2(self.length))
        updates = {position: square / (unit * unit) for position, square in self.updates.items()}
        return self._replace(plan=self.plan.times(1.0 / unit), updates=updates), unit


@dataclass(frozen=True)
class Mover:
    """Moves parameters.

    Args:
        layout: What their state is made of.
        preconditioner: With this step's hyperparameters.
        outside: Whether the dense gradient is preconditioned, and not the row.
        states: Of all parameters.
        kernels: The backend.
        processes: Over which parameters are sharded.
    """

    layout: Layout
    preconditioner: Preconditioner
    outside: bool
    states: Mapping[torch.Tensor, dict[str, Any]]
    kernels: Kernels
    processes: torch.distributed.ProcessGroup | None

    def move(self, planned: Planned, gradients: dict[int, float]) -> None:
        """Move the parameters that share a plan.

        Args:
            planned: The plan, and what is known of the updates.
            gradients: `|g|^2`, by position.
        """
        planned, unit = planned.scaled()
        apart = self.outside or self.processes is not None
        combination = None if apart else self.preconditioner.combination(planned.plan)
        waiting: list[Move] = []
        copies: list[tuple[Member, torch.Tensor]] = []
        copied = 0
        for site in planned.sites:
            parts = None if combination is None else self._parts(site, planned)
            if parts is None:
                self._move_slabs(site, planned, unit, gradients)
                continue
            member = site.members[0]
            theta = flat(member.param)
            stretch = self._stretch(site, planned, unit, gradients)
            waiting += _moves(parts, theta, member.group, site.state, stretch)
            if theta.data_ptr() != member.param.data_ptr():
                copies.append((member, theta))
                copied += len(theta)
            del theta  # before the next copy is made
            if copied > _COPIED:
                self._move_at_once(waiting, copies, combination)
                waiting, copies, copied = [], [], 0
        self._move_at_once(waiting, copies, combination)

    def _parts(self, site: Site, planned: Planned) -> Row | None:
        """The window of what one kernel can move; None for all else."""
        parts = None if self.layout.compressor.joint else self.layout.window.parts(site.state, site.shape)
        if not parts or site.shape.numel() <= _WHOLE:
            return parts or None
        scaled = site.members[0].group["update_scale"] == "tensor"
        if scaled and site.members[0].position not in planned.updates:
            return None
        columns = step_size.row_length(site.shape) if scaled and len(site.shape) > 1 else 1
        return parts if _step(parts, columns) <= _WHOLE else None

    def _move_at_once(
        self, moves: list[Move], copies: list[tuple[Member, torch.Tensor]], combination: Combination | None
    ) -> None:
        """Move, and write back what was moved as a copy."""
        if moves and combination is not None:
            self.kernels.move(moves, combination.coefficients)
        for member, theta in copies:
            member.param.copy_(theta.view(member.param.shape))

    def _stretch(self, site: Site, planned: Planned, unit: float, gradients: dict[int, float]) -> Stretch:
        """How an update, given as a multiple of `unit`, gets its length."""
        member = site.members[0]
        if member.group["update_scale"] == "none":
            return Stretch(site.shape.numel(), unit, 0.0, math.inf)
        x = self._squares(site, planned)[member.position]
        rms = self._rms(member, self._gradient(member, gradients), x)
        return step_size.stretch(site.shape, rms, planned.updates.get(member.position))

    def _move_slabs(self, site: Site, planned: Planned, unit: float, gradients: dict[int, float]) -> None:
        """Make, measure and apply updates slab by slab."""
        base = gradient_of(site) if self.outside else None
        updates = partial(
            self.preconditioner.updates, planned.plan, self.layout.window, site.state, site.shape, self.kernels, base
        )
        squares = self._squares(site, planned)
        known = planned.updates.get(site.members[0].position)
        for member, part in split_updates(site, updates):
            gradient = self._gradient(member, gradients)
            update = self._sized(member, part, unit, gradient, squares.get(member.position, gradient), known)
            state = self.states[member.param] if self.layout.compressor.joint else site.state
            apply_updates(member, state, update, self.kernels)

    def _gradient(self, member: Member, gradients: dict[int, float]) -> float:
        """`|g|^2`, with L2 regularisation where it is not decoupled."""
        if member.group["weight_decay"] and not member.group["decoupled_weight_decay"]:
            gradient = gradient_of(Site({}, local(member.param).shape, [member]))
            return self.kernels.squares([gradient.view(-1)])[0]
        return gradients[member.position]

    def _squares(self, site: Site, planned: Planned) -> dict[int, float]:
        """`|x|^2` of what has a length of its own, by position; nothing where the gradient is preconditioned."""
        scaled = any(member.group["update_scale"] == "tensor" for member in site.members)
        if not scaled or self.outside:
            return {}
        state, shape, moment, position = site.state, site.shape, planned.moment, site.members[0].position
        weights = self.preconditioner.momentum(moment)
        if weights is None and position in planned.rows and not self.layout.compressor.joint:
            return {position: planned.rows[position]}
        if weights is None:
            weights = torch.zeros(moment.rows, dtype=torch.float64, device="cpu")
            weights[moment.newest] = 1.0

        def parts(start: int) -> Iterable[Slab]:
            return self.layout.window.combine(state, shape, weights, self.kernels, start=start)

        return {
            member.position: sum(self.kernels.squares([slab])[0] for _, slab in part(0))
            for member, part in split_updates(site, parts)
        }

    def _rms(self, member: Member, gradient: float, x: float) -> float:
        """Remember a gradient's length, and tell the root mean square of its update."""
        return step_size.wanted(self.states[member.param]["squares"], gradient, x, member.group["update_rms"])

    def _sized(
        self, member: Member, updates: Updates, unit: float, gradient: float, x: float, known: float | None
    ) -> Sized:
        """An update, given as a multiple of `unit`, at its length.

        Args:
            member: The parameter.
            updates: The update.
            unit: Its unit.
            gradient: `|g|^2`.
            x: `|x|^2` of what is preconditioned.
            known: `|u|^2`, where the Gram matrix tells it.

        Returns:
            The update and the factors of its rows.
        """
        theta = local(member.param)
        if member.group["update_scale"] == "none":
            return step_size.unsized(updates(0), theta.shape, theta.device, unit)
        if known is not None:
            rms = self._rms(member, gradient, x)
            return step_size.in_one_pass(updates, theta.shape, theta.device, self.kernels, rms=rms, square=known)
        update = step_size.measure(updates, theta.shape, theta.device, self.kernels)
        square = update.square
        if self.processes is not None:
            sums = torch.tensor([square, gradient, x], dtype=torch.float64, device="cpu")
            square, gradient, x = shards.all_reduce(sums, self.processes, theta.device).tolist()
        return update.sized(self._rms(member, gradient, x), square, member.param.numel())


def _moves(
    parts: Row, theta: torch.Tensor, group: dict[str, Any], state: dict[str, Any], stretch: Stretch
) -> list[Move]:
    """The move of a parameter, in ranges if it is large."""
    columns, factor, length, limit = stretch
    velocity = state["momentum"].view(-1) if group["momentum"] else None
    first, step = parts[0].piece, _step(parts, 1 if math.isinf(limit) else columns)
    blocks = first.blocks if len(theta) <= _WHOLE else max(1, _RANGE // step) * step // first.length
    moves = []
    for begin in range(0, first.blocks, blocks):
        end = min(begin + blocks, first.blocks)
        start, stop = begin * first.length, end * first.length
        some = [parts[0].blocks(begin, end)]
        if end == first.blocks and len(parts) > 1:  # and the shorter block behind them
            some.append(parts[1].blocks(0, 1, stop - start))
            stop = len(theta)
        moves.append(
            Move(
                some,
                theta[start:stop],
                None if velocity is None else velocity[start:stop],
                stop - start if math.isinf(limit) else columns,
                factor,
                length,
                limit,
                lr=float(group["lr"]),
                keep=kept(group),
                momentum=group["momentum"],
            )
        )
    return moves


def _step(parts: Row, columns: int) -> int:
    """The least entries that are whole rows and whole blocks, with all that share their scales."""
    length = parts[0].piece.length
    return math.lcm(columns, length * sharing(length))
