"""What a step makes besides its state: copies of tensors that are not contiguous, partial sums of wide matrices."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import flat
from torch.profiler import ProfilerActivity, profile
from variants import build, names

from hf_efcp import LowRankMFAC, MicroAdam, SparseMFAC, error_feedback
from hf_efcp.compressors import Job, LowRank, base, lowrank, matrices, topk
from hf_efcp.kernels import reference

SIDE = 256
WHOLE = 4 * SIDE**2  # bytes of a parameter in float32, which has 16 slabs
SPARSE = dict(num_grads=2, density=0.1, block_size=64)


@pytest.fixture
def small_pieces(monkeypatch):
    """Many slabs, batches and spans without many entries."""
    monkeypatch.setattr(topk, "_SLAB", 1 << 12)
    monkeypatch.setattr(error_feedback, "_MADE", 1 << 13)
    monkeypatch.setattr(base, "_SPAN", 1 << 12)


@pytest.fixture
def one_thread():
    """torch's profiler sees the memory of the thread that starts it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def allocations(work, folder):
    """Bytes that torch takes, and gives back as negative numbers, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    assert events
    return [event["args"]["Bytes"] for event in events]


def peak(found):
    """Most bytes that were taken at a time."""
    return torch.tensor(found).cumsum(0).max().item()


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize(
    ("cls", "settings", "copies"),
    [
        (SparseMFAC, dict(metric="none", **SPARSE), 1),
        (SparseMFAC, dict(metric="none", weight_decay=0.1, decoupled_weight_decay=False, **SPARSE), 2),
        (SparseMFAC, dict(error_dtype=torch.bfloat16, **SPARSE), 1),
        (MicroAdam, SPARSE, 1),
    ],
)
def test_what_is_not_contiguous_is_copied_once_for_all_slabs(
    cls, settings, copies, backend, small_pieces, one_thread, tmp_path
):
    """Of three parameters only one has copies at a time; of a contiguous one there is none.

    The parameter itself is copied for the update in any case, for all parameters together.
    """

    def taken(turned):
        starts = [torch.zeros(SIDE, SIDE) for _ in range(3)]
        params = [torch.nn.Parameter(start.T if turned else start) for start in starts]
        optimizer = cls(params, lr=0.1, backend=backend, nonfinite="ignore", **settings)
        for param in params:
            param.grad = torch.linspace(-1, 1, SIDE**2).view(SIDE, SIDE)
            param.grad = param.grad.T if turned else param.grad
        optimizer.step()
        return allocations(optimizer.step, tmp_path)

    plain, found = taken(turned=False), taken(turned=True)
    assert plain.count(WHOLE) == 0
    assert found.count(WHOLE) == 3 * (copies + 1)
    update = [place for place, size in enumerate(found) if size == WHOLE][3 * copies]
    assert peak(found[:update]) <= copies * WHOLE + peak(plain)


@pytest.mark.parametrize("name", names())
def test_slabs_of_what_is_not_contiguous_step_as_those_of_contiguous_copies(name, small_pieces):
    """To the bit, where every parameter has several slabs and spans."""
    generator = torch.Generator().manual_seed(3)
    plain, odd = [], []
    for shape in ((110, 150), (40, 12, 6, 6), (4500,)):
        plain.append(torch.nn.Parameter(torch.randn(shape, generator=generator)))
        odd.append(torch.nn.Parameter(strided(plain[-1].detach())))
    before = flat(plain).clone()
    settings = dict(lr=1.0, weight_decay=0.3, decoupled_weight_decay=False)
    optimizers = [build(name, params, **settings) for params in (odd, plain)]
    for _ in range(3):
        for param, twin in zip(odd, plain, strict=True):
            twin.grad = torch.randn(twin.shape, generator=generator)
            param.grad = strided(twin.grad)
            assert not param.is_contiguous()
            assert not param.grad.is_contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert (flat(plain) - before).norm() > 1e-2
    assert torch.equal(flat(odd) - before, flat(plain) - before)


def strided(tensor):
    """The same, not contiguous."""
    if tensor.dim() == 1:
        return torch.stack((tensor, tensor), dim=1)[:, 0]
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def compressed(A, rank, folder=None):
    """A job's error and factors; with a folder also the most bytes that it took."""
    shape, compressor = A.shape, LowRank(rank, torch.float32)
    window = compressor.window(1)
    state = window.allocate(shape, "cpu") | compressor.allocate(shape, "cpu", 0)
    job = Job(None, A.clone(), window.row(state, shape, 0), state)
    if folder is None:
        compressor.compress([job], reference)
        return job.error, state["left"][0], state["right"][0]
    return peak(allocations(lambda: compressor.compress([job], reference), folder))


@pytest.mark.parametrize(("rows", "cols", "rank"), [(32, 4096, 8), (4096, 512, 16), (300, 1500, 5), (40, 5000, 30)])
def test_low_rank_rows_need_a_few_times_their_factors_and_a_part_of_the_matrix(
    rows, cols, rank, monkeypatch, one_thread, tmp_path
):
    """Not the rank times the matrix, as sums over tiles of whole rows would."""
    monkeypatch.setattr(lowrank, "_TILE", 1 << 12)
    monkeypatch.setattr(matrices, "_SLAB", 1 << 12)
    A = torch.randn(rows, cols, generator=torch.Generator().manual_seed(4))
    limit = A.nbytes // 8 + 6 * 4 * rank * (rows + cols)
    assert 4 * (rows * cols // 4096) * rank * cols > 2 * limit
    assert compressed(A, rank, tmp_path) <= limit


@pytest.mark.parametrize(("rows", "cols", "rank"), [(32, 4096, 8), (4096, 512, 16), (300, 1500, 5)])
def test_tiles_change_low_rank_rows_by_rounding_alone_and_threads_not_at_all(rows, cols, rank, monkeypatch):
    A = torch.randn(rows, cols, generator=torch.Generator().manual_seed(5))
    whole = compressed(A, rank)
    monkeypatch.setattr(lowrank, "_TILE", 1 << 12)
    monkeypatch.setattr(matrices, "_SLAB", 1 << 12)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(compressed(A, rank))
    finally:
        torch.set_num_threads(threads)
    for one, other, third, expected in zip(*found, whole, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
        assert (one - expected).norm() < 1e-5 * expected.norm()
    error, left, right = (tensor.double() for tensor in found[0])
    assert (right - left @ A.double()).norm() < 1e-6 * right.norm()  # Q = A^T P
    assert (error - (A.double() - left.T @ right)).norm() < 1e-6 * A.norm()


@given(st.integers(2, 1 << 18), st.integers(2, 1 << 18), st.integers(1, 4096))
def test_partial_sums_are_an_eighth_of_the_matrix_and_one_result_more(rows, cols, rank):
    if matrices.matrix(torch.Size((rows, cols)), rank) is None:
        return
    height, width = matrices.tiles(rows, cols, rank, 1 << 17)
    assert 1 <= height <= max(rows, (1 << 17) // cols)
    assert 1 <= width <= cols
    assert -(-rows // height) * rank * cols <= max(1 << 20, rows * cols // 8 + rank * cols)
    assert width == cols or height * width <= max(1 << 17, 256 * height)


@pytest.mark.parametrize(
    "shape", [(4096, 4096, 4), (50257, 768, 4), (30522, 768, 16), (64, 16384, 4), (11008, 4096, 4)]
)
def test_tiles_are_whole_rows_where_their_sums_are_small(shape):
    """As they have always been, so that the bits of runs go on."""
    rows, cols, rank = shape
    assert matrices.tiles(rows, cols, rank, 1 << 17) == ((1 << 17) // cols, cols)


def test_a_wide_matrix_steps_within_its_own_size(one_thread, tmp_path):
    """Rank 16 of a matrix of a few rows and 2^17 columns, whose tiles once were single rows."""
    param = torch.nn.Parameter(torch.zeros(64, 1 << 17))
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(6))
    optimizer = LowRankMFAC([param], lr=0.1, rank=16, num_grads=1, metric="none", error_dtype=torch.float32)
    optimizer.step()
    assert peak(allocations(optimizer.step, tmp_path)) < 2 * 4 * param.numel()
