"""Where kernels read and write in tensors too large to be computed here: only the last programs of a launch are run."""

import warnings

import numpy as np
import pytest
import torch
from rig import Model, place_scratch, row, settings, sparse_rows

from hf_efcp import LowRankMFAC, SparseMFAC, described, noise
from hf_efcp.compressors import SparseWindow
from hf_efcp.errors import UINT4
from hf_efcp.kernels import reference

CPU, GUARD = torch.device("cpu"), 123.0
VOCABULARY, WIDTH, BLOCK = 50257, 768, 4096  # GPT-2's embedding: 2^25 entries and more, and a tail of 768


def untouched(shape, dtype):
    """Zeros that take memory where they are written."""
    numel = torch.Size(shape).numel()
    return torch.from_numpy(np.zeros(numel * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@pytest.mark.parametrize("error_dtype", [torch.int8, UINT4])
def test_top_k_of_the_last_blocks_of_a_large_matrix(error_dtype):
    numel, capacity, newest = VOCABULARY * WIDTH, 6000, 5999  # more than 2^31 entries in the window
    begin, key = numel - numel % BLOCK, noise.key(5, 0)
    gradient = untouched((numel,), torch.float32)
    gradient[begin - BLOCK :] = torch.randn(BLOCK + numel - begin, generator=torch.Generator().manual_seed(0))
    window = SparseWindow(capacity, 0.01, BLOCK, torch.bfloat16)
    empty = window.allocate(gradient.shape, torch.device("meta"))
    state = {name: untouched(tensor.shape, tensor.dtype) for name, tensor in empty.items()}

    # What lies behind the scales, and behind the error, is not to be written: not even far behind.
    buckets, stored = -(-numel // 64), numel if error_dtype == torch.int8 else -(-numel // 2)
    scales, errors = untouched((numel + 200,), torch.float32), untouched((40 * numel,), torch.uint8)
    scales[buckets:] = GUARD
    error = errors[:stored].view(torch.int8 if error_dtype == torch.int8 else torch.uint8)
    rows = sparse_rows(gradient, {"error": error, "error_scale": scales[:buckets]}, state, window, key, newest)
    model = Model(CPU)
    model.begin(rows, 1)
    model._plans["groups"] = torch.tensor([[0, numel // BLOCK - 1], [1, 0]])
    model.push_top_k(rows, settings(stored=error_dtype, values=torch.bfloat16, block_size=BLOCK, capacity=capacity))
    assert (scales[buckets:] == GUARD).all()
    assert not errors[32 * numel :].any()
    assert not errors[stored : stored + 4096].any()

    written = window.row(state, gradient.shape, newest)
    for part, start, end in ((written[0], begin - BLOCK, begin), (written[1], begin, numel)):
        accumulator = torch.zeros(1, end - start)
        own = SparseWindow(1, 0.01, BLOCK, torch.bfloat16)
        expected = own.allocate(accumulator[0].shape, CPU)
        (line,) = own.row(expected, accumulator[0].shape, 0)
        reference.accumulate_topk([gradient[None, start:end]], [accumulator], [line])
        assert torch.equal(part.values[-1], line.values[0])
        assert torch.equal(part.indices[-1].view(torch.int16), line.indices[0].view(torch.int16))
        halved = 1 if error_dtype == torch.int8 else 2
        kept, unit = torch.zeros((end - start) // halved, dtype=error.dtype), torch.zeros((end - start) // 64)
        reference.quantize(accumulator[0], kept, unit, key, start)
        assert torch.equal(error[start // halved : end // halved], kept)
        assert torch.equal(scales[start // 64 : end // 64], unit)


def test_the_end_of_a_long_vector_that_is_kept_whole():
    numel, newest = 2**30 + 1989, 2  # the last row begins beyond 2^31 entries
    gradient = untouched((numel,), torch.bfloat16)
    begin = numel - numel % 2048  # of the last program
    gradient[begin:] = torch.randn(numel % 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values = untouched((3, numel), torch.bfloat16)
    error, scale = untouched((numel,), torch.int8), untouched((-(-numel // 64),), torch.float32)
    places = {"values": values, "error": error, "error_scale": scale}
    rows = [row(gradient, places, theta=untouched((numel,), torch.bfloat16), newest=newest, lr=1.0)]
    place_scratch(rows, 1)
    model, compiled = Model(CPU), settings(stored=torch.int8, values=torch.bfloat16, rank=1)
    model.begin(rows, 1)
    model._plans["buckets"] = torch.tensor([[0, begin // 64]])
    model.push_low_rank(rows, compiled)
    assert torch.equal(values[newest, begin:], gradient[begin:])
    assert not values[:newest, begin:].any()
    assert not values[newest, begin - 4096 : begin].any()
    model._plans["tiles"] = torch.tensor([[0, 0, begin]])
    model.move_low_rank(rows, compiled, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64))
    assert torch.equal(rows[0].theta[begin:], -gradient[begin:])
    assert not rows[0].theta[begin - 4096 : begin].any()


def test_what_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(described, "_LONGEST", 32 * 40)
    for cls, shape, reason in (
        (SparseMFAC, (1279,), None),
        (SparseMFAC, (1280,), "a parameter of 1280 entries or more"),
        (LowRankMFAC, (39, 20), None),
        (LowRankMFAC, (40, 20), "a matrix with a side of 40 or more"),
        (LowRankMFAC, (20, 40), "a matrix with a side of 40 or more"),
        (LowRankMFAC, (50,), None),
    ):
        param = torch.nn.Parameter(torch.zeros(shape))
        optimizer = cls([param], backend="triton")
        param.grad = torch.ones(shape)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
        assert [reason in str(warning.message) for warning in seen] == [True] * (reason is not None)
