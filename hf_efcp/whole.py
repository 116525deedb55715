"""A step of the whole model in a few launches, for backends that can (Triton): the same step as `optimizer.py`'s.

What a launch needs to know of all tensors stands in one table on the device, where it stays from step to step. The Gram
matrices of all units are one tensor on the device, where they are damped and solved as well, so that nothing waits for
the device but the check of the gradients. Python for hundreds of tensors takes longer than the device: what is the
same as in the last step is not looked at again, but for the addresses of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from . import checks, graphs
from .described import ALIGNED, check_state, rows_of, settings_of
from .kernels.triton.changing import Changing, logarithm
from .kernels.triton.cuts import place_scratch
from .kernels.triton.finite import FiniteCheck
from .kernels.triton.launch import upload
from .kernels.triton.model import Model
from .kernels.triton.rows import Row, Settings, Sums
from .layout import Layout
from .leaves import Group, Leaf, ParamRef
from .preconditioners import MFAC, Preconditioner, WindowPosition

Unit = tuple[list[Leaf], dict[str, Any]]  # parameters that share a matrix, and the state that holds it


class Whole:
    """Steps the parameters of an optimizer on a device, many in a launch.

    Args:
        layout: What its state is made of.
        precondition: What is preconditioned.
        device: Where its parameters are.
        capturable: Whether steps may go into a CUDA graph. The host does not see a replay, and so what counts steps is
            on the device alone, until `read_counters`.
    """

    units: list[Unit]

    def __init__(self, layout: Layout, precondition: str, device: torch.device, capturable: bool) -> None:
        self._layout, self._precondition, self.device = layout, precondition, device
        self._capturable = capturable
        self._model, self._finite = Model(device), FiniteCheck(device)
        self._grams = torch.empty(0, dtype=torch.float64, device=device)
        self._homes: list[torch.Tensor] = []  # views of it, one for each unit
        self._key: list[Any] | None = None  # what the table was made of
        self._changing: Changing | None = None
        self._told: torch.Tensor
        self._counted = 0
        self._captured = False
        self._kept_for_graphs: list[Any] = []  # tables whose addresses they have
        self.units = []
        self._leaves: list[Leaf] = []  # those with a gradient
        self._groups: list[Group] = []
        self._sums: Sums | None = None
        self._outside: Sums | None = None
        self._moved: list[tuple[torch.Tensor, torch.Tensor]] = []  # parameters that are not contiguous, and copies
        self._kept: list[torch.Tensor] = []  # copies of gradients that are not

    def check(
        self, refs: Sequence[ParamRef], states: Mapping[Any, Mapping[str, Any]], name: Callable[[torch.Tensor], str]
    ) -> None:
        """Refuse what has addresses that are not the device's, and what a CUDA graph cannot have.

        Args:
            refs: Parameters.
            states: Their states, by parameter.
            name: Tells what to call a parameter, when it comes to that.

        Raises:
            ValueError: A tensor of a state is on another device than its parameter, or begins inside other memory. Of
                a capturable step also: a parameter that had gradients has none, frozen or not.
            RuntimeError: A CUDA graph is captured, without `capturable` or before the first step.
        """
        captured = graphs.is_captured(self.device)
        if captured and not self._capturable:
            raise RuntimeError(
                "a step cannot be captured in a CUDA graph unless the optimizer is given capturable=True: the host "
                "counts steps, and would not see a replay. Or capture forward and backward, and step outside"
            )
        if self.is_placed and self._counted == self._count() and self._signature(refs, states) == self._key:
            if captured:
                self._captured = True
                graphs.check_rates(self._groups, self.device)
            return
        if captured:
            raise RuntimeError(
                "what this step would allocate and compile cannot be captured in a CUDA graph: make a step with the "
                "same parameters and gradients before the capture, on a side stream, as torch's notes on CUDA graphs do"
            )
        self.read_counters()
        self._key = None
        if self._capturable:
            for param, state in states.items():
                if param.grad is None and state.get("gradients"):
                    raise ValueError(
                        f"{name(param)} had gradients and has none now, which capturable=True does not allow: a graph "
                        "would go on with its last one. Use zero_grad(set_to_none=False), or capturable=False"
                    )
        for ref in refs:
            check_state(ref.param, states.get(ref.param, {}), self.device, name)

    @property
    def is_placed(self) -> bool:
        """Whether the table is that of the parameters that `check` has seen."""
        return self._key is not None

    @property
    def is_complete(self) -> bool:
        """Whether no row of a window has to be cleared: every parameter has a gradient, or none had one before."""
        return self._capturable or len(self._leaves) == sum(len(leaves) for leaves, _ in self.units)

    def squares(self, refs: Sequence[ParamRef]) -> dict[int, float]:
        """What stands for `|g|^2` in the check of the gradients: 0, or infinity where an entry is not finite.

        Args:
            refs: Parameters, with or without a gradient.

        Returns:
            By position.
        """
        given = [(ref.position, _plain(ref.param.grad)) for ref in refs if ref.param.grad is not None]
        with self._on_device():
            bad = self._finite.find([gradient for _, gradient in given])
        return {position: math.inf if found else 0.0 for (position, _), found in zip(given, bad, strict=True)}

    def place(self, refs: Sequence[ParamRef], states: Mapping[Any, Mapping[str, Any]], units: list[Unit]) -> None:
        """Make the table of what has a gradient.

        Args:
            refs: What `check` has seen.
            states: Their states, by parameter, allocated since.
            units: Those that are stepped, with all their parameters.
        """
        last, self._changing = self._changing, None  # until all is made
        self.units = units
        present = [[leaf for leaf in leaves if leaf.ref.param.grad is not None] for leaves, _ in units]
        self._leaves = [leaf for leaves in present for leaf in leaves]
        known = [*refs, *(leaf.ref for leaves, _ in units for leaf in leaves)]  # those that are frozen are no refs
        self._groups = list({id(ref.group): ref.group for ref in known}.values())
        numbers = {id(group): number for number, group in enumerate(self._groups)}
        counters = [gram_state["pushed"] for _, gram_state in units]
        self._settings: Settings = settings_of(self._layout, self._precondition, self._leaves)
        self._rows: list[Row] = []
        self._owners: list[int] = []  # of each row, the place of its parameter
        told = []
        for unit, leaves in enumerate(present):
            for leaf in leaves:
                rows = rows_of(self._layout, leaf, unit)
                counter = unit if self._layout.metric is None else len(counters)
                told += [(unit, counter, leaf.ref.position, numbers[id(leaf.ref.group)])] * len(rows)
                self._owners += [len(counters) - len(units)] * len(rows)
                self._rows += rows
                counters.append(leaf.state.get("gradients", 0))
        moved = [own or leaves for own, (leaves, _) in zip(present, units, strict=True)]
        shared = [[int(any(leaf.ref.group is group for leaf in own)) for group in self._groups] for own in moved]
        if self._captured:
            self._kept_for_graphs.append((self._model, self._told, last, self._grams))
            self._model, self._captured = Model(self.device), False
        changing = Changing(counters, shared, self.device, last)
        self._told = upload(np.array(told, np.int64).reshape(-1, 4), self.device)
        if self._settings.rank:
            place_scratch(self._rows, self._settings.rank)
        self._model.begin(self._rows, len(units))
        for row in self._rows:
            row.release()
        self._changing, self._counted = changing, self._count()
        self._key = self._signature(refs, states)

    def read_counters(self) -> None:
        """Bring the numbers in the states up to date, which capturable steps leave to the device."""
        if self._capturable and self._changing is not None:
            found = self._changing.counters.tolist()
            for (_, gram_state), pushed in zip(self.units, found, strict=False):
                gram_state["pushed"] = pushed
            for leaf, gradients in zip(self._leaves, found[len(self.units) :], strict=True):
                leaf.state["gradients"] = gradients

    def solves(self, preconditioner: Preconditioner) -> bool:
        """Whether the coefficients are found in one launch.

        Args:
            preconditioner: With its hyperparameters as they are.

        Returns:
            Whether they are: the matrix is definite by its dampening, and small.

        Raises:
            ValueError: They are not, and a step has to be capturable.
        """
        if self._layout.metric is None or not isinstance(preconditioner, MFAC):
            return False
        capacity = self._layout.num_grads
        rates = [lr for lr in (self._hyperparameters(group)[0] for group in self._groups) if isinstance(lr, float)]
        now = WindowPosition(0, capacity, capacity, capacity, max(rates, default=0.0))
        solved = capacity <= graphs.LARGEST_SOLVED and preconditioner.is_definite(now)
        if self._capturable and not solved:
            raise ValueError(
                "capturable=True needs dampening that rounding does not lose: relative_damp of at least 1e-06 or a "
                f"trust_lr, without damp; got {preconditioner}"
            )
        return solved

    def begin(self, preconditioner: Preconditioner, beta1: float) -> None:
        """Count the step, and bring the table to it.

        Args:
            preconditioner: With its hyperparameters as they are.
            beta1: Decay of the first moment over the window's rows.
        """
        self._moved, self._kept = [], []
        pairs = []
        for leaf in self._leaves:
            gradient, param = leaf.ref.param.grad, leaf.ref.param
            assert gradient is not None  # else it is not placed
            plain, theta = _plain(gradient), _plain(param)
            if plain is not gradient:
                self._kept.append(plain)
            if theta is not param:
                self._moved.append((param, theta))
            pairs.append((plain.data_ptr(), theta.data_ptr()))
        metric, changing = self._layout.metric, self._changing
        assert changing is not None  # as above
        betas = (metric.beta2, metric.beta1) if metric is not None else (0.0, 0.0)
        damp, trust = (getattr(preconditioner, name, 0.0) for name in ("relative_damp", "trust_lr"))
        optimizer = [*(logarithm(beta) for beta in (*betas, beta1)), damp, trust]
        with self._on_device():
            addresses = [address for owner in self._owners for address in pairs[owner]]
            changing.advance(addresses, optimizer, [self._hyperparameters(group) for group in self._groups])
            if self._rows:
                self._model.advance(self._told, changing, self._settings)
        if not self._capturable:
            for _, gram_state in self.units:
                gram_state["pushed"] += 1
            for leaf in self._leaves if metric is not None else ():
                leaf.state["gradients"] += 1
            self._counted = self._count()

    def push(self) -> None:
        """Take the gradients into second moments, windows and errors."""
        settings, model, rows = self._settings, self._model, self._rows
        if not rows:
            return
        with self._on_device():
            if self._layout.metric is not None:
                model.observe(rows, settings)
            (model.push_low_rank if settings.rank else model.push_top_k)(rows, settings)

    def multiply(self) -> None:
        """Multiply the new rows, and the dense vectors that are preconditioned, if any are, with all rows."""
        if self._rows:
            products = self._model.products_low_rank if self._settings.rank else self._model.products_sparse
            with self._on_device():
                self._sums, self._outside = products(self._rows, self._settings)

    def solve(self) -> torch.Tensor | None:
        """Coefficients, where `solves` says so; the new columns go into the Gram matrices.

        Returns:
            `(units, capacity)`, float64, on the device; None where there is nothing to move.
        """
        if self._sums is None or self._changing is None:
            return None
        grams = self._gather([gram_state for _, gram_state in self.units], self.device)
        with self._on_device():
            return self._model.solve(grams, self._sums, self._outside, self._changing, self._settings)

    def summed(self) -> torch.Tensor:
        """The new columns of the Gram matrices, and behind them the products of a dense vector, if there is one.

        Returns:
            `(1 or 2, units, capacity)`, float64, on the device.
        """
        if self._sums is None:
            sizes = 1 + self._settings.outside, len(self.units), self._settings.capacity
            return torch.zeros(sizes, dtype=torch.float64, device=self.device)
        with self._on_device():
            return self._model.add_up(self._sums, self._outside)

    def solves_on(self, preconditioner: Preconditioner) -> torch.device:
        """Where torch's routines are given Gram matrices: many small ones are decomposed on the CPU sooner.

        Args:
            preconditioner: With its hyperparameters as they are.

        Returns:
            The device, for large windows, and for M-FAC in a metric, whose matrices are factored all at once.
        """
        at_once = self._layout.metric is not None and isinstance(preconditioner, MFAC)
        return self.device if at_once or self._layout.num_grads > graphs.LARGEST_SOLVED else torch.device("cpu")

    def solve_by_torch(
        self,
        positions: Sequence[WindowPosition],
        summed: torch.Tensor,
        preconditioner: Preconditioner,
        beta1: float,
    ) -> torch.Tensor:
        """The same as `solve` for every window in a metric, by torch's routines, many matrices at once.

        Args:
            positions: Where the windows stand.
            summed: From `summed`.
            preconditioner: With its hyperparameters as they are.
            beta1: Decay of the first moment over the window's rows.

        Returns:
            `(units, capacity)`, float64, on the device.
        """
        where = self.solves_on(preconditioner)
        columns, *products = summed.to(where)
        grams = self._gather([gram_state for _, gram_state in self.units], where)
        coefficients = torch.zeros_like(columns)
        for now in dict.fromkeys(positions):
            places = [place for place, other in enumerate(positions) if other == now]
            # All at once where they are all: an index would be a copy.
            some: Any = slice(None) if len(places) == len(positions) else upload(np.array(places), where)
            column, rows = columns[some, : now.rows], now.rows
            grams[some, now.newest, :rows] = grams[some, :rows, now.newest] = column
            own = grams[some][:, :rows, :rows]
            if not products:
                weights = now.weights(beta1, where)
                coefficients[some, :rows] = preconditioner.shorten(own, own @ weights, now) + weights
            else:
                coefficients[some, :rows] = preconditioner.shorten(own, products[0][some, :rows], now)
        return coefficients if where == self.device else upload(coefficients.numpy(), self.device)

    def move(self, coefficients: torch.Tensor | None) -> None:
        """`theta <- keep theta - lr D^-1/2 G^T c`.

        Args:
            coefficients: `(units, capacity)`, float64, on the device.
        """
        move = self._model.move_low_rank if self._settings.rank else self._model.move_sparse
        if self._rows and coefficients is not None:
            with self._on_device():
                move(self._rows, self._settings, coefficients)
        for param, copy in self._moved:
            param.copy_(copy)
        self._moved, self._kept, self._sums, self._outside = [], [], None, None

    def _gather(self, states: Sequence[dict[str, Any]], where: torch.device) -> torch.Tensor:
        """The Gram matrices of units as one tensor, `(units, capacity, capacity)`; the states have views of it."""
        held = [state["gram"] for state in states]
        known = len(held) == len(self._homes) and all(a is b for a, b in zip(held, self._homes, strict=True))
        if not (known and self._grams.device == where):
            self._grams = torch.stack([gram.to(where) for gram in held])
            self._homes = list(self._grams)
            for state, home in zip(states, self._homes, strict=True):
                state["gram"] = home
        return self._grams

    def _count(self) -> int:
        """What the host has counted; another backend's steps, or a state that was set back, are seen by it."""
        if self._capturable:
            return 0
        pushed: int = sum(gram_state["pushed"] for _, gram_state in self.units)
        gradients: int = sum(leaf.state.get("gradients", 0) for leaf in self._leaves)
        return pushed + gradients

    def _signature(self, refs: Sequence[ParamRef], states: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
        """All that the table is made of: it is as it was if this is."""
        found: list[Any] = []
        for ref in refs:
            param, gradient = ref.param, ref.param.grad
            found += (ref.position, id(param), id(ref.group), param.dtype, None if gradient is None else gradient.dtype)
            for key, value in states.get(param, {}).items():
                if isinstance(value, torch.Tensor) and key not in ("gram", "step"):
                    found.append(value.data_ptr())
        for group in {id(ref.group): ref.group for ref in refs}.values():
            coupled = bool(group["weight_decay"]) and not group["decoupled_weight_decay"]
            found += (id(group), coupled, bool(group[checks.HEAVY_BALL]))
        return found

    def _hyperparameters(self, group: Group) -> tuple[float | torch.Tensor, float, float, float]:
        """Learning rate, weight decay, whether it is decoupled, and momentum."""
        lr = group["lr"]
        if not (self._capturable and isinstance(lr, torch.Tensor) and lr.device == self.device):
            lr = float(lr)
        decoupled = float(group["decoupled_weight_decay"])
        return lr, float(group["weight_decay"]), decoupled, float(group[checks.HEAVY_BALL])

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as kernels take it: contiguous, from a multiple of 16 bytes on; a copy if it is not."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0:
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)
