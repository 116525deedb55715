"""Blocks, rows and windows for kernels, and processes of their own."""

import os
import subprocess
import sys
import textwrap

from hf_efcp.kernels import numba, reference

BACKENDS = [reference, numba]


def python(code, environment=None):
    """Run code in a process of its own."""
    command, environment = [sys.executable, "-c", textwrap.dedent(code)], {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
