"""Which kernels are taken, how a parameter is cut for them, and what becomes of them on disk."""

import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, python
from variants import build, sparse_names

from hf_efcp import kernels
from hf_efcp.blocks import cut


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_sums_survive_cancellation(backend):
    """Coefficients of 1e9 that cancel to 1: float32 accumulation would leave nothing."""
    indices = torch.arange(5).to(torch.uint8).view(1, 1, 5).repeat(1, 3, 1)
    values = torch.tensor([1.0, 2.0, 3.0, 0.1, -7.0]).view(1, 1, 5).repeat(1, 3, 1)
    out = torch.empty(1, 5)
    backend.combine(indices, values, torch.tensor([1e9, -1e9 - 1, 2.0], dtype=torch.float64), out)
    torch.testing.assert_close(out, values[:, 0], rtol=1e-6, atol=0.0)


@given(st.integers(0, 20000), st.integers(1, 5000), st.floats(1e-4, 1.0))
def test_pieces_cover_a_parameter_once(numel, block_size, density):
    pieces = cut(numel, block_size, density)
    assert sum(piece.numel for piece in pieces) == numel
    assert [piece.start for piece in pieces] == [0, pieces[0].numel][: len(pieces)] if pieces else True
    for piece in pieces:
        assert piece.kept == math.ceil(Fraction(repr(density)) * piece.length)
        assert 1 <= piece.kept <= piece.length <= block_size
        assert piece.offset == sum(before.row for before in pieces if before.start < piece.start)


@pytest.mark.parametrize(
    ("density", "length", "kept"), [(0.07, 100, 7), (0.29, 100, 29), (0.01, 4096, 41), (1e-9, 5, 1)]
)
def test_what_is_kept_is_that_of_the_decimal_number(density, length, kept):
    """0.07 * 100 is a hair more than 7 in floating point, and its ceiling was 8."""
    assert cut(length, length, density)[0].kept == kept


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, numba, triton, got 'metal'"):
        kernels.choose("metal", torch.device("cpu"))


@pytest.mark.parametrize("name", sparse_names())
def test_the_backend_can_be_asked_for(name):
    params = [torch.nn.Parameter(torch.zeros(3))]
    assert build(name, params).backend == "numba"
    assert build(name, params, backend="reference").backend == "reference"
    meta = [torch.nn.Parameter(torch.zeros(3, device="meta"))]
    assert build(name, meta).backend == "reference"
    with pytest.raises(ValueError, match='backend="numba" runs on the CPU, but the parameters are on meta'):
        _ = build(name, meta, backend="numba").backend
    with pytest.raises(ValueError, match="backend must be one of auto, reference, numba, triton, got 'cuda'"):
        build(name, params, backend="cuda")


def test_what_was_compiled_is_used_again_unless_any_file_has_changed(tmp_path):
    """The weights of rows are multiplied in a file, and that factor is a helper's of another."""
    shutil.copytree(
        Path(kernels.__file__).parents[1], tmp_path / "hf_efcp", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from hf_efcp.kernels import numba
        from hf_efcp.kernels.numba.products import _project
        indices, values = torch.zeros(1, 1, 1, dtype=torch.uint8), torch.ones(1, 1, 1, dtype=torch.int8)
        scales = torch.full((1, 1), 3.0, dtype=torch.bfloat16)
        products = numba.project(indices, values, torch.ones(1, 5), 1, scales)
        print(*products.tolist(), sum(_project.stats.cache_hits.values()))
        """
    here = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run():
        done = python(code, here)
        assert not done.stderr
        return done.stdout.split()

    assert [run(), run()] == [["3.0", "0"], ["3.0", "1"]]
    helper = tmp_path / "hf_efcp" / "kernels" / "numba" / "arrays.py"
    text = helper.read_text(encoding="utf-8")
    assert text.count("* factor") == 1
    helper.write_text(text.replace("* factor", "* factor * 2.0"), encoding="utf-8")
    assert [run(), run()] == [["6.0", "0"], ["6.0", "1"]]


def test_missing_numba_falls_back_with_one_warning():
    done = python("""
        import sys, warnings
        sys.modules["numba"] = None  # as if it were not installed
        import torch
        from hf_efcp import SparseMFAC
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                param = torch.nn.Parameter(torch.zeros(10))
                param.grad = torch.ones(10)
                optimizer = SparseMFAC([param])
                optimizer.step()
                optimizer.step()
                assert param.abs().min() > 0 or param.abs().max() > 0
                assert optimizer.backend == "reference"
        print([str(w.message) for w in caught])
        try:
            SparseMFAC([param], backend="numba").step()
        except ImportError as error:
            print("refused:", error)
    """)
    assert done.returncode == 0, done.stderr
    warned, refused = done.stdout.splitlines()
    assert warned.count("the numba kernels could not be imported") == 1
    assert 'refused: backend="numba" could not be loaded' in refused
    assert "pip install numba" in refused


def test_kernels_that_cannot_be_built_fall_back_with_a_warning():
    """As with a numba that has lost what they are built with."""
    done = python("""
        import warnings
        import numba.extending
        del numba.extending.intrinsic
        import torch
        from hf_efcp import SparseMFAC
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = SparseMFAC([torch.nn.Parameter(torch.zeros(10))])
            print(optimizer.backend)
        print([str(w.message) for w in caught])
        try:
            SparseMFAC([torch.nn.Parameter(torch.zeros(10))], backend="numba").backend
        except ImportError as error:
            print("refused:", error)
    """)
    assert done.returncode == 0, done.stderr
    backend, warned, refused = done.stdout.splitlines()
    assert backend == "reference"
    assert warned.count("the numba kernels could not be imported (ImportError: cannot import name") == 1
    assert 'refused: backend="numba" could not be loaded' in refused


def test_an_unwritable_cache_is_no_error():
    done = python("""
        from numba.core import caching
        caching.CacheImpl._locator_classes = []  # what numba finds when no directory can be written to
        import torch
        from hf_efcp import SparseMFAC
        param = torch.nn.Parameter(torch.zeros(10))
        param.grad = torch.ones(10)
        optimizer = SparseMFAC([param], lr=1.0, metric="none")
        optimizer.step()
        print(optimizer.backend, int((param != 0).sum()))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["numba", "1"]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    numel=st.integers(1, 600), first=st.floats(0, 1), last=st.floats(0, 1), seed=st.integers(0, 9),
    momentum=st.sampled_from([None, 0.0, 0.9]), keep=st.sampled_from([1.0, 0.99, 0.0]),
)  # fmt: skip
def test_a_span_of_a_parameter_moves_alike_and_nothing_else_does(numel, first, last, momentum, keep, seed):
    """`v <- momentum v + u`, `theta <- keep theta - lr v`."""
    begin, end = sorted((int(first * numel), max(1, int(last * numel))))
    generator = torch.Generator().manual_seed(seed)
    theta, update, velocity = (torch.randn(numel, generator=generator) for _ in range(3))
    v = update.double() if momentum is None else momentum * velocity.double() + update.double()
    expected = keep * theta.double() - 0.5 * v
    for backend in BACKENDS:
        ours, speed = theta.clone(), velocity.clone()
        backend.apply(
            ours[begin:end], update[begin:end].clone(), lr=0.5, keep=keep,
            velocity=None if momentum is None else speed[begin:end], momentum=momentum or 0.0,
        )  # fmt: skip
        torch.testing.assert_close(ours[begin:end].double(), expected[begin:end], rtol=1e-5, atol=1e-6)
        assert torch.equal(ours[:begin], theta[:begin])
        assert torch.equal(ours[end:], theta[end:])
        if momentum is not None:
            torch.testing.assert_close(speed[begin:end].double(), v[begin:end], rtol=1e-5, atol=1e-6)
        assert torch.equal(speed[:begin], velocity[:begin])
