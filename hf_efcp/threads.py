"""Who computes on how many threads.

torch's own operations run on one thread while an optimizer steps: the bits of LAPACK and BLAS depend on the number of
their threads, and the threads of torch's OpenMP pool, which wait for work by spinning, would take the cores from the
kernels, which have a pool of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_held = 0  # torch's number of threads outside `one_thread`; 0 when outside


def available() -> int:
    """Threads that the user gives to torch, and so to the kernels."""
    return _held or torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations on one thread. May be nested.

    Yields:
        Nothing.
    """
    global _held
    if _held:
        yield
        return
    _held = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_held)
        _held = 0
