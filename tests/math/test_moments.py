"""How AdamW's moments are kept."""

import math

import pytest
import torch
from problems import Regression, distance, set_gradients
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp import (
    DenseMFAC,
    LowRankMFAC,
    SparseGGT,
    estimate_memory,
)
from hf_efcp.kernels import BUCKET, WHITENED, numba, reference

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(numba, id="numba")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernels_are_adamws_formulas(backend):
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(1000, generator=generator).square()
    x = torch.randn(1000, generator=generator)
    v[::7] = 0.0
    v[1], v[2], x[2] = 1e-38, 1e-38, 1e30
    out = torch.full_like(x, math.nan)
    backend.whiten(x, v, 3.0, 1.5, 1e-8, out)
    expected = (3.0 * x.double() / (1.5 * v.double().sqrt() + 1e-8).sqrt()).clamp(-WHITENED, WHITENED)
    expected[v == 0] = 0.0
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0.0)
    assert out[2] == WHITENED
    backend.whiten(x, v, 3.0, 1.5, 1e-8, x)  # in place
    assert torch.equal(x, out)
    moments, gradient = v.clone(), torch.randn(1000, generator=generator)
    gradient[5] = 1e30
    backend.observe(moments, gradient, 0.9)
    expected = (0.9 * v.double() + 0.1 * gradient.double().square()).clamp(max=torch.finfo(torch.float32).max)
    torch.testing.assert_close(moments.double(), expected, rtol=1e-6, atol=0.0)
    assert torch.isfinite(moments).all()


def levels(numel, seed=0):
    """Roots of a second moment in levels: scales of very different size, and buckets of zeros."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(-(-numel // BUCKET), generator=generator).exp2() * 1e-3
    scale[1::5] = 0.0
    return torch.randint(0, 128, (numel,), dtype=torch.int8, generator=generator), scale


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 5000, 300_001])
def test_levels_are_observed_and_whitened_in_one_pass(numel):
    """As `dequantize`, `observe`, `quantize` and `whiten` one after the other; and numba's bits are the reference's."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator) ** 6
    gradient[::7] = 0.0
    gradient[-1] = 1e15
    found = []
    for backend in (reference, numba):
        roots, scale = levels(numel)
        out = torch.ones(numel)
        for step in range(3):
            backend.observe_levels(roots, scale, gradient, 0.999, 123 + step, 640, 1.7, 1e-8, out)
        found.append((roots, scale, out))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

    roots, scale = levels(numel)
    v, expected = torch.empty(numel), torch.ones(numel)
    for step in range(3):
        reference.dequantize(roots, scale, v)
        v.square_()
        reference.observe(v, gradient, 0.999)
        reference.quantize(v.sqrt(), roots, scale, 123 + step, 640)
        reference.dequantize(roots, scale, v)
        whitened = torch.empty(numel)
        reference.whiten(gradient, v.square(), 1.0, 1.7, 1e-8, whitened)
        expected += whitened
    away = (found[0][0] - roots).abs()  # the last bit of a root decides a level in a few of a million
    assert away.max() <= 1
    assert away.sum() <= numel / 10_000
    same = away == 0
    torch.testing.assert_close(found[0][2][same], expected[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "stop"), [(0, 5000), (64, 65), (1, 63), (100, 4900), (4999, 5000)])
def test_a_span_of_levels_is_whitened_from_anywhere(start, stop):
    roots, scale = levels(5000)
    x = torch.randn(stop - start, generator=torch.Generator().manual_seed(2))
    v = torch.empty(5000)
    reference.dequantize(roots, scale, v)
    expected = torch.empty_like(x)
    reference.whiten(x, v[start:stop].square(), 3.0, 1.3, 1e-8, expected)
    found = [x.clone() for _ in range(2)]
    for backend, own in zip((reference, numba), found, strict=True):
        backend.whiten_levels(own, roots, scale, start, 3.0, 1.3, 1e-8)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0.0)
    assert torch.equal(found[0] == 0.0, v[start:stop] == 0.0)


@pytest.mark.parametrize("metric", ["adam", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("cls", [DenseMFAC, SparseGGT, LowRankMFAC])
def test_what_never_had_a_gradient_does_not_move(cls, dtype, metric):
    """Rows of an embedding that no batch has seen: their second moment is zero, and nothing is divided by it."""
    param = torch.nn.Parameter(torch.ones(20, 8))
    whole = {"density": 1.0} if cls is SparseGGT else {}
    optimizer = cls([param], 0.1, num_grads=3, metric=metric, metric_dtype=dtype, **whole)
    for step in range(6):
        gradient = torch.zeros(20, 8)
        if step:  # all of it is zero at first
            gradient[:5] = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        set_gradients([param], [gradient])
        optimizer.step()
    assert torch.isfinite(param).all()
    assert torch.equal(param[5:], torch.ones(15, 8))
    assert (param[:5] != 1).all()


@pytest.mark.parametrize(
    ("kept", "low", "high"),
    [
        (dict(metric_dtype=torch.bfloat16), 1e-6, 0.01),
        (dict(metric_dtype=torch.int8), 1e-4, 0.05),
        (dict(momentum_dtype=torch.bfloat16), 1e-6, 0.02),
    ],
)
def test_fewer_bits_change_little(kept, low, high):
    """Against float32 on the same gradients, by the distance moved; the noise is small, and is there."""
    problem = Regression(seed=61, width=60)
    ends = []
    for changes in ({}, kept):
        params = problem.parameters()
        optimizer = DenseMFAC(
                params, 1e-2, num_grads=8, relative_damp=1.0, precondition="momentum",
                **{"momentum_dtype": torch.float32, "metric_dtype": torch.float32, **changes},
            )  # fmt: skip
        for step in range(40):
            set_gradients(params, problem.gradients(problem.start, step))
            optimizer.step()
        ends.append(params)
    error, moved = distance(ends[1], ends[0], problem.start)
    assert moved > 0.05
    assert low < error < high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_moments_in_few_bits_are_right_on_average(dtype):
    """10,000 entries with the same gradients: rounding is unbiased, so that a small change is not lost for ever."""
    param = torch.nn.Parameter(torch.zeros(10_000))
    optimizer = DenseMFAC([param], 1e-3, num_grads=2, metric_dtype=dtype)
    exact = 0.0
    for step in range(400):
        size = 1.0 if step == 0 else 0.99
        set_gradients([param], [torch.full((10_000,), size)])
        optimizer.step()
        exact = 0.999 * exact + 0.001 * size**2
    stored = optimizer.state[param]["second_moment"].float()
    if dtype == torch.int8:
        stored = (
            (
                stored.view(-1, 1)
                * optimizer.state[param]["second_moment_scale"].float().repeat_interleave(64)[:10_000, None]
            )
            .view(-1)
            .square()
        )
    assert stored.mean().item() == pytest.approx(exact, rel=0.02)


def test_the_metric_of_a_model_in_bytes():
    """A third of AdamW's 8 bytes a parameter at the defaults, a fifth when lean, and less with its moments."""
    config = BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536, num_attention_heads=12)
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    plan = estimate_memory(model)
    assert 2.4 < plan["total"] / plan.parameters < 2.7
    assert plan["metric"] == plan["error"] == pytest.approx(17 / 16 * plan.parameters, rel=1e-3)
    assert plan["momentum"] == 0
    lean = estimate_memory(model, metric="factored")
    assert lean["total"] / plan.parameters < 1.6
    assert lean["metric"] < 0.06 * plan["metric"]
    moments = estimate_memory(model, metric_dtype=torch.float32, precondition="momentum")
    assert moments["total"] / plan.parameters < 8.0
    assert (moments["metric"], moments["momentum"]) == (4 * plan.parameters, 2 * plan.parameters)


def test_what_levels_of_the_second_moment_cannot_tell_apart():
    """Among 64 neighbours, one with gradients of 1, and AdamW moves all alike: docs/memory.md says what int8 does."""
    moved = {}
    for ratio in (1e-2, 1e-3, 1e-5):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            param = torch.nn.Parameter(torch.zeros(8, 64))
            optimizer = LowRankMFAC([param], 1e-3, relative_damp=1e30, metric_dtype=dtype)
            gradient = torch.full((8, 64), ratio)
            gradient[:, 0] = 1.0
            for _ in range(300):
                set_gradients([param], [gradient])
                optimizer.step()
            moved[ratio, dtype] = float(-param.detach()[:, 1:].mean()) / 0.3
    for dtype in (torch.float32, torch.bfloat16):
        assert all(moved[ratio, dtype] > 0.95 for ratio in (1e-2, 1e-3, 1e-5))
    assert moved[1e-2, torch.int8] > 0.95
    assert moved[1e-3, torch.int8] < 0.15
    assert moved[1e-5, torch.int8] < 0.01
