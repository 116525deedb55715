"""What EFCP's optimizers are measured against: torch's own, other libraries', and the algorithm as published."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, overload

import torch
from peers import PEERS
from torch.profiler import record_function
from transformers.optimization import Adafactor

from hf_efcp.step import SPANS

PUBLISHED_ROWS = 1024


class AsPublished(torch.optim.Optimizer):
    """Sparse M-FAC as the paper's pseudocode has it (EFCP, arXiv 2306.06098, algorithm 1), in plain torch.

    All gradients are one vector of `d` entries. Top-k is over the whole of it; a row of the window is `k` int64 indices
    and `k` float32 values; inner products gather from the newest row, and the update adds the rows up, one after the
    other. The `m x m` system is solved in float64. All parameters must be float32 and have a gradient.

    Args:
        params: Parameters.
        lr: Learning rate.
        num_grads: Capacity `m` of the window.
        density: Fraction that is kept of all entries: `k = ceil(density * d)`.
        damp: Dampening.
    """

    def __init__(
        self, params: Any, lr: float, *, num_grads: int = PUBLISHED_ROWS, density: float = 0.01, damp: float = 1e-5
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.num_grads, self.damp = num_grads, damp
        self.numel = sum(param.numel() for param in self._params())
        self.kept = math.ceil(density * self.numel)
        self.error = torch.zeros(self.numel)
        self.indices = torch.zeros(num_grads, self.kept, dtype=torch.int64)
        self.values = torch.zeros(num_grads, self.kept)
        self.gram = torch.zeros(num_grads, num_grads, dtype=torch.float64)
        self.pushed = 0

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Args:
            closure: Must be None.

        Returns:
            None.
        """
        assert closure is None
        newest, rows = self.pushed % self.num_grads, min(self.pushed + 1, self.num_grads)
        with record_function(SPANS["compress"]):
            self.accumulate(newest)
        with record_function(SPANS["products"]):
            column = self.dots(newest, rows)
            self.gram[newest, :rows] = column
            self.gram[:rows, newest] = column
        self.pushed += 1
        with record_function(SPANS["solve"]):
            coefficients = self.solve(newest, rows)
        with record_function(SPANS["update"]):
            self.apply(self.combine(coefficients))
        return None

    def accumulate(self, newest: int) -> None:
        """`a = e + g`; the largest entries of `a` are the newest row, the others the new error.

        Args:
            newest: Position of the row.
        """
        self.error += torch.cat([param.grad.view(-1) for param in self._params() if param.grad is not None])
        index = torch.topk(self.error.abs(), self.kept).indices
        self.indices[newest] = index
        self.values[newest] = self.error[index]
        self.error[index] = 0.0

    def dots(self, newest: int, rows: int) -> torch.Tensor:
        """Inner products of the newest row with all rows.

        Args:
            newest: Position of the newest row.
            rows: Rows that were written.

        Returns:
            `(rows,)`, float64.
        """
        dense = torch.zeros(self.numel)
        dense[self.indices[newest]] = self.values[newest]
        return torch.stack([(dense[self.indices[i]] * self.values[i]).sum() for i in range(rows)]).to(torch.float64)

    def solve(self, newest: int, rows: int) -> torch.Tensor:
        """`c = m (m lambda I + K)^-1 e_newest`.

        Args:
            newest: Position of the newest row.
            rows: Rows that were written.

        Returns:
            `(rows,)`, float64.
        """
        damped = self.gram[:rows, :rows] + self.num_grads * self.damp * torch.eye(rows, dtype=torch.float64)
        target = torch.zeros(rows, dtype=torch.float64)
        target[newest] = self.num_grads
        solution: torch.Tensor = torch.linalg.solve(damped, target)
        return solution

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """`u = sum_i c_i row_i`.

        Args:
            coefficients: `c`.

        Returns:
            `u`, over all parameters.
        """
        update = torch.zeros(self.numel)
        for i, c in enumerate(coefficients.tolist()):
            update.index_add_(0, self.indices[i], c * self.values[i])
        return update

    def apply(self, update: torch.Tensor) -> None:
        """The parameters move by `-lr u`.

        Args:
            update: `u`.
        """
        start = 0
        for param in self._params():
            span = slice(start, start + param.numel())
            param.sub_(update[span].view(param.shape), alpha=self.param_groups[0]["lr"])
            start = span.stop

    def fill(self, seed: int) -> None:
        """Fill the window with random rows: distinct places anywhere in the vector, in no order, as Top-k gives them.

        Args:
            seed: Seed of the rows.
        """
        generator = torch.Generator().manual_seed(seed)
        edges = torch.arange(self.kept + 1) * self.numel // self.kept
        order = torch.randperm(self.kept, generator=generator)
        for index in self.indices:
            at = edges[:-1] + (torch.rand(self.kept, generator=generator) * edges.diff()).long()
            index.copy_(at[order])
        self.values.normal_(0.0, 1e-2, generator=generator)
        self.gram.copy_(1e-4 * self.kept * torch.eye(self.num_grads, dtype=torch.float64))
        self.pushed = self.num_grads

    def memory(self) -> dict[str, int]:
        """Bytes of the state, by the parts of `EFCP.memory`."""
        parts = {name: getattr(self, name).nbytes for name in ("indices", "values", "error", "gram")}
        return {**parts, "momentum": 0, "metric": 0, "total": sum(parts.values())}

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def published_rows(numel: int, num_grads: int, density: float, available: int) -> int:
    """The rows of the published window that memory has room for.

    Args:
        numel: Entries of all parameters.
        num_grads: Rows that are wanted.
        density: Fraction that is kept.
        available: Bytes.

    Returns:
        At most `num_grads`; 0 if there is no room at all.
    """
    temporaries = 6 * 4 * numel  # error, flat gradient, magnitudes, the dense row, and half as much again
    row = 12 * math.ceil(density * numel)
    return max(0, min(num_grads, (available - temporaries) // row))


def _adamw(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, **{"fused": True, **options})


def _sgd(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0, **{"momentum": 0.9, "fused": True, **options})


def _galore(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    try:
        galore = importlib.import_module("galore_torch")
    except ImportError as error:
        raise ImportError(f"galore_torch could not be imported ({error}): pip install galore_torch") from error
    settings = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **options}
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim != 2]
    groups = [{"params": others}, {"params": matrices, **settings}]
    optimizer: torch.optim.Optimizer = galore.GaLoreAdamW(groups, lr=0.0, no_deprecation_warning=True)
    return optimizer


def _adafactor(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    settings = {"scale_parameter": False, "relative_step": False, **options}  # as Trainer has it
    return Adafactor(model.parameters(), lr=0.0, **settings)  # type: ignore[no-untyped-call]


def _adamw_8bit(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(f"bitsandbytes could not be imported ({error}): pip install bitsandbytes") from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.0, **options)
    return optimizer


def _peer(name: str) -> Callable[..., torch.optim.Optimizer]:
    return lambda model, **options: PEERS[name].build(model, lr=0.0, **options)


def _published(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return AsPublished(model.parameters(), 0.0, **options)


BASELINES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "galore_torch": _galore,
    "published": _published,
    "adafactor": _adafactor,
    "adamw_8bit": _adamw_8bit,
    **{name: _peer(name) for name in PEERS},
}
