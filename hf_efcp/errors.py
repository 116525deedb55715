"""How the error `e` that compression leaves is kept between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .kernels import Kernels
from .windows import State


class ErrorStore(Protocol):
    """What `EFCP` needs of a way to keep errors."""

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for an error of zeros; their names start with "error"."""

    def load(self, state: State, shape: torch.Size, kernels: Kernels) -> torch.Tensor:
        """The error in the parameter's shape, float32, contiguous, to be updated in place."""

    def save(self, state: State, error: torch.Tensor, step: int, position: int, kernels: Kernels) -> None:
        """Keep what `load` returned and the compressor updated, in step `step`, for the parameter at a position."""


@dataclass(frozen=True)
class Float32Errors:
    """Errors as they are: 4 bytes per parameter."""

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """A tensor of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where.

        Returns:
            `{"error": ...}`.
        """
        return {"error": torch.zeros(shape, dtype=torch.float32, device=device)}

    def load(self, state: State, shape: torch.Size, kernels: Kernels) -> torch.Tensor:
        """The stored tensor itself.

        Args:
            state: The parameter's tensors.
            shape: Shape of the parameter.
            kernels: Not used.

        Returns:
            The error.
        """
        return state["error"]

    def save(self, state: State, error: torch.Tensor, step: int, position: int, kernels: Kernels) -> None:
        """Nothing to do: `load` gave out the stored tensor.

        Args:
            state: The parameter's tensors.
            error: What `load` returned.
            step: Not used.
            position: Not used.
            kernels: Not used.
        """


_STORES: dict[torch.dtype, ErrorStore] = {torch.float32: Float32Errors()}


def error_store(dtype: torch.dtype) -> ErrorStore:
    """The way to keep errors in a dtype.

    Args:
        dtype: One of the keys of the table above.

    Returns:
        The store.

    Raises:
        ValueError: There is none for the dtype.
    """
    if dtype not in _STORES:
        raise ValueError(f"error_dtype must be one of {', '.join(map(str, _STORES))}, got {dtype}")
    return _STORES[dtype]
