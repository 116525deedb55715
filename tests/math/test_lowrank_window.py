"""The window of low-rank rows, against dense rows."""

import threading

import pytest
import torch
from lowrank_cases import SHAPES, dense_rows, random_window
from papers import LowRankMFAC
from problems import set_gradients
from states import assert_same

from hf_efcp import EFCP
from hf_efcp.compressors import LowRank, base, lowrank, matrices
from hf_efcp.kernels import pool, reference
from hf_efcp.preconditioners import AdaGradSum, AdamMoments


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_the_window_equals_dense_rows(shape, rows, value_dtype, monkeypatch):
    """In pieces of a few entries, so that every sum is cut."""
    for module, name, size in (
        (matrices, "_SLAB", 70),
        (lowrank, "_FACTORS", 3),
        (lowrank, "_TILE_FACTORS", 4),
        (base, "_SPAN", 100),
    ):
        monkeypatch.setattr(module, name, size)
    check_window(shape, 8, 2, rows, value_dtype)


def test_the_window_equals_dense_rows_at_full_size():
    """More rows, columns and factors than a tile has."""
    check_window((1100, 1000), 10, 210, 9, torch.bfloat16)


def check_window(shape, capacity, rank, rows, value_dtype):
    window, state = random_window(shape, capacity, rank, value_dtype)
    shape, dense = torch.Size(shape), dense_rows(state)[:rows]
    generator = torch.Generator().manual_seed(9)
    x, c = torch.randn(shape, generator=generator), torch.randn(rows, dtype=torch.float64, generator=generator)
    tight = dict(rtol=1e-12, atol=1e-11 * max(1, shape.numel()))
    (column,) = window.dots([(state, shape)], rows - 1, rows, reference)
    torch.testing.assert_close(column, dense @ dense[-1], **tight)
    spans = window.spans(shape, x.device)
    products = [window.project(state, shape, span, x.view(-1)[span], rows, reference) for span in spans]
    torch.testing.assert_close(
        sum(products, torch.zeros(rows, dtype=torch.float64)), dense @ x.double().view(-1), **tight
    )
    for dense_x, scale in ((None, 0.0), (x, -0.7)):
        expected = c @ dense + (0 if dense_x is None else scale * dense_x.double().view(-1))
        update, end = torch.full((shape.numel(),), torch.nan), 0
        for span in spans:
            own = None if dense_x is None else dense_x.view(-1)[span]
            part = window.combine(state, shape, span, c, reference, base=own, scale=scale)
            assert span.start == end
            assert part.dtype == torch.float32
            update[span], end = part, span.stop
        assert end == shape.numel()
        torch.testing.assert_close(update, expected.float(), rtol=1e-6, atol=1e-6)
    window.clear(state, shape, 0)
    cleared = dense_rows(state)
    assert not cleared[0].any()
    assert torch.equal(cleared[1:rows], dense[1:])


def test_squares_are_refused():
    for shape in ((9,), (30, 20)):
        window, state = random_window(shape, 3, 2)
        c = torch.ones(3, dtype=torch.float64)
        with pytest.raises(TypeError, match="low-rank rows cannot be squared entry by entry.*use TopK or Identity"):
            window.combine(state, torch.Size(shape), slice(0, 9), c, reference, squared=True)
    for rule in (AdamMoments(), AdaGradSum()):
        param = torch.nn.Parameter(torch.zeros(20, 30))
        with pytest.raises(TypeError, match=f"{type(rule).__name__} squares the window's rows entry by entry, and"):
            EFCP([param], 1e-3, compressor=LowRank(), preconditioner=rule, num_grads=3)


@pytest.mark.parametrize("precondition", ["row", "gradient"])
def test_bits_do_not_depend_on_the_number_of_threads(precondition):
    """Many tiles, and afterwards threads, old and new, have the numbers that they had."""
    generator = torch.Generator().manual_seed(10)
    gradients = [torch.randn(900, 700, generator=generator) for _ in range(6)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param = torch.nn.Parameter(torch.zeros(900, 700))
            optimizer = LowRankMFAC([param], num_grads=80, rank=5, precondition=precondition)
            for gradient in gradients:
                set_gradients([param], [gradient])
                optimizer.step()
            results.append((param.detach(), optimizer.state_dict()["state"]))
            seen = []
            thread = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert [torch.get_num_threads(), *seen] == [count, count]
    finally:
        torch.set_num_threads(threads)
    assert results[0][0].any()
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("shape", [(30000, 9), (9, 30000)])
def test_long_sums_have_the_same_bits_on_any_number_of_threads(shape):
    """Products that BLAS would cut along the sum."""
    window, state = random_window(shape, 6, 2)
    x, c = torch.randn(shape, generator=torch.Generator().manual_seed(11)), torch.ones(6, dtype=torch.float64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            held, found = (state, x.shape), [window.dots([(state, x.shape)], 2, 6, reference)]
            for span in window.spans(x.shape, x.device):
                found.append(window.combine(*held, span, c, reference))
                found.append(window.project(*held, span, x.view(-1)[span], 6, reference))
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_failing_piece_of_work_is_reported():
    threads = torch.get_num_threads()

    def work(index, begin, end):
        assert torch.get_num_threads() == 1
        if begin == 6:
            raise ArithmeticError(f"{index} {begin} {end}")

    with pytest.raises(ArithmeticError, match="2 6 8"):
        pool.run_torch(work, 8, 3, torch.device("cpu"))
    assert torch.get_num_threads() == threads
