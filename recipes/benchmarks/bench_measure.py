"""What is measured: seconds of a step and of its parts, the time of streaming bytes, resident memory, the machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from bench_baselines import AsPublished
from torch.profiler import ProfilerActivity, profile

import hf_efcp
from hf_efcp import EFCP
from hf_efcp.step import SPANS

PARTS = tuple(SPANS)
_FIRST_STEP = """
import time, torch, hf_efcp
param = torch.nn.Parameter(torch.zeros(1 << 20))
param.grad = torch.randn_like(param)
optimizer = hf_efcp.SparseMFAC([param], num_grads=8)
start = time.perf_counter()
optimizer.step()
print(time.perf_counter() - start)
"""
_PAUSE = 0.05  # seconds until torch's threads have stopped waiting for work, which they do by spinning


def timed_step(optimizer: torch.optim.Optimizer) -> tuple[float, dict[str, float]]:
    """One step, and a second one under torch's profiler, which has a span for each part.

    Args:
        optimizer: Stepped.

    Returns:
        Seconds of the first, and what of them are shares of the parts in the second, "rest" for what is in none;
        nothing by part for another library's optimizer.
    """
    time.sleep(_PAUSE)
    start = time.perf_counter()
    optimizer.step()
    whole = time.perf_counter() - start
    if not isinstance(optimizer, EFCP | AsPublished):
        return whole, {}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        time.sleep(_PAUSE)
        start = time.perf_counter()
        optimizer.step()
        again = time.perf_counter() - start
    spans = {event.key: event.cpu_time_total * 1e-6 for event in profiler.key_averages()}
    seconds = {part: spans[name] for part, name in SPANS.items() if name in spans}
    seconds["rest"] = again - sum(seconds.values())
    return whole, {part: own * whole / again for part, own in seconds.items()}


def stream(tensors: Iterable[torch.Tensor]) -> tuple[float, int]:
    """Read all bytes of some tensors twice, on torch's threads.

    Args:
        tensors: Contiguous.

    Returns:
        Seconds, and the bytes that were read: twice those of the tensors.
    """
    views = [part for tensor in tensors for part in _words(tensor)]
    time.sleep(_PAUSE)
    start = time.perf_counter()
    for _ in range(2):
        for view in views:
            view.sum()
    return time.perf_counter() - start, 2 * sum(view.nbytes for view in views)


def _words(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of a tensor as 64-bit words, and the bytes behind them."""
    flat = tensor.view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    return flat[:whole].view(torch.int64), flat[whole:]


def read_and_write(accumulator: torch.Tensor) -> float:
    """Read and write a vector once, on torch's threads.

    Args:
        accumulator: float32.

    Returns:
        Seconds.
    """
    time.sleep(_PAUSE)
    start = time.perf_counter()
    accumulator.mul_(1.0)
    return time.perf_counter() - start


def peak_memory(step: Callable[[], Any]) -> tuple[int, str]:
    """By how much resident memory rises above what it is now, while something runs.

    What the allocator holds without need is given back first, or it would hide what the step allocates.

    Args:
        step: What to run.

    Returns:
        Bytes, and how they were measured: "VmHWM", the kernel's own high-water mark, or "sampled".
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    before = int(psutil.Process().memory_info().rss)
    if _reset_high_water():
        step()
        return max(0, _high_water() - before), "VmHWM"
    return max(0, _sampled(step) - before), "sampled"


def _reset_high_water() -> bool:
    """Whether Linux has set its mark back to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water() - int(psutil.Process().memory_info().rss) < 1 << 20
    except (OSError, StopIteration):
        return False


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _sampled(step: Callable[[], Any]) -> int:
    process, done, largest = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, int(process.memory_info().rss))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return largest


def cold_first_step() -> tuple[float, float]:
    """The first step of a fresh process: without compiled kernels on disk, and with those that it has left there.

    Returns:
        Seconds of both.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", _FIRST_STEP]
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    compiled, loaded = (float(run.stdout) for run in runs)
    return compiled, loaded


def machine(seed: int) -> dict[str, Any]:
    """What the numbers depend on, for the record.

    Args:
        seed: The seed of the run.

    Returns:
        Processor, threads, memory, load, versions and seed.
    """
    return {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": int(psutil.virtual_memory().total),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "hf_efcp": hf_efcp.__version__,
        **{name: version(name) for name in ("torch", "numba", "numpy", "transformers")},
        "seed": seed,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
