"""What an optimizer will cost, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .factory import maker
from .family import AnyOptimizer
from .shards import local
from .variants import LowRankMFAC


class MemoryPlan(dict[str, int]):
    """Bytes by part: the dictionary that `EFCP.memory` returns, which prints as a table.

    Args:
        parts: The bytes.
        title: What the table is of.
        num_grads: Capacity of the window; 0 for an optimizer that has none.
        parameters: How many trainable parameters there are.
        adamw: Bytes that `torch.optim.AdamW` would keep for them.

    Examples:
        >>> import torch
        >>> from hf_efcp import estimate_memory
        >>> plan = estimate_memory(torch.nn.Linear(1000, 1000))
        >>> plan.num_grads, plan.parameters, plan.adamw
        (16, 1001000, 8008008)
        >>> plan["total"] < plan.adamw
        True
    """

    def __init__(self, parts: Mapping[str, int], *, title: str, num_grads: int, parameters: int, adamw: int) -> None:
        super().__init__(parts)
        self.title = title
        self.num_grads = num_grads
        self.parameters = parameters
        self.adamw = adamw

    def __str__(self) -> str:
        labels = {"total": "total, as in checkpoints", "adamw": "AdamW, for comparison"}
        rows = [
            f"{labels.get(part, part):<24} {size:>17,} {size / max(1, self.parameters):>8.2f}"
            for part, size in {**self, "adamw": self.adamw}.items()
        ]
        window = f"num_grads={self.num_grads}, " if self.num_grads else ""
        head = f"{self.title}: {window}{self.parameters:,} trainable parameters"
        return "\n".join([head, f"{'':<24} {'bytes':>17} {'B/param':>8}", *rows])


def estimate_memory(
    model_or_params: torch.nn.Module | Iterable[Any],
    optimizer: str | Callable[..., AnyOptimizer] = LowRankMFAC,
    **arguments: Any,
) -> MemoryPlan:
    """Bytes of an optimizer's state, as its `memory()` will report them after the first step.

    Parameters that do not require a gradient cost nothing. With a `memory_budget`, also the window that fits:

        print(estimate_memory(model, memory_budget="8B/param", rank=2))

    Args:
        model_or_params: A model, or what would be given to the optimizer: parameters, named parameters or groups.
        optimizer: A key of `hf_efcp.OPTIMIZERS` ("-" may stand for "_"), or the class.
        **arguments: The optimizer's own arguments.

    Returns:
        Bytes by part: `indices`, `values`, `error`, `momentum`, `metric`, `gram` and their `total`, or `subspace`,
        `moments`, `window` and `total` of a projected optimizer. A dictionary that prints as a table, with `num_grads`
        as an attribute.

    Raises:
        TypeError: Arguments are swapped, or of the wrong kind.
        ValueError: The name is unknown, or an argument is refused by the optimizer.

    Examples:
        >>> import torch
        >>> from hf_efcp import SparseMFAC, estimate_memory
        >>> plan = estimate_memory(torch.nn.Linear(1000, 1000), SparseMFAC, num_grads=32, density=0.01)
        >>> print(plan)
        SparseMFAC: num_grads=32, 1,001,000 trainable parameters
                                             bytes  B/param
        indices                            641,280     0.64
        values                             641,280     0.64
        error                            1,063,564     1.06
        momentum                                 0     0.00
        metric                           1,063,564     1.06
        gram                                16,384     0.02
        total, as in checkpoints         3,426,072     3.42
        AdamW, for comparison            8,008,008     8.00
    """
    if isinstance(model_or_params, str):
        raise TypeError(f"the model or its parameters come first, and then the optimizer; got {model_or_params!r}")
    params = model_or_params.parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    made = maker(optimizer)(params, **arguments)
    trainable = [param for group in made.param_groups for param in group["params"] if param.requires_grad]
    return MemoryPlan(
        made.planned_memory(),
        title=type(made).__name__,
        num_grads=made.param_groups[0].get("num_grads", 0),
        parameters=sum(local(param).numel() for param in trainable),
        adamw=sum(2 * local(param).nbytes + 4 for param in trainable),  # in the parameters' dtypes, with a counter
    )


def largest_window(
    model_or_params: torch.nn.Module | Iterable[Any],
    optimizer: str | Callable[..., AnyOptimizer] = LowRankMFAC,
    *,
    memory_budget: int | str,
    **arguments: Any,
) -> int:
    """The largest `num_grads` that a budget has room for: what the optimizer takes with the same `memory_budget`.

    Args:
        model_or_params: A model, or what would be given to the optimizer: parameters, named parameters or groups.
        optimizer: A key of `hf_efcp.OPTIMIZERS` ("-" may stand for "_"), or the class.
        memory_budget: What all state may take: "8B/param", "300MB", "2GiB" or an int of bytes; see `EFCP`.
        **arguments: The optimizer's other arguments: density, block size and dtypes decide.

    Returns:
        It.

    Examples:
        >>> import torch
        >>> from hf_efcp import largest_window
        >>> largest_window(torch.nn.Linear(1000, 1000), memory_budget="4B/param", rank=8)
        52
    """
    return estimate_memory(model_or_params, optimizer, memory_budget=memory_budget, **arguments).num_grads
