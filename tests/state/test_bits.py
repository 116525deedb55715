"""The bits of every optimizer after 20 steps on fixed gradients are what they were: moving code changes nothing.

Bits belong to a version of torch and to a processor, so that they are compared where they were recorded. After a change
that is meant to change them: `python tests/state/test_bits.py`, and the reason in the commit.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import set_gradients
from variants import build, names

RECORD = Path(__file__).parents[1] / "data" / "bits.json"
SHAPES = [(70, 90), (5000,), (24, 3, 5, 5), (7,), ()]
BACKENDS = ["numba", "reference"]


def machine():
    """What bits depend on besides the code."""
    return [torch.__version__.split("+")[0], np.__version__, torch.backends.cpu.get_cpu_capability()]


def digest(name, backend):
    """Of the parameters and of all state after 20 steps, some of them without the gradient of a parameter."""
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = build(name, params, backend=backend, weight_decay=0.01)
    for step in range(20):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
        set_gradients(params, [None if (step + place) % 9 == 8 else g for place, g in enumerate(gradients)])
        optimizer.step()
    found = hashlib.sha256()
    for param in params:
        found.update(param.detach().numpy().tobytes())
        for key, value in sorted(optimizer.state[param].items()):
            raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if torch.is_tensor(value) else value
            found.update(f"{key} {raw!r}".encode())
    return found.hexdigest()[:16]


def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.skipif(recorded()["machine"] != machine(), reason="the bits of another version or processor")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", names())
def test_bits_are_what_they_were(name, backend):
    assert digest(name, backend) == recorded()["bits"][f"{name} {backend}"]


def test_every_optimizer_is_recorded_and_no_two_are_alike():
    bits = recorded()["bits"]
    assert sorted(bits) == sorted(f"{name} {backend}" for name in names() for backend in BACKENDS)
    one = [bits[f"{name} numba"] for name in names()]
    assert len(set(one)) == len(one)


if __name__ == "__main__":
    found = {f"{name} {backend}": digest(name, backend) for name in names() for backend in BACKENDS}
    RECORD.write_text(json.dumps({"machine": machine(), "bits": found}, indent=1) + "\n", encoding="utf-8")
