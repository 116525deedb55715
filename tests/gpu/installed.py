"""Whether the Triton that is installed has what the kernels need, told without importing it."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from hf_efcp.kernels import _TRITON

try:
    found = version("triton")
except PackageNotFoundError:
    found = "0.0"
_triton = tuple(map(int, found.split(".")[:2]))
needs_triton = pytest.mark.skipif(_triton < _TRITON, reason=f"needs Triton {_TRITON} or later, found {found}")
needs_interpreter = pytest.mark.skipif(
    _triton < (3, 7),
    reason=f"before 3.7 Triton's interpreter makes integers of arrays of one entry, of which NumPy warns and which it "
    f"refuses from 2.4; found Triton {found} and NumPy {np.__version__}",
)
