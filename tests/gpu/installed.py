"""Whether the Triton that is installed has what the kernels need, told without importing it."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from hf_efcp.kernels import _TRITON

try:
    found = version("triton")
except PackageNotFoundError:
    found = "0.0"
needs_triton = pytest.mark.skipif(
    tuple(map(int, found.split(".")[:2])) < _TRITON, reason=f"needs Triton {_TRITON} or later, found {found}"
)
