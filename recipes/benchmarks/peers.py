"""Optimizers of others that Trainer has no name for: Muon, SOAP and Shampoo, over a model as Trainer groups it."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from transformers import Trainer

ADJUST = "match_rms_adamw"  # Muon's update is then as long as AdamW's, and so is its learning rate
RMSPROP = 3  # pytorch_optimizer's number for a step as long as RMSProp's


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for hidden matrices and `torch.optim.AdamW` for everything else, as one optimizer.

    Args:
        hidden: Parameter groups of matrices.
        others: Parameter groups.
        lr: Learning rate of both.
        options: Of Muon.
    """

    def __init__(self, hidden: list[dict[str, Any]], others: list[dict[str, Any]], lr: float, **options: Any) -> None:
        self._muon = torch.optim.Muon(hidden, lr=lr, **options)
        self._adamw = torch.optim.AdamW(others, lr=lr)
        groups = [{**group, "hidden": True} for group in self._muon.param_groups]
        groups += [{**group, "hidden": False} for group in self._adamw.param_groups]
        super().__init__(groups, {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both.

        Args:
            closure: Must be None.

        Returns:
            None.
        """
        assert closure is None
        for part, hidden in ((self._muon, True), (self._adamw, False)):
            # Loading a state puts other objects in their place.
            part.param_groups = [group for group in self.param_groups if group["hidden"] == hidden]
            part.state = self.state
            part.step()  # type: ignore[no-untyped-call]
        return None


@dataclass(frozen=True)
class Peer:
    """An optimizer that Trainer has no name for.

    Args:
        module: The package that has it.
        cls: Its class there.
        defaults: Options that differ from those of the class.
    """

    module: str
    cls: str
    defaults: dict[str, Any]

    def build(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0, **options: Any) -> Any:
        """Make it over a model; biases and norms are not decayed, as Trainer has it.

        Args:
            model: The model.
            lr: Learning rate.
            weight_decay: Decoupled.
            **options: Of the class.

        Returns:
            The optimizer.

        Raises:
            ImportError: If the package is not installed.
            ValueError: If the class has no such option, or Muon nothing to do.
        """
        self.check(options)
        options = {**self.defaults, **options}
        if self.cls == "Muon":
            inner = hidden_matrices(model)
            if not inner:
                raise ValueError("Muon is for hidden matrices, and the model has no linear layer before its last one")
            hidden = _groups(model, weight_decay, lambda name: name in inner)
            return MuonAdamW(hidden, _groups(model, weight_decay, lambda name: name not in inner), lr, **options)
        return self._class()(_groups(model, weight_decay, lambda name: True), lr=lr, **options)

    def check(self, options: dict[str, Any]) -> None:
        """Refuse options that the class would ignore, or that come from elsewhere.

        Args:
            options: By name.

        Raises:
            ImportError: If the package is not installed.
            ValueError: If the class has no such option.
        """
        parameters = inspect.signature(self._class()).parameters.values()
        valid = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"params", "lr", "weight_decay"}
        if unknown := sorted(set(options) - valid):
            raise ValueError(
                f"{self.cls} has no option {', '.join(unknown)}; expected some of {', '.join(sorted(valid))}"
            )

    def _class(self) -> Any:
        try:
            return getattr(importlib.import_module(self.module), self.cls)
        except ImportError as error:
            raise ImportError(f"{self.module} could not be imported ({error}): pip install {self.module}") from error


PEERS = {
    "muon": Peer("torch.optim", "Muon", {"adjust_lr_fn": ADJUST}),
    "soap": Peer("pytorch_optimizer", "SOAP", {}),
    # At its class's defaults it takes SGD's steps, and a new matrix every 1,000 steps. RMSProp's moment has no
    # correction of its bias here: with 0.999 the first hundreds of steps would be too long.
    "shampoo": Peer(
        "pytorch_optimizer",
        "ScalableShampoo",
        {
            "betas": (0.9, 0.99),
            "graft_type": RMSPROP,
            "moving_average_for_momentum": True,
            "decoupled_weight_decay": True,
            "start_preconditioning_step": 20,
            "preconditioning_compute_steps": 20,
        },
    ),
}


class PeerFactory:
    """What Trainer's `optimizer_cls_and_kwargs` may hold instead of a class; it calls `PeerFactory()(model, ...)`."""

    def __call__(self, model: torch.nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
        """As `PEERS[name].build(model, **options)`."""
        optimizer: torch.optim.Optimizer = PEERS[name].build(model, **options)
        return optimizer


def parse_options(text: str) -> dict[str, Any]:
    """Read "key=value,key=value" for an optimizer that is not ours, values as in Python.

    Args:
        text: The options.

    Returns:
        The options by name.

    Raises:
        ValueError: An item is not a key and a value.
    """
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        try:
            if not equals:
                raise ValueError("there is no '='")
            options[key.strip()] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value).strip())
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"expected key=value with a number, true, false or quoted text, got {item!r}: {error}"
            ) from None
    return options


def hidden_matrices(model: torch.nn.Module) -> set[str]:
    """The names of the matrices that Muon is for: those of linear layers, but not the last one, the head.

    Args:
        model: The model.

    Returns:
        The names.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {f"{name}.weight" for name in linear[:-1]}


def _groups(model: torch.nn.Module, weight_decay: float, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # does not use `self`
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad and wanted(name)]
    groups: list[dict[str, Any]] = [
        {"params": [param for name, param in named if (name in decayed) is decay], "weight_decay": rate}
        for decay, rate in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]
