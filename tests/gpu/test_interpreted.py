"""The Triton kernels without a GPU: runs the `check_*.py` beside it in processes where Triton interprets kernels.

Whether it does is decided when Triton is imported, and would be decided for all other tests of this process as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from installed import needs_interpreter, needs_triton

HERE = Path(__file__).parent


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("check_*.py")))
def test_in_the_interpreter(name):
    # A warning of NumPy's about an overflow would be one of the kernels' own arithmetic, which wraps and saturates.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning:triton"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / name)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
