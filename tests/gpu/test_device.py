"""On a CUDA or ROCm device: steps against plain torch, bits after a resume and on replicas, waits, graphs, memory."""

import copy
import os
import socket

import pytest
import torch

from hf_efcp import LowRankMFAC, SparseGGT, SparseMFAC
from hf_efcp.errors import UINT4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm device"),
]

EXACT = {"error_dtype": torch.float32, "metric_dtype": torch.float32, "value_dtype": torch.float32}
SHAPES = [(130, 90), (1000,), (30, 20, 5), (0,), (1,), (700, 200), (5000, 64)]
CASES = {
    "default": (LowRankMFAC, {}, 5e-2),
    "exact": (LowRankMFAC, {**EXACT, "rank": 2}, 1e-3),
    "one matrix": (LowRankMFAC, {**EXACT, "rank": 2, "scope": "model"}, 1e-3),
    "bfloat16": (LowRankMFAC, {"error_dtype": torch.bfloat16, "metric_dtype": torch.bfloat16, "rank": 3}, 5e-2),
    "lean": (LowRankMFAC, {"metric": "factored"}, 5e-2),
    "both moments": (LowRankMFAC, {"precondition": "momentum"}, 5e-2),
    "large": (LowRankMFAC, {**EXACT, "rank": 2, "num_grads": 65}, 1e-3),
    "large, both moments": (SparseMFAC, {"num_grads": 65, "precondition": "momentum"}, 1e-2),
    "large, absolute": (LowRankMFAC, {**EXACT, "rank": 2, "num_grads": 65, "damp": 0.1}, 1e-3),
    "large, GGT": (SparseGGT, {"num_grads": 65}, 1e-2),
    "large, the paper's": (SparseMFAC, {"num_grads": 65, "metric": "none", "damp": 1e-3}, 1e-2),
    "sparse": (SparseMFAC, {}, 1e-2),
    "sparse, factored": (SparseMFAC, {"metric": "factored"}, 1e-2),
    "sparse, exact": (SparseMFAC, {**EXACT, "density": 0.05}, 1e-2),
    "sparse, small": (SparseMFAC, {"block_size": 256, "value_dtype": torch.int8, "error_dtype": UINT4}, 1e-2),
    "sparse, the paper's": (SparseMFAC, {"metric": "none", "damp": 1e-3}, 1e-2),
    "sparse GGT": (SparseGGT, {}, 1e-2),
}


class Run:
    """An optimizer over parameters of zeros on the device, whose gradients depend on the step alone."""

    def __init__(self, case, backend="triton", **changes):
        cls, options, _ = CASES[case]
        self.params = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in SHAPES]
        self.optimizer = cls(self.params, **{"lr": 0.01, "backend": backend, "num_grads": 3, **options, **changes})
        self.steps = 0

    def draw(self):
        generator = torch.Generator().manual_seed(self.steps)
        for number, param in enumerate(self.params):
            param.grad = (torch.randn(param.shape, generator=generator) * (1 + number)).cuda()
        self.steps += 1

    def fill(self):
        """New gradients in the memory of the old, as a captured backward leaves them."""
        generator = torch.Generator().manual_seed(self.steps)
        for number, param in enumerate(self.params):
            param.grad.copy_(torch.randn(param.shape, generator=generator) * (1 + number))
        self.steps += 1

    def step(self, step=None):
        before = [param.detach().clone() for param in self.params]
        if step is None:
            self.draw()
            self.optimizer.step()
        else:
            self.fill()
            step()
        return [param.detach() - old for param, old in zip(self.params, before, strict=True)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_references(case):
    mine, expected = Run(case), Run(case, "reference")
    assert mine.optimizer.backend == "triton"
    for _ in range(5):
        for one, other in zip(mine.step(), expected.step(), strict=True):
            if one.numel():
                # A threshold between two magnitudes that differ in the last bit may fall on either side.
                assert float((one - other).norm()) <= CASES[case][2] * float(other.norm())


def test_it_is_chosen():
    param = torch.nn.Parameter(torch.zeros(8, 8, device="cuda"))
    assert LowRankMFAC([param]).backend == "triton"


@pytest.mark.parametrize("case", ["default", "sparse", "sparse, small", "one matrix"])
def test_two_runs_and_a_resume_have_the_same_bits(case, tmp_path):
    whole, part, resumed = Run(case), Run(case), Run(case)
    updates = [whole.step() for _ in range(6)]
    for update in updates[:3]:
        assert_same(part.step(), update)
    torch.save(part.optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed.steps = 3
    for param, stopped in zip(resumed.params, part.params, strict=True):
        param.data.copy_(stopped.data)
    resumed.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    copied = copy.deepcopy(part)
    for update in updates[3:]:
        for run in (resumed, copied, part):
            assert_same(run.step(), update)


@pytest.mark.parametrize("case", ["default", "sparse", "large"])
def test_a_step_does_not_wait_for_the_device(case):
    run = Run(case, nonfinite="ignore")
    for _ in range(2):
        run.step()
    run.draw()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", ["default", "sparse", "large"])
def test_a_step_returns_while_the_device_is_busy(case):
    """Some of torch's operations wait unseen by the mode above: `cholesky_solve` of many matrices does."""
    run = Run(case, nonfinite="ignore")
    for _ in range(2):
        run.step()
    run.draw()
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
    awake = torch.cuda.Event()
    awake.record()
    run.optimizer.step()
    assert not awake.query()


def test_a_step_needs_little_memory_beside_its_state():
    param = torch.nn.Parameter(torch.zeros(4096, 4096, device="cuda"))
    param.grad = torch.randn_like(param)
    optimizer = LowRankMFAC([param])
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * param.numel()


def test_a_graph_is_refused_without_capturable():
    run = Run("default")
    run.step()
    run.draw()
    with (
        pytest.raises(RuntimeError, match="given capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run.optimizer.step()


@pytest.mark.parametrize("case", ["default", "exact", "one matrix", "lean", "sparse", "sparse, small"])
def test_replays_of_a_graph_are_steps(case):
    lr = torch.tensor(0.01, device="cuda")
    eager, mine = (Run(case, lr=rate, capturable=True, nonfinite="ignore") for rate in (lr.clone(), lr))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert_same(mine.step(), eager.step())
    torch.cuda.current_stream().wait_stream(side)
    for param in mine.params:
        param.grad = torch.zeros_like(param)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.optimizer.step()
    for rate in (0.01, 0.01, 0.002, 0.002):  # the window wraps
        for given in (lr, eager.optimizer.param_groups[0]["lr"]):
            given.fill_(rate)
        found = mine.step(graph.replay)
        assert any(update.any() for update in found)
        assert_same(found, eager.step())
    saved, expected = mine.optimizer.state_dict(), eager.optimizer.state_dict()
    assert saved["state"][0]["pushed"] == expected["state"][0]["pushed"] == 5
    own = [param.grad for param in mine.params]
    assert_same(mine.step(), eager.step())  # counts what was replayed, with gradients elsewhere
    for param, gradient in zip(mine.params, own, strict=True):
        param.grad = gradient
    assert_same(mine.step(graph.replay), eager.step())


def replica(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(96, 64).cuda())
    optimizer = LowRankMFAC(module.parameters(), lr=0.01, num_grads=3)
    for step in range(5):
        torch.manual_seed(10 * step + rank)
        module(torch.randn(8, 96, device="cuda")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    results[rank] = [param.detach().cpu().numpy() for param in module.parameters()]
    torch.distributed.destroy_process_group()


def test_two_replicas_on_one_device_have_the_same_bits():
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as free, context.Manager() as manager:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        results = manager.dict()
        torch.multiprocessing.spawn(replica, args=(port, results), nprocs=2)
        for one, other in zip(results[0], results[1], strict=True):
            assert (one == other).all()
            assert one.any()
