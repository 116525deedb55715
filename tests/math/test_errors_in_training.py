"""The kept error over many steps, in memory, and in checkpoints."""

import math

import pytest
import torch
from error_cases import BELOW_FLOAT32, QUANTISED
from papers import MicroAdam, SparseGGT, SparseMFAC
from problems import Regression, flat, set_gradients
from states import assert_same, refuse, through_a_file, train
from torch.utils._python_dispatch import TorchDispatchMode
from variants import build

from hf_efcp import estimate_memory
from hf_efcp.compressors import TopK
from hf_efcp.errors import error_store
from hf_efcp.kernels import reference


@pytest.mark.parametrize(("dtype", "small"), [(torch.uint4, 0.02), (torch.int8, 0.001)])
def test_small_constant_gradients_arrive_beside_a_large_error(dtype, small):
    """They would be lost for ever by rounding to nearest: what a step adds is less than half a level.

    One bucket, two blocks that keep one entry each. In the first block a large entry leaves the error 1 of another one
    unsent in every step; in the second, eight entries get the same small gradient and one of them is sent.
    """
    steps, scale = 4000, 1 / QUANTISED[dtype]
    assert small < scale / 2
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = MicroAdam(
        [param], num_grads=1, density=1 / 32, block_size=32, value_dtype=torch.float32, error_dtype=dtype
    )
    arrived = torch.zeros(64, dtype=torch.float64)
    for step in range(steps):
        gradient = torch.zeros(64)
        gradient[0], gradient[1], gradient[32:40] = 2.0, float(step == 0), small
        set_gradients([param], [gradient])
        optimizer.step()
        state = optimizer.state[param]
        arrived[state["indices"].to(torch.int64) + torch.tensor([0, 32])] += state["values"].double()
    error = error_store(dtype).load(state, slice(0, 64), reference)
    assert error[1] == pytest.approx(1.0, abs=1e-5)
    assert arrived[0] == 2.0 * steps
    assert arrived[1] == 0.0
    assert not arrived[40:].any()
    given_to_each, deviation = steps * small, 0.5 * scale * steps**0.5
    # The roundings of a step are between two levels: half a level is the most that they can deviate by.
    assert 5 * deviation < 0.35 * given_to_each
    assert ((arrived[32:40] + error[32:40] - given_to_each).abs() < 5 * deviation).all()
    assert (arrived[32:40] > 0.5 * given_to_each).all()
    assert abs((arrived[32:40] + error[32:40]).sum() - 8 * given_to_each) < 5 * deviation * 8**0.5


@pytest.mark.parametrize("dtype", BELOW_FLOAT32)
def test_optimizers_agree_over_backends_and_resume_to_the_bit(dtype):
    problem = Regression(seed=51, width=37)
    gradients = [problem.gradients(problem.start, step) for step in range(24)]

    def make(backend):
        params = problem.parameters()
        return params, MicroAdam(
            params, lr=0.05, num_grads=5, density=0.1, block_size=64, error_dtype=dtype, backend=backend
        )

    def run(params, optimizer, steps):
        for gradient in steps:
            set_gradients(params, gradient)
            optimizer.step()

    (params, optimizer), (others, other) = make("numba"), make("reference")
    run(params, optimizer, gradients)
    torch.manual_seed(0)  # nothing comes from the global generator
    run(others, other, gradients[:11])
    resumed, third = make("numba")
    for param, value in zip(resumed, others, strict=True):
        param.data.copy_(value)
    third.load_state_dict(through_a_file(other.state_dict()))
    assert third.param_groups[0]["error_dtype"] == str(dtype).removeprefix("torch.")
    run(resumed, third, gradients[11:])
    for one, two in zip(optimizer.state.values(), third.state.values(), strict=True):
        assert_same(one, two)
    assert (flat(params) - flat(resumed)).norm() < 1e-5 * (flat(params) - flat(problem.start)).norm()
    assert any(state["error"].any() for state in third.state.values())


@pytest.mark.parametrize(
    ("dtype", "announced"),
    [(torch.float32, 4 * 1006), (torch.bfloat16, 2 * 1006), (torch.int8, 1006 + 4 * 17), (torch.uint4, 504 + 4 * 17)],
    ids=str,
)
def test_bytes_of_the_error(dtype, announced):
    """A scalar, an odd vector and a matrix: 1 + 5 + 1000 entries in 1 + 1 + 16 buckets, less one that is empty."""
    shapes = [(), (5,), (40, 25), (0, 3)]
    buckets = sum(-(-math.prod(shape) // 64) for shape in shapes)
    assert (sum(math.prod(shape) for shape in shapes), buckets) == (1006, 18)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    estimate = estimate_memory(params, MicroAdam, error_dtype=dtype)
    optimizer = MicroAdam(params, error_dtype=dtype)
    set_gradients(params, [torch.ones_like(param) for param in params])
    optimizer.step()
    assert optimizer.memory() == estimate
    assert estimate["error"] == announced + (4 if dtype in QUANTISED else 0)


@pytest.mark.parametrize("block_size", [1, 63, 300, 4096, 65535])
def test_slabs_of_a_row_cover_it_once(block_size):
    """Cut between groups of blocks that share a scale, and between buckets; the tail goes with the last full blocks."""
    window = TopK(0.01, block_size, torch.int8).window(3)
    for numel in (1, 64, block_size, 3 * block_size + 1, 5_000_001):
        shape = torch.Size([numel])
        state = window.allocate(shape, "meta")
        rows, at, entries = window.row(state, shape, 1), 0, [0, 0, 0]
        for slab, parts in window.slabs(rows, shape):
            assert slab.start == at
            assert slab.start % 64 == 0
            inside = 0
            for piece, *tensors in parts:
                assert piece.start == inside
                inside += piece.numel
                assert [tensor.shape[0] for tensor in tensors] == [piece.blocks, piece.blocks, piece.groups]
                entries = [count + tensor.numel() for count, tensor in zip(entries, tensors, strict=True)]
            at += inside
            assert slab.stop == at
            assert inside < 5_000_000
        assert at == numel
        assert entries == [sum(part[i].numel() for part in rows) for i in (1, 2, 3)]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {id(arg) for arg in args} if function._schema.is_mutable or function.is_view else set()
        if isinstance(out, torch.Tensor) and id(out) not in known and not function.is_view:
            self.found = max(self.found, out.nbytes)
        return out


@pytest.mark.parametrize("dtype", BELOW_FLOAT32)
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_no_temporary_is_as_large_as_the_parameter(dtype, backend):
    numel = 6_000_012
    param = torch.nn.Parameter(torch.zeros(numel))
    optimizer = SparseMFAC([param], num_grads=2, value_dtype=torch.int8, error_dtype=dtype, backend=backend)
    param.grad = torch.linspace(-1, 1, numel).view_as(param)
    optimizer.step()
    with Largest() as largest:
        optimizer.step()
    assert 0 < largest.found <= 2**23 < 4 * numel


def test_every_optimizer_may_keep_its_error_in_4_bits():
    """Also M-FAC, and with parameters below float32: the error is none of their business."""
    problem = Regression(seed=52, width=30, scale=0.3)
    params = problem.parameters(torch.bfloat16)
    optimizer = SparseMFAC(params, 0.02, num_grads=10, density=0.2, block_size=64, damp=1e-3, error_dtype=torch.uint4)
    train(params, optimizer, problem, 60)
    before = sum(problem.loss(problem.start, step).item() for step in range(64))
    assert sum(problem.loss(params, step).item() for step in range(64)) < 0.7 * before
    assert {state["error"].dtype for state in optimizer.state.values()} == {torch.uint8}
    assert {state["error_scale"].dtype for state in optimizer.state.values()} == {torch.float32}
    ggt = SparseGGT([torch.nn.Parameter(torch.ones(640))], block_size=64, error_dtype=torch.uint4)
    set_gradients(ggt.param_groups[0]["params"], [torch.linspace(-1, 1, 640)])
    ggt.step()
    assert ggt.memory()["error"] == 320 + 4 * 10
    assert ggt.memory()["values"] == 16 * 10 * 2


def test_a_checkpoint_with_another_error_is_refused():
    problem = Regression(seed=11, width=30)
    params = problem.parameters()
    optimizer = build("microadam", params)
    train(params, optimizer, problem, 3)
    good = optimizer.state_dict()
    message = "made with error_dtype=uint4, this optimizer has error_dtype=int8"
    refuse(build("microadam", problem.parameters(), error_dtype=torch.int8), good, message)
    state = dict(good["state"][1], error_scale=good["state"][1]["error_scale"].bfloat16())
    spoilt = {**good, "state": {**good["state"], 1: state}}
    refuse(build("microadam", problem.parameters()), spoilt, r"error_scale is torch.bfloat16 .*expected torch.float32")


def test_unknown_dtypes_are_refused():
    for dtype in (torch.float16, torch.uint8, torch.float64):
        with pytest.raises(ValueError, match=f"must be one of torch.float32, torch.bfloat16, .*uint4, got {dtype}"):
            MicroAdam([torch.nn.Parameter(torch.zeros(3))], error_dtype=dtype)
