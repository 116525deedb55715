"""Whether the Triton that is installed has what the kernels need, told without importing it."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from hf_efcp.kernels import _TRITON

try:
    found = version("triton")
except PackageNotFoundError:
    found = "0.0"
_triton, _numpy = (tuple(map(int, text.split(".")[:2])) for text in (found, np.__version__))
needs_triton = pytest.mark.skipif(_triton < _TRITON, reason=f"needs Triton {_TRITON} or later, found {found}")
# Before 3.7 it makes integers of arrays with one entry, which NumPy 2.4 and later refuse.
needs_interpreter = pytest.mark.skipif(
    _triton < (3, 7) and _numpy >= (2, 4),
    reason=f"the interpreter needs Triton 3.7 or later, or NumPy before 2.4; found {found} and {np.__version__}",
)
