"""The inner loops: plain torch for any device, numba for the CPU, Triton for GPUs. One table says which is used.

Every backend is a module with the functions of `Kernels`, and the same bits in the window for the same input. Squares,
compression and inner products take all tensors at once: most tensors of a model are so small that calling a kernel, and
waking threads for it, would take longer than the work. The others take a span, on the thread that has its turn.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, cast

import torch

from ..blocks import Part

BACKENDS = ("auto", "reference", "numba", "triton")
BUCKET = 64  # consecutive entries of a quantised error that share a scale
# Whitened entries saturate here, so that products of whole rows fit float32.
WHITENED = 2.0**48
_TRITON = (3, 4)  # the oldest version whose settings are where we look for them


class Kernels(Protocol):
    """What a backend provides. Tensors are pieces of parameters: see `hf_efcp.blocks.Piece`.

    `scales` come with int8 values, and only with them. `start` is the position in the parameter of what is rounded, so
    that its noise does not depend on how the parameter is cut.
    """

    NAME: str

    def squares(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of squares of each vector, `(vectors,)`."""

    def accumulate_topk(
        self, gradients: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], rows: Sequence[Part]
    ) -> None:
        """`error += gradient`; move the largest entries of each block from `error` to the row."""

    def dots(self, parts: Sequence[Part], newest: int, rows: int) -> torch.Tensor:
        """Inner products of row `newest` with the first `rows` rows, part by part."""

    def project(
        self,
        indices: torch.Tensor,
        values: torch.Tensor,
        dense: torch.Tensor,
        rows: int,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Inner products of a dense vector with the first `rows` rows."""

    def combine(
        self,
        indices: torch.Tensor,
        values: torch.Tensor,
        coefficients: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
        scale: float = 0.0,
        squared: bool = False,
    ) -> None:
        """`out = scale * base + sum_i coefficients[i] * row_i`, or the rows' entries squared."""

    def quantize(
        self, error: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, key: int, start: int = 0
    ) -> None:
        """`stored * scale = error` in expectation: stochastic rounding to 4 bits or int8, by the dtype of `stored`."""

    def dequantize(self, stored: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """`out = stored * scale`, bucket by bucket."""

    def round_to_bfloat16(self, error: torch.Tensor, stored: torch.Tensor, key: int, start: int = 0) -> None:
        """`stored = error` in expectation: stochastic rounding to bfloat16."""

    def observe(self, moments: torch.Tensor, gradient: torch.Tensor, beta2: float) -> None:
        """`v <- beta2 v + (1 - beta2) g^2`: AdamW's second moment."""

    def whiten(
        self,
        x: torch.Tensor,
        moments: torch.Tensor,
        factor: float,
        correction: float,
        eps: float,
        out: torch.Tensor,
    ) -> None:
        """`out = factor x / sqrt(correction sqrt(v) + eps)`, 0 where v is."""

    def observe_levels(
        self,
        roots: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
        beta2: float,
        key: int,
        start: int,
        correction: float,
        eps: float,
        out: torch.Tensor,
    ) -> None:
        """`observe` where `sqrt(v)` is kept as levels times scales, and `out += whiten(gradient)`, in one pass."""

    def whiten_levels(
        self,
        x: torch.Tensor,
        roots: torch.Tensor,
        scale: torch.Tensor,
        start: int,
        factor: float,
        correction: float,
        eps: float,
    ) -> None:
        """`x = whiten(x)` where `sqrt(v)` is kept as levels times scales."""

    def apply(
        self,
        theta: torch.Tensor,
        update: torch.Tensor,
        *,
        lr: float,
        keep: float,
        velocity: torch.Tensor | None = None,
        momentum: float = 0.0,
    ) -> None:
        """`v <- momentum v + u`, `theta <- keep theta - lr v`."""


def choose(backend: str, device: torch.device) -> Kernels:
    """The kernels for a backend's name and a device.

    Args:
        backend: "auto" (numba on the CPU, Triton on CUDA and ROCm, the reference elsewhere), "reference", "numba" or
            "triton".
        device: Where the parameters are.

    Returns:
        The module that implements `Kernels`.

    Raises:
        ValueError: Unknown backend, or one that does not run where the parameters are.
        ImportError: "numba" or "triton" was asked for and is not installed.
    """
    check_name(backend)
    if backend == "auto":
        backend = "reference"
        if device.type == "cpu" and _numba_or_warn():
            backend = "numba"
        elif device.type == "cuda" and _triton_or_warn():  # torch calls ROCm's devices so as well
            backend = "triton"
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f'backend="numba" runs on the CPU, but the parameters are on {device}: use backend="auto"')
    try:
        if backend == "triton":
            _check_triton(device)
        return cast(Kernels, importlib.import_module(f".{backend}", __name__))
    except ValueError:
        raise
    except Exception as error:
        raise ImportError(
            f'backend="{backend}" could not be loaded ({error}): pip install {backend}, or use backend="reference"'
        ) from error


def _check_triton(device: torch.device) -> None:
    """Refuse a Triton that is absent or too old, and a device that it has no code for."""
    triton = importlib.import_module("triton")
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _TRITON:
        needed = ".".join(map(str, _TRITON))
        raise ImportError(
            f"it needs Triton {needed} or later, which torch brings since 2.8, and this is {triton.__version__}"
        )
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f'backend="triton" runs on CUDA and ROCm, but the parameters are on {device}: use backend="auto" (or, to '
            "try the kernels on a CPU, set TRITON_INTERPRET=1 before Triton is imported)"
        )


@lru_cache(maxsize=1)
def _triton_or_warn() -> bool:
    """Whether the Triton kernels can run on a GPU; cached, so that their absence is reported once."""
    try:
        _check_triton(torch.device("cuda"))
    except Exception as error:
        warnings.warn(
            f"the Triton kernels cannot be used ({type(error).__name__}: {error}); EFCP runs its plain torch kernels, "
            'tensor by tensor, which are many times slower on a GPU. "pip install triton" mends it, '
            'backend="reference" silences this.',
            stacklevel=2,
        )
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """The dtype that sums are accumulated in: float64, but Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_of_sums(enough: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for sums over rows.

    Args:
        enough: float32, if that is enough.
        device: Where they are taken.

    Returns:
        float32, or the widest that the device has.
    """
    return torch.float32 if enough == torch.float32 else widest(device)


def check_name(backend: str) -> None:
    """Refuse a name that is not in `BACKENDS`.

    Args:
        backend: The name.

    Raises:
        ValueError: It is none of them.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@lru_cache(maxsize=1)
def _numba_or_warn() -> bool:
    """Whether the numba kernels can be imported; cached, so that their absence is reported once."""
    try:
        importlib.import_module(".numba", __name__)
    except Exception as error:  # not only ImportError: a numba that is too new has lost what they are built with
        warnings.warn(
            f"the numba kernels could not be imported ({type(error).__name__}: {error}); EFCP runs its plain torch "
            'kernels, which are many times slower on the CPU. "pip install numba" of a version that pyproject.toml '
            'names mends it, backend="reference" silences this.',
            stacklevel=2,
        )
        return False
    return True
