"""Runs a function in a few gloo processes on this machine and brings back what each returned."""

import contextlib
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.cpu
import torch.distributed as dist
import torch.multiprocessing

# It records events of streams, and in torch 2.6 the CPU's has none.
needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"FSDP2 of torch {torch.__version__} needs a GPU"
)


def run(function, ranks, folder, *arguments):
    """`function(rank, *arguments)` in each of `ranks` processes; the returned values, by rank.

    What they return goes through torch.save. An exception in one fails the test with its traceback.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_start, (function, ranks, port, str(folder), arguments), nprocs=ranks)
    results = [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=False) for rank in range(ranks)]
    for rank, (value, error) in enumerate(results):
        assert error is None, f"rank {rank}:\n{error}"
        del value
    return [value for value, _ in results]


def _start(rank, function, ranks, port, folder, arguments):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    value = error = None
    try:
        value = function(rank, *arguments)
    except Exception:
        error = traceback.format_exc()
    torch.save((value, error), Path(folder, f"rank{rank}.pt"))
    leave()


def leave():
    """End this process. Destroying a gloo group waits for a thread that may be waiting for the GIL, for ever."""
    with contextlib.suppress(RuntimeError):  # another rank has failed
        dist.barrier()
    os._exit(0)
