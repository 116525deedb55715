"""How the kernels are compiled, and kept on disk: anew whenever any file of this folder has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

# Sums may be reordered, but NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract"}
_UNSEEN: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # for what Python does not call


@lru_cache(maxsize=1)
def stamp() -> bytes:
    """A digest of all files that kernels are compiled from: this folder's, and the numbers that they import."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), folder.parent / "__init__.py", folder.parents[1] / "noise.py"):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.digest()


class _Kept(CompileResultCacheImpl):
    """numba's own, but that stamps the one file of a function: what is called from other files would go stale."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.locator.get_source_stamp = stamp


class _Cache(FunctionCache):
    _impl_class = _Kept


def jit(function: Callable[..., Any], fastmath: Any = _FASTMATH) -> Callable[..., Any]:
    """What Python calls, from any thread. Dividing by zero gives infinity: Python's error would cost the vectors."""
    compiled = njit(nogil=True, fastmath=fastmath, error_model="numpy")(function)
    with suppress(RuntimeError):  # no directory that the cache could be written to
        compiled._cache = _Cache(function)  # type: ignore[attr-defined]  # as `njit(cache=True)` does
    return compiled


def jit_as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what rounds stochastically: one bit of a sum would be a whole level."""
    return jit(function, fastmath=False)


def inner(function: Callable[..., Any]) -> Any:
    """What only compiled code calls, and is kept on disk with that: wrappers and a file of its own take time."""
    return njit(fastmath=_FASTMATH, **_UNSEEN)(function)


def inner_as_written(function: Callable[..., Any]) -> Any:
    """The same, with arithmetic as it is written."""
    return njit(**_UNSEEN)(function)


def inner_in_order(function: Callable[..., Any]) -> Any:
    """The same, with sums in the order in which they are written."""
    return njit(fastmath={"contract"}, **_UNSEEN)(function)
