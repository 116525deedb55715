"""Settings of the test run, and a fixture of several files."""

import os

import pytest
import torch
from hypothesis import settings

# On a developer's machine hypothesis looks for new failures; the gate gives the same answer for the same code.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def sharded():
    """A parameter as FSDP2 makes them, of a process alone."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
    torch.distributed.destroy_process_group()
