"""Whether the Triton that is installed has what the kernels need, told without importing it."""

from importlib.metadata import PackageNotFoundError, version

import pytest

try:
    found = version("triton")
except PackageNotFoundError:
    found = "0.0"
needs_triton = pytest.mark.skipif(
    tuple(map(int, found.split(".")[:2])) < (3, 4), reason=f"needs Triton 3.4 or later (torch 2.8), found {found}"
)
