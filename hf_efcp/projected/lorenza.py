"""LORENZA: a sharpness-aware step inside a randomized subspace (Refael et al., arXiv 2502.19571)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Unpack, overload

import torch
from torch.optim.optimizer import ParamsT

from .. import shards
from ..kernels import widest
from ..layout import State
from ..leaves import Group, ParamRef
from . import subspace
from .base import ProjectedAdam, ProjectedOptions


class _Held(NamedTuple):
    """A matrix that is moved for a while, with what it was."""

    ref: ParamRef
    theta: torch.Tensor
    weights: torch.Tensor  # `w` of the ascent direction `Q diag(w) R`, (number,)


class LORENZA(ProjectedAdam):
    """LORENZA (arXiv 2502.19571): GaLore with sketched subspaces, and the gradient taken a little uphill.

        every update_gap steps:   Y = G Omega,  Q from qr(Y) and an SVD,  R = Q^T G
        P_j = Q diag(u_j) R,   u_j ~ N(0, I),   j = 1 .. probes
        d_j = (f(theta + mu P_j) - f(theta - mu P_j)) / (2 mu)        forwards alone
        s = mean_j d_j P_j,   g = grad f(theta + rho s / |s|)         the only backward
        theta <- theta - lr scale Q Adam(Q^T g)                       from theta, restored to the bit

    `|s|` is over all projected matrices, and what is not projected is not moved uphill. The moments stay as they are
    when the subspace changes, and so no direction of the new basis points against its predecessor. The first step has
    no subspace yet, and takes its gradient at `theta`.

    It evaluates the loss by itself, and so needs `step(closure)`, with a closure that calls `backward` only if
    gradients are enabled:

        def closure():
            optimizer.zero_grad()
            loss = model(**batch).loss
            if loss.requires_grad:
                loss.backward()
            return loss

    `EFCPTrainer` needs none. Where a step has several parts (accumulation, clipping, GradScaler), use `ascent`. Every
    evaluation draws the same dropout masks, and all ranks of `torch.distributed` move alike: they share the `d_j`.
    Batch norms would see the moved weights: keep their statistics frozen. The paper does not tell `update_gap`,
    `probes`, `mu` and `rho`; see docs/relatives.md for how they were chosen. While it evaluates there is a copy of the
    projected parameters. Bytes of state: `4 rank (short + 3 long)` for a matrix.

    Args:
        params: Parameters or groups.
        lr: Learning rate; projected matrices move by `lr scale`.
        rank: Directions of a subspace, at least 1.
        scale: Factor of the update of projected matrices, at least 0.
        update_gap: Steps from one subspace to the next, at least 1.
        rho: How far uphill the gradient is taken, in the units of the parameters, at least 0; 0 needs no closure.
        mu: Size of the finite difference, in the units of `1 / R`, positive. Its steps must not be lost in the rounding
            of the parameters: bfloat16 ones want a larger one.
        probes: Random directions of a step, at least 1: two evaluations each.
        seed: Of sketches and directions, at least 0.
        **options: See `ProjectedOptions`.

    Raises:
        ValueError: A value outside its range.
        TypeError: `rank`, `update_gap`, `probes` or `seed` is not an int, or a parameter has a dtype that is not
            supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import LORENZA
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = LORENZA(layer.parameters(), lr=1e-2, rank=4, scale=1.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = layer(torch.ones(4, 64)).square().sum()
        ...     if loss.requires_grad:
        ...         loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(10)]
        >>> losses[-1] < 0.5 * losses[0]
        True
    """

    paper: ClassVar[tuple[str, str]] = ("LORENZA", "https://arxiv.org/abs/2502.19571")
    positive: ClassVar[tuple[str, ...]] = ("eps", "rank", "update_gap", "mu", "probes")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        rank: int = 128,
        scale: float = 0.25,
        update_gap: int = 200,
        rho: float = 0.05,
        mu: float = 1e-2,
        probes: int = 1,
        seed: int = 0,
        **options: Unpack[ProjectedOptions],
    ) -> None:
        self._ascended = False  # whether the gradients that are there were taken in `ascent`
        tunable = {"rho": rho, "mu": mu, "probes": probes, "seed": seed}
        super().__init__(params, lr, rank=rank, scale=scale, update_gap=update_gap, tunable=tunable, **options)

    def subspace_of(
        self, gradient: torch.Tensor, left: bool, position: int, state: State, group: Group
    ) -> torch.Tensor:
        """The sketched basis, its signs those of the old one, for the moments stay as they are; see the base class."""
        source = subspace.generator(group["seed"], position, state["steps"])
        basis, _ = subspace.sketched(gradient if left else gradient.T, group["rank"], source)
        against = (basis * state["basis"]).sum(dim=0) < 0.0
        return basis.mul_(torch.where(against, -1.0, 1.0))

    def settled(self, projected: torch.Tensor, state: State) -> None:
        """Keep `R = Q^T G`, from which directions are made; see the base class."""
        state["factor"].copy_(projected)

    def extra_state(self, short: int, long: int, device: torch.device | str) -> dict[str, Any]:
        """`R`; see the base class."""
        rank = self._structure["rank"]
        return {"factor": torch.zeros(rank, long, dtype=torch.float32, device=device)}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: two evaluations for each probe, one with gradients, and the update.

        Args:
            closure: Evaluates the model and returns the loss; calls `backward` if gradients are enabled. None steps
                with the gradients that were taken in `ascent`.

        Returns:
            The loss at `theta + rho s / |s|`, or None without a closure.

        Raises:
            ValueError: There is neither a closure nor a gradient from `ascent`; or as in `ProjectedAdam.step`.
        """
        if closure is not None:
            with self.ascent(closure), torch.enable_grad():
                loss = closure()
            self._ascended = False
            self._step_all()
            return loss
        # Without a learning rate nothing moves: so torch.distributed.checkpoint has the state made.
        if not (self._ascended or self._rho() == 0.0 or all(float(g["lr"]) == 0.0 for g in self.param_groups)):
            raise ValueError(
                "LORENZA evaluates the loss twice before the backward pass, and so needs step(closure), or gradients "
                "taken in optimizer.ascent(evaluate). With Hugging Face, use EFCPTrainer in the place of Trainer, or "
                "rho=0, which leaves the sharpness out"
            )
        self._ascended = False
        self._step_all()
        return None

    @contextmanager
    def ascent(self, evaluate: Callable[[], Any]) -> Iterator[None]:
        """Move the projected parameters to `theta + rho s / |s|` for as long as the context lasts.

        For loops in which the backward pass has several parts:

            with optimizer.ascent(lambda: sum(loss_of(batch) for batch in batches)):
                for batch in batches:
                    loss_of(batch).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        Args:
            evaluate: Returns the loss of the whole step. Called without gradients, twice for each probe.

        Yields:
            Nothing. Afterwards the parameters are what they were, to the bit.
        """
        held: list[_Held] = []
        try:
            self._climb(held, evaluate)
            yield
        finally:
            self._restore(held)
        self._ascended = True

    @torch.no_grad()
    def _climb(self, held: list[_Held], evaluate: Callable[[], Any]) -> None:
        """Find the ascent direction, and move there."""
        rho = self._rho()
        refs = [m for m in self._refs() if m.param.requires_grad and self.state.get(m.param, {}).get("rank")]
        if not (rho and refs):
            return
        device, group = refs[0].param.device, self.param_groups[0]
        for ref in refs:
            number = self.state[ref.param]["rank"]
            held.append(_Held(ref, ref.param.clone(), torch.zeros(number, device=device)))
        for probe in range(group["probes"]):
            draws = [self._draw(one, probe) for one in held]
            values = []
            for sign in (1.0, -1.0):
                self._move(held, draws, sign * group["mu"])
                values.append(self._evaluate(evaluate, device))
            slope = self._over_ranks(values[0] - values[1], device) / (2.0 * group["mu"] * group["probes"])
            for one, draw in zip(held, draws, strict=True):
                one.weights.add_(draw, alpha=slope)
        weights = [one.weights for one in held]
        parts = [one.weights[:, None] * self._factor(one) for one in held]
        length = math.sqrt(sum(float(torch.linalg.vector_norm(part, dtype=widest(device))) ** 2 for part in parts))
        if math.isfinite(length) and length > 0.0:
            self._move(held, weights, rho / length)
        else:  # a loss that is flat, or no number: of that the gradient will tell
            self._restore(held)

    def _draw(self, one: _Held, probe: int) -> torch.Tensor:
        """`u_j` of a matrix."""
        state = self.state[one.ref.param]
        source = subspace.generator(one.ref.group["seed"], one.ref.position, state["steps"], 1 + probe)
        return torch.randn(state["rank"], generator=source, device="cpu").to(one.theta.device)

    def _factor(self, one: _Held) -> torch.Tensor:
        state = self.state[one.ref.param]
        factor: torch.Tensor = state["factor"][: state["rank"]]
        return factor

    def _move(self, held: list[_Held], weights: list[torch.Tensor], distance: float) -> None:
        """`theta + distance Q diag(w) R`, each from where it was."""
        for one, w in zip(held, weights, strict=True):
            param, group = one.ref.param, one.ref.group
            direction = self.state[param]["basis"][:, : len(w)] @ (w[:, None] * self._factor(one))
            if not subspace.is_left(*subspace.matrix_shape(param.shape), group["proj_type"]):
                direction = direction.T
            param.copy_(one.theta.to(torch.float32).add(direction.reshape(param.shape), alpha=distance))

    def _evaluate(self, evaluate: Callable[[], Any], device: torch.device) -> float:
        """The loss, with the random numbers that the next evaluation will have as well."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                return float(evaluate())
            except RuntimeError as error:
                error.add_note("raised while LORENZA evaluated the loss without gradients: a closure must call "
                               "loss.backward() only if loss.requires_grad")  # fmt: skip
                raise

    def _over_ranks(self, slope: float, device: torch.device) -> float:
        """The sum over all processes, so that all move alike; its factor is lost in `s / |s|`."""
        values = torch.tensor([slope], dtype=widest(device))
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return float(shards.all_reduce(values, torch.distributed.group.WORLD if several else None, device))

    @torch.no_grad()
    def _restore(self, held: list[_Held]) -> None:
        for one in held:
            one.ref.param.copy_(one.theta)

    def _rho(self) -> float:
        return float(self.param_groups[0]["rho"]) if self.param_groups else 0.0
