"""What the state of a parameter is made of: fresh tensors, and the check of those that a checkpoint brings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from . import adamw, checks, shards
from .compressors import Compressor, LowRank, Window
from .errors import ErrorStore
from .leaves import ParamRef
from .metric import Metric
from .preconditioners import Preconditioner
from .preconditioners.diagonal import DiagonalPreconditioner
from .shards import is_sharded, local

State = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The parts of an optimizer that keep something between steps.

    Args:
        compressor: Of the gradients.
        errors: How errors are kept.
        preconditioner: What is made of the window.
        num_grads: Capacity `m` of the window.
        metric: In which gradients are compared; None for none.
    """

    compressor: Compressor
    errors: ErrorStore
    preconditioner: Preconditioner
    num_grads: int
    metric: Metric | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not go together."""
        if isinstance(self.compressor, LowRank) and isinstance(self.preconditioner, DiagonalPreconditioner):
            raise TypeError(
                f"{type(self.preconditioner).__name__} squares the window's rows entry by entry, and those of LowRank "
                "cannot be: use TopK or Identity as the compressor, or MFAC or GGT as the preconditioner"
            )

    @cached_property
    def window(self) -> Window:
        """The window of the compressor's rows.

        In a metric the update differs from the dense vector by what dampening leaves of the window, so that float32
        sums are enough. Without one coefficients reach `1 / lambda` and cancel.
        """
        return self.compressor.window(self.num_grads, torch.float64 if self.metric is None else torch.float32)

    def resized(self, num_grads: int) -> Layout:
        """The same with another window.

        Args:
            num_grads: Its capacity.

        Returns:
            The layout.
        """
        return replace(self, num_grads=num_grads)

    def fresh(self, ref: ParamRef, device: torch.device | str) -> State:
        """The state of a parameter that was never stepped.

        Args:
            ref: The parameter.
            device: Where; "meta" gives shapes without memory.

        Returns:
            Plain tensors and numbers by name.
        """
        if not ref.group["preconditioned"]:
            return adamw.allocate(ref.param, device)
        state = shards.allocate(ref.param, self.maker(ref), device)
        if self.metric is not None:
            state["gradients"] = 0  # that the parameter has had: AdamW's step
        return state

    def maker(self, ref: ParamRef) -> shards.Maker:
        """What makes the tensors of a parameter, or of a shard of it.

        Args:
            ref: The parameter.

        Returns:
            A function of shape and device.
        """

        def make(shape: torch.Size, device: torch.device | str) -> State:
            state: State = {} if self.compressor.lossless else self.errors.allocate(shape, device)
            state |= self.window.allocate(shape, device)
            state |= self.compressor.allocate(shape, device, ref.position)
            state |= self.preconditioner.allocate(shape, device)
            state |= {} if self.metric is None else self.metric.allocate(shape, device)
            return state | (momentum(shape, device) if ref.group[checks.HEAVY_BALL] else {})

        return make

    def gram_state(self, device: torch.device | str) -> State:
        """What parameters that share a preconditioner have in common.

        Args:
            device: Where; "meta" gives shapes without memory.

        Returns:
            The rows pushed, and the Gram matrix (float64, on the CPU until `Whole` takes it to the device).
        """
        state: State = {"pushed": 0}
        if self.preconditioner.uses_gram:
            home = "meta" if device == "meta" else "cpu"
            state["gram"] = torch.zeros(self.num_grads, self.num_grads, dtype=torch.float64, device=home)
        return state

    def fresh_states(self, trainable: list[ParamRef], by_layer: bool) -> list[State]:
        """The states that there are once every parameter was stepped, for counting their bytes.

        Args:
            trainable: The parameters.
            by_layer: Each has a preconditioner of its own.

        Returns:
            States on "meta"; of sharded ones this rank's rows.
        """
        states = [self.fresh(ref, "meta") for ref in trainable]
        for ref, state in zip(trainable, states, strict=True):
            if is_sharded(ref.param) and ref.group["preconditioned"]:
                own = {name: tensor[:1] for name, tensor in state.items() if name != "gradients"}
                state.update(own)
        preconditioned = sum(bool(ref.group["preconditioned"]) for ref in trainable)
        count = preconditioned if by_layer else min(1, preconditioned)
        return [*states, *(self.gram_state("meta") for _ in range(count))]

    def check(self, saved: State, ref: ParamRef, name: str) -> None:
        """Refuse a saved state that `fresh` and `gram_state` would not have made.

        Args:
            saved: State of one parameter in a checkpoint.
            ref: The parameter, in the checkpoint's group.
            name: What to call the parameter.

        Raises:
            ValueError: It does not fit.
        """
        expected = self.fresh(ref._replace(group={**ref.group, checks.HEAVY_BALL: 1.0}), "meta")
        own = set(expected) - {"step", "gradients"}
        if ref.group["preconditioned"]:
            expected |= {name: v for name, v in self.gram_state("meta").items() if name in saved}
        if is_sharded(ref.param) and any(
            torch.is_tensor(v) and not is_sharded(v) and k in own for k, v in saved.items()
        ):
            raise ValueError(
                f"the checkpoint's state of {name} is whole, but the parameter is sharded: load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        checks.check_tensors(saved, expected, {"momentum"}, name)
        if ref.group["preconditioned"]:
            view = shards.view(saved, ref.param, self.maker(ref))
            self.window.check(view, local(ref.param).shape, name)


def momentum(shape: torch.Size, device: torch.device | str) -> State:
    """The velocity of a parameter.

    Args:
        shape: Its shape.
        device: Where.

    Returns:
        `{"momentum": ...}`, float32, zeros.
    """
    return {"momentum": torch.zeros(shape, dtype=torch.float32, device=device)}
