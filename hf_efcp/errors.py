"""How the error `e` that compression leaves is kept between steps.

Below float32 the error is rounded stochastically. Rounding to nearest would lose small gradients for ever: what they
add to an error in one step is less than half a level as soon as a large entry sets the scale. What rounding takes away
or adds is not fed back itself; its expectation is zero, and sums over steps arrive in the window in the long run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from . import noise
from .compressors import State
from .kernels import BUCKET, Kernels

UINT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]  # torch has it, its type stubs do not


class ErrorStore(Protocol):
    """What `EFCP` needs of a way to keep errors."""

    in_place: ClassVar[bool]  # `load` gives out what is stored, and no copy

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for an error of zeros; their names start with "error"."""

    def load(self, state: State, slab: slice, kernels: Kernels) -> torch.Tensor:
        """The error of a slab of the flattened parameter, flat, float32, to be updated in place.

        A slab begins at a multiple of `BUCKET`, and ends at one or with the parameter.
        """

    def save(self, state: State, error: torch.Tensor, slab: slice, step: int, position: int, kernels: Kernels) -> None:
        """Keep what `load` returned and the compressor updated, in step `step`, for the parameter at a position."""


@dataclass(frozen=True)
class Float32Errors:
    """Errors as they are: 4 bytes per parameter."""

    in_place: ClassVar[bool] = True

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """A tensor of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where.

        Returns:
            `{"error": ...}`.
        """
        return {"error": torch.zeros(shape, dtype=torch.float32, device=device)}

    def load(self, state: State, slab: slice, kernels: Kernels) -> torch.Tensor:
        """A view of the stored tensor.

        Args:
            state: The parameter's tensors.
            slab: Where.
            kernels: Not used.

        Returns:
            The error.
        """
        return state["error"].view(-1)[slab]

    def save(self, state: State, error: torch.Tensor, slab: slice, step: int, position: int, kernels: Kernels) -> None:
        """Nothing to do: `load` gave out the stored tensor.

        Args:
            state: The parameter's tensors.
            error: What `load` returned.
            slab: Not used.
            step: Not used.
            position: Not used.
            kernels: Not used.
        """


@dataclass(frozen=True)
class BFloat16Errors:
    """Errors rounded stochastically to bfloat16: 2 bytes per parameter."""

    in_place: ClassVar[bool] = False

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """A tensor of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where.

        Returns:
            `{"error": ...}`.
        """
        return {"error": torch.zeros(shape, dtype=torch.bfloat16, device=device)}

    def load(self, state: State, slab: slice, kernels: Kernels) -> torch.Tensor:
        """A float32 copy.

        Args:
            state: The parameter's tensors.
            slab: Where.
            kernels: Not used.

        Returns:
            The error.
        """
        return state["error"].view(-1)[slab].to(torch.float32)

    def save(self, state: State, error: torch.Tensor, slab: slice, step: int, position: int, kernels: Kernels) -> None:
        """Round, with the noise of this step and parameter.

        Args:
            state: The parameter's tensors; updated.
            error: What `load` returned.
            slab: Where.
            step: Number of the step.
            position: Position of the parameter.
            kernels: The backend.
        """
        kernels.round_to_bfloat16(error, state["error"].view(-1)[slab], noise.key(step, position), slab.start)


@dataclass(frozen=True)
class BucketErrors:
    """Errors as levels times a scale: every bucket of 64 consecutive entries has a float32 scale of its own.

    `e_i = level_i * scale`, `scale = max |e_i| / levels` over the bucket; levels are -7 to 7, two to a byte, or -127 to
    127. Zero is a level, and stays zero. Rounding is stochastic, so that the expectation of what is kept is the error.
    Bytes per parameter: 9 / 16 for 4 bits, 17 / 16 for int8.

    Args:
        dtype: `torch.uint4` or `torch.int8`.
    """

    in_place: ClassVar[bool] = False
    dtype: torch.dtype

    def allocate(self, shape: torch.Size, device: torch.device | str) -> State:
        """Tensors for an error of zeros.

        Args:
            shape: Shape of the parameter.
            device: Where.

        Returns:
            `{"error": levels, "error_scale": scales}`, both flat.
        """
        numel = shape.numel()
        if self.dtype == torch.int8:
            levels = torch.zeros(numel, dtype=torch.int8, device=device)
        else:  # uint4 is a name only: torch computes nothing with it
            levels = torch.zeros((numel + 1) // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(-(-numel // BUCKET), dtype=torch.float32, device=device)
        return {"error": levels, "error_scale": scales}

    def load(self, state: State, slab: slice, kernels: Kernels) -> torch.Tensor:
        """Levels times scales, a float32 tensor that lives until the slab has been compressed.

        Args:
            state: The parameter's tensors.
            slab: Where.
            kernels: The backend.

        Returns:
            The error.
        """
        error = torch.empty(slab.stop - slab.start, dtype=torch.float32, device=state["error"].device)
        kernels.dequantize(*self._stored(state, slab), error)
        return error

    def save(self, state: State, error: torch.Tensor, slab: slice, step: int, position: int, kernels: Kernels) -> None:
        """Round to levels, with the noise of this step and parameter.

        Args:
            state: The parameter's tensors; updated.
            error: What `load` returned.
            slab: Where.
            step: Number of the step.
            position: Position of the parameter.
            kernels: The backend.
        """
        kernels.quantize(error, *self._stored(state, slab), noise.key(step, position), slab.start)

    def _stored(self, state: State, slab: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels and scales of a slab."""
        share = 1 if self.dtype == torch.int8 else 2  # entries of a byte
        levels = state["error"][slab.start // share : -(-slab.stop // share)]
        return levels, state["error_scale"][slab.start // BUCKET : -(-slab.stop // BUCKET)]


_STORES: dict[torch.dtype, ErrorStore] = {
    torch.float32: Float32Errors(),
    torch.bfloat16: BFloat16Errors(),
    torch.int8: BucketErrors(torch.int8),
    UINT4: BucketErrors(UINT4),
}


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
