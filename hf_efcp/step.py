"""One step of everything that is preconditioned: from gradients to parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.profiler import record_function

from . import shards
from .checks import HEAVY_BALL
from .error_feedback import push
from .kernels import Kernels, pool, widest
from .layout import Layout
from .leaves import Leaf
from .preconditioners import Combination, Preconditioner, WindowPosition
from .update import Move, move_all
from .vectors import Vectors

if TYPE_CHECKING:
    from .whole import Whole

# The parts of a step, and what torch.profiler calls them.
SPANS = {part: f"hf_efcp.{part}" for part in ("compress", "products", "solve", "update")}
_FLOAT32_MAX = torch.finfo(torch.float32).max
_CPU = torch.device("cpu")
_NOTHING = torch.empty(0, device="cpu")
_FITS = 2.0**64  # coefficients below this, times rows of whitened entries, are within float32


class Unit(NamedTuple):
    """Parameters that share a matrix, and what a step finds out about them.

    `gram_state` is what they have in common; `leaves` have a gradient; `column` is that of the Gram matrix, and
    `products` are `G x` with `|x|^2` behind them, both of this process's part of the parameters until they are
    collected.
    """

    gram_state: dict[str, Any]
    leaves: list[Leaf]
    now: WindowPosition
    column: torch.Tensor
    products: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One step, of which `run` is the whole.

    Args:
        layout: What the state of the parameters is made of.
        preconditioner: With the hyperparameters of this step.
        precondition: What it is applied to.
        beta1: Decay of the first moment over the window's rows, in a metric.
        kernels: The backend.
        vectors: The gradients in the metric.
        processes: Among which the parameters are sharded; None for one process.
        device: Where the parameters are.
        name: What to call a parameter.
    """

    layout: Layout
    preconditioner: Preconditioner
    precondition: str
    beta1: float
    kernels: Kernels
    vectors: Vectors
    processes: torch.distributed.ProcessGroup | None
    device: torch.device
    name: Callable[[torch.Tensor], str]

    def run(self, units: list[Unit]) -> None:
        """Push the gradients, find the coefficients, move the parameters.

        Args:
            units: From `unit`.

        Raises:
            ValueError: An update would overflow.
        """
        with record_function(SPANS["compress"]):
            self._push(units)
        with record_function(SPANS["products"]):
            units = self._collect(self._with_products([_without_products(unit, self.device) for unit in units]))
        with record_function(SPANS["solve"]):
            plans = self._plan(units)
        with record_function(SPANS["update"]):
            moves = [self._move(leaf, plan) for unit, plan in zip(units, plans, strict=True) for leaf in unit.leaves]
            move_all(moves, self.kernels)

    def unit(self, leaves: list[Leaf], gram_state: dict[str, Any]) -> Unit:
        """Where a window stands in this step; the new row of what has no gradient is made zero.

        Args:
            leaves: The parameters that share it.
            gram_state: What they have in common.

        Returns:
            The unit, with neither column nor products yet.
        """
        capacity, steps = self.layout.num_grads, gram_state["pushed"] + 1
        present = [leaf for leaf in leaves if leaf.ref.param.grad is not None]
        # A rate that nothing is stepped with, that of a frozen head, is not to shorten the steps of the others.
        lr = max(float(leaf.ref.group["lr"]) for leaf in present or leaves)
        now = WindowPosition((steps - 1) % capacity, min(steps, capacity), capacity, steps, lr)
        for leaf in leaves:
            if leaf.ref.param.grad is None:
                self.layout.window.clear(leaf.state, leaf.shape, now.newest)
        return Unit(gram_state, present, now, _NOTHING, _NOTHING)

    def run_whole(self, whole: Whole) -> None:
        """The same in a few launches.

        Args:
            whole: What steps the whole model.
        """
        if not whole.units:
            return
        in_one_launch = whole.solves(self.preconditioner)
        units = [] if in_one_launch and whole.is_complete else [self.unit(*unit) for unit in whole.units]
        with record_function(SPANS["compress"]):
            whole.begin(self.preconditioner, self.beta1)
            whole.push()
        with record_function(SPANS["products"]):
            whole.multiply()
        with record_function(SPANS["solve"]):
            coefficients = whole.solve() if in_one_launch else self._solved(units, whole)
        with record_function(SPANS["update"]):
            whole.move(coefficients)

    def _solved(self, units: list[Unit], whole: Whole) -> torch.Tensor:
        """The coefficients where they are not found in one launch, `(units, capacity)`, on the device."""
        summed = whole.summed()
        if self.layout.metric is not None:
            positions = [unit.now for unit in units]
            return whole.solve_by_torch(positions, summed, self.preconditioner, self.beta1)
        own = [  # the paper's rule, which has kernels for rows alone
            _without_products(unit, self.device)._replace(column=column[: unit.now.rows])
            for unit, column in zip(units, summed[0], strict=True)
        ]
        own = self._collect(own, whole.solves_on(self.preconditioner))
        coefficients = torch.zeros_like(summed[0])
        for place, plan in enumerate(self._plan(own)):
            coefficients[place, : own[place].now.rows] = plan.coefficients
        return coefficients

    def _push(self, units: list[Unit]) -> None:
        """A new row for each window, compressed with error feedback."""
        rows = [(leaf, unit.now) for unit in units for leaf in unit.leaves]
        self.vectors.begin([leaf for leaf, _ in rows])
        push(rows, self.layout, self.kernels, self.vectors)
        for leaf, now in rows:
            self.preconditioner.observe(now, self.layout.window, leaf.state, leaf.shape, self.kernels)
        for unit in units:
            unit.gram_state["pushed"] = unit.now.steps

    def _with_products(self, units: list[Unit]) -> list[Unit]:
        """The products that the matrices need; columns of windows that stand at the same place are taken together."""
        if self.preconditioner.uses_gram:
            columns: dict[int, torch.Tensor] = {}
            for now in dict.fromkeys(unit.now for unit in units):
                places = [place for place, unit in enumerate(units) if unit.now == now]
                held = [(leaf.state, leaf.shape) for place in places for leaf in units[place].leaves]
                found = self.layout.window.dots(held, now.newest, now.rows, self.kernels)
                own = torch.split(found, [len(units[place].leaves) for place in places])
                columns |= {place: some.sum(dim=0) for place, some in zip(places, own, strict=True)}
            units = [unit._replace(column=columns[place]) for place, unit in enumerate(units)]
        if self.precondition != "row":
            units = [unit._replace(products=self._products(unit)) for unit in units]
        return units

    def _products(self, unit: Unit) -> torch.Tensor:
        """`G x` of the dense vector, and without a metric `|x|^2` behind it, `(rows + 1,)`. Threads share the spans."""
        window, rows, tasks = self.layout.window, unit.now.rows, []
        for leaf in unit.leaves:
            vector = self.vectors.preconditioned(leaf)
            tasks += [(leaf, span, vector) for span in window.spans(leaf.shape, self.device)]
        parts = torch.zeros(len(tasks), rows + 1, dtype=widest(self.device), device=self.device)

        def work(index: int, begin: int, end: int) -> None:
            leaf, span, vector = tasks[index]
            x = vector(span)
            parts[index, :-1] = window.project(leaf.state, leaf.shape, span, x, rows, self.kernels)
            if self.layout.metric is None:  # else no length is needed
                parts[index, -1] = torch.linalg.vector_norm(x, dtype=parts.dtype).square()

        if tasks:
            pool.run_torch(work, len(tasks), 1, self.device)
        return parts.sum(dim=0)

    def _collect(self, units: list[Unit], where: torch.device = _CPU) -> list[Unit]:
        """Columns and products of all processes, in one message, on a device; columns go into the Gram matrices there.

        Args:
            units: With those of this process.
            where: The device.

        Returns:
            The units.
        """
        if not units:
            return units
        own = [tensor for unit in units for tensor in (unit.column, unit.products)]
        wide = widest(self.device)
        own = [tensor.to(self.device, wide) for tensor in own]
        total = shards.all_reduce(torch.cat(own), self.processes, self.device, where)
        summed = torch.split(total, [len(tensor) for tensor in own])
        found = []
        for unit, column, products in zip(units, summed[::2], summed[1::2], strict=True):
            if "gram" in unit.gram_state:
                unit.gram_state["gram"] = unit.gram_state["gram"].to(where)
                unit.gram_state["gram"][unit.now.newest, : unit.now.rows] = column
                unit.gram_state["gram"][: unit.now.rows, unit.now.newest] = column
            found.append(unit._replace(column=column, products=products))
        return found

    def _plan(self, units: list[Unit]) -> list[Any]:
        """The update of each unit, from its Gram matrix and products alone, with its coefficients on the device."""
        if self.layout.metric is not None:
            return self._shorten(units)
        plans = []
        for gram_state, leaves, now, _, products in units:
            if not self.preconditioner.uses_gram:
                plans.append(_placed(self.preconditioner.plan(None, now), self.device))
                continue
            gram = gram_state["gram"][: now.rows, : now.rows]
            if self.precondition == "row":
                plan = self.preconditioner.plan(gram, now)
            else:
                plan = self.preconditioner.plan_outside(gram, products[:-1], now)
            self._check_length(leaves, plan.length(gram, products))
            plans.append(_placed(plan, self.device))
        return plans

    def _shorten(self, units: list[Unit]) -> list[Combination]:
        """The same in the metric; units whose windows stand at the same place are solved as one batch."""
        row = self.precondition == "row"
        found: dict[int, torch.Tensor] = {}
        for now in dict.fromkeys(unit.now for unit in units):
            places = [place for place, unit in enumerate(units) if unit.now == now]
            grams = torch.stack([units[place].gram_state["gram"][: now.rows, : now.rows] for place in places])
            if row:
                weights = now.weights(self.beta1)
                c = self.preconditioner.shorten(grams, grams @ weights, now) + weights
            else:
                products = torch.stack([units[place].products[:-1] for place in places])
                c = self.preconditioner.shorten(grams, products, now)
            # float32 is enough, but coefficients of rows that are tiny beside `x` may be beyond it; products are not.
            narrow = (c.abs().amax(dim=1) < _FITS).tolist()
            placed = c.to(self.device, widest(self.device))
            found |= {
                place: own.to(torch.float32) if fits else own
                for place, own, fits in zip(places, placed, narrow, strict=True)
            }
        return [Combination(found[place], 0.0 if row else 1.0) for place in range(len(units))]

    def _move(self, leaf: Leaf, plan: Any) -> Move:
        """What makes the update of a parameter, span by span."""
        window, state, shape = self.layout.window, leaf.state, leaf.shape
        vector = None if self.precondition == "row" else self.vectors.preconditioned(leaf)

        def update(span: slice) -> torch.Tensor:
            base = None if vector is None else vector(span)
            u = self.preconditioner.update(plan, window, state, shape, span, self.kernels, base)
            return self.vectors.out_of_metric(leaf, span, u)

        return Move(leaf, window.spans(shape, self.device), update)

    def _check_length(self, leaves: list[Leaf], length: float) -> None:
        """Refuse an update that may not fit the parameters: without dampening it is as long as a row is short."""
        for group, param in ((leaf.ref.group, leaf.ref.param) for leaf in leaves):
            velocity = length / (1.0 - group[HEAVY_BALL])
            largest = torch.finfo(param.dtype).max
            if not (velocity <= _FLOAT32_MAX and float(group["lr"]) * velocity <= largest):
                raise ValueError(
                    f"the update has length {length:.3g}, which with lr {float(group['lr']):g} may be beyond "
                    f"{param.dtype} ({largest:.3g}) in {self.name(param)}; no parameter was moved, and the gradient "
                    "is in the window. Use a lower learning rate or momentum, or a larger damp or eps"
                )


def _without_products(unit: Unit, device: torch.device) -> Unit:
    """A unit with zeros for its column and its products, on a device: from elsewhere each would be waited for."""
    sizes = unit.now.rows, unit.now.rows + 1
    column, products = (torch.zeros(size, dtype=widest(device), device=device) for size in sizes)
    return unit._replace(column=column, products=products)


def _placed(plan: Any, device: torch.device) -> Any:
    """A plan with its tensors on a device."""
    if isinstance(plan, torch.Tensor):
        return plan.to(device, widest(device))
    if isinstance(plan, tuple):
        return tuple(_placed(part, device) for part in plan)
    return replace(plan, coefficients=_placed(plan.coefficients, device))
