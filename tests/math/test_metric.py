"""AdamW's metric: AdamW where the matrix is off, explicit matrices where it is on, and how moments are kept."""

import math

import pytest
import torch
from naive import NaiveGGT, NaiveMFAC
from problems import Regression, distance, flat, set_gradients
from test_lowrank import Given, newest
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp import (
    EFCP,
    DenseGGT,
    DenseMFAC,
    LowRankGGT,
    LowRankMFAC,
    MicroAdam,
    SparseAdaGrad,
    SparseGGT,
    SparseMFAC,
    estimate_memory,
)
from hf_efcp.compressors import Identity, LowRank, TopK
from hf_efcp.kernels import BUCKET, WHITENED, numba, reference
from hf_efcp.preconditioners import GGT, MFAC, WindowPosition

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(numba, id="numba")]
EXACT = dict.fromkeys(("error_dtype", "momentum_dtype", "metric_dtype"), torch.float32)
SHAPES = [(40, 30), (30,), (3, 4, 5), ()]


def small(seed=0):
    """Parameters that are not much longer than the way they will go, so that their rounding does not count."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("beta1", [0.0, 0.9], ids=["gradient", "momentum"])
@pytest.mark.parametrize("rule", [MFAC(0.0, 1e30), GGT(0.0, 1e15)], ids=["mfac", "ggt"])
@pytest.mark.parametrize("compressor", [Identity(), LowRank(2), TopK(0.1, 16)], ids=["dense", "lowrank", "sparse"])
def test_with_infinite_damping_it_is_adamw(compressor, rule, beta1, backend, scope):
    """50 steps with weight decay: AdamW for the momentum, RMSprop with AdamW's bias correction for the gradient."""
    ours, theirs = small(), small()
    optimizer = EFCP(
        ours, 1e-3, compressor=compressor, preconditioner=rule, num_grads=7, metric="adam", beta1=beta1, scope=scope,
        precondition="momentum" if beta1 else "gradient", weight_decay=0.1, backend=backend,
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs, 1e-3, betas=(beta1, 0.999), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        gradients = [torch.randn(p.shape, generator=generator) + 20 * p.detach() for p in theirs]
        for params, one in ((ours, optimizer), (theirs, adamw)):
            set_gradients(params, gradients)
            one.step()
    error, moved = distance(ours, theirs, small())
    assert moved > 0.5
    assert error < 1e-6


class GivenMFAC(Given, NaiveMFAC):
    pass


class GivenGGT(Given, NaiveGGT):
    pass


@pytest.mark.parametrize("metric", ["adam", "factored"])
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize(("precondition", "beta1"), [("row", 0.0), ("row", 0.9), ("gradient", 0.0), ("momentum", 0.9)])
@pytest.mark.parametrize(
    ("cls", "naive", "matrix"),
    [
        (DenseMFAC, NaiveMFAC, dict(relative_damp=0.5)),
        (SparseMFAC, NaiveMFAC, dict(damp=0.1)),
        (LowRankMFAC, GivenMFAC, dict(relative_damp=0.2)),
        (DenseGGT, NaiveGGT, dict(eps=0.5, beta2=0.9)),
        (SparseGGT, NaiveGGT, dict(relative_eps=0.3)),
        (LowRankGGT, GivenGGT, dict(relative_eps=0.5, beta2=0.8)),
        (DenseMFAC, NaiveMFAC, dict(trust_lr=0.02)),
        (LowRankGGT, GivenGGT, dict(trust_lr=0.1)),
    ],
)
def test_it_equals_brute_force(cls, naive, matrix, precondition, beta1, scope, metric):
    """Explicit matrices in float64; parameters miss steps; weight decay and heavy ball as well."""
    problem = Regression(seed=60, width=14)
    common = dict(lr=0.05, num_grads=6, momentum=0.3, weight_decay=0.1)
    ours = dict(metric=metric, precondition=precondition, scope=scope, beta1=beta1, **EXACT)
    theirs = dict(metric=metric, layers=scope == "layer", dense_gradient=precondition != "row", moment=beta1)
    if cls in (SparseMFAC, SparseGGT):
        common |= dict(density=0.3, block_size=16, value_dtype=torch.float32)
    elif cls in (LowRankMFAC, LowRankGGT):
        ours |= dict(rank=1, value_dtype=torch.float32)
    if cls in (DenseMFAC, DenseGGT):
        del ours["error_dtype"]
    params = problem.parameters()
    optimizer = cls(params, **common, **matrix, **ours)
    if "trust_lr" in matrix:
        ratio = matrix["trust_lr"] / common["lr"]
        matrix = dict(relative_damp=ratio) if isinstance(optimizer, DenseMFAC) else dict(relative_eps=ratio**0.5)
    brute = naive(problem.start, **common, **matrix, **theirs)
    for step in range(25):
        gradients = problem.gradients(params, step)
        if step % 4 == 1 and scope == "model":  # a layer's window waits for its gradients, a model's does not
            gradients[2] = None
        set_gradients(params, gradients)
        optimizer.step()
        if isinstance(brute, Given):
            brute.step_with(gradients, newest(optimizer, params, step))
        else:
            brute.step(gradients)
    error, moved = distance(params, brute.parameters(), problem.start)
    assert moved > 0.05
    assert error < 2e-5


@pytest.mark.parametrize("rule", [MFAC(0.3), MFAC(0.0, 0.1), GGT(0.2), GGT(0.0, 0.5, beta2=0.7)])
def test_the_function_of_the_spectrum_is_that_of_the_explicit_matrix(rule):
    """`f(G^T G) x`, never longer than `x`, for many matrices at once; of identical rows and of zeros as well."""
    generator = torch.Generator().manual_seed(2)
    windows = torch.randn(5, 6, 30, dtype=torch.float64, generator=generator)
    windows[1] = windows[1, :1]
    windows[2] = 0.0
    x = torch.randn(5, 30, dtype=torch.float64, generator=generator)
    now = WindowPosition(newest=3, rows=6, capacity=6, steps=10)
    grams, products = windows @ windows.mT, (windows @ x[:, :, None]).squeeze(-1)
    c = rule.shorten(grams, products, now)
    weights = rule.beta2 ** now.ages() if isinstance(rule, GGT) else torch.ones(6, dtype=torch.float64)
    for window, gram, one, coefficients in zip(windows, grams, x, c, strict=True):
        spectrum, vectors = torch.linalg.eigh((weights[:, None] * window).T @ (weights[:, None] * window))
        mean = float(gram.diagonal().mean())
        if isinstance(rule, GGT):
            scale = (rule.eps + rule.relative_eps * math.sqrt(mean)) ** 2 or 1.0
            f = (1 + spectrum.clamp(min=0) / scale) ** -0.5
        else:
            f = 1 / (1 + spectrum.clamp(min=0) / (6 * rule.damp + rule.relative_damp * mean or 1.0))
        expected = vectors @ (f * (vectors.T @ one))
        update = one + window.T @ coefficients
        torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)
        assert update.norm() <= one.norm() * (1 + 1e-12)
    assert torch.equal(c[2], torch.zeros(6, dtype=torch.float64))
    alone = torch.cat([rule.shorten(grams[i : i + 1], products[i : i + 1], now) for i in range(5)])
    assert torch.equal(alone, c)


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


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MicroAdam, dict(metric="adam"), "AdamMoments has no matrix that a metric could be for, got metric='adam'"),
        (SparseAdaGrad, dict(metric="adam"), "AdaGradSum has no matrix that a metric could be for"),
        (SparseAdaGrad, dict(precondition="gradient"), "AdaGradSum is made of the window's rows"),
        (MicroAdam, dict(scope="layer"), 'AdamMoments has no matrix, and so none per layer: use scope="model"'),
        (SparseAdaGrad, dict(memory_budget="8B/param"), "SparseAdaGrad keeps one row: leave it out"),
        (LowRankMFAC, dict(precondition="momentum", beta1=0.0), "beta1=0.0 does not go with precondition='momentum'"),
        (LowRankMFAC, dict(precondition="gradient", beta1=0.9), "beta1=0.9 does not go with precondition='gradient'"),
        (LowRankMFAC, dict(beta1=1.0), r"beta1 must be in \[0, 1\), got 1.0"),
        (LowRankMFAC, dict(metric="none", precondition="momentum"), "are AdamW's first moment, which metric=.none"),
        (LowRankMFAC, dict(metric="none", beta1=0.9), "are AdamW's first moment, which metric=.none"),
        (LowRankMFAC, dict(metric="newton"), "metric must be one of 'none', 'adam', 'factored', got 'newton'"),
        (LowRankMFAC, dict(metric_dtype=torch.float16), "metric_dtype must be one of .*int8, got torch.float16"),
        (LowRankMFAC, dict(momentum_dtype=torch.int8), "momentum_dtype must be one of .*bfloat16, got torch.int8"),
        (LowRankMFAC, dict(metric_beta2=1.0), r"metric_beta2 must be in \[0, 1\), got 1.0"),
        (LowRankMFAC, dict(metric_eps=0.0), "metric_eps must be a finite positive number, got 0.0"),
        (LowRankMFAC, dict(damp=0.1, relative_damp=1.0), "damp=0.1 and relative_damp=1.0 all choose the dampening"),
        (LowRankGGT, dict(eps=0.1, relative_eps=1.0), "eps=0.1 and relative_eps=1.0 all choose the dampening"),
        (LowRankMFAC, dict(relative_damp=1.0, trust_lr=1e-3), "relative_damp=1.0 and trust_lr=0.001 all choose the"),
        (LowRankMFAC, dict(metric="none", trust_lr=1e-3), "trust_lr=0.001 is compared with learning rates of AdamW"),
        (DenseGGT, dict(metric="none", trust_lr=1e-3), "trust_lr=0.001 is compared with learning rates of AdamW"),
        (LowRankMFAC, dict(trust_lr=-1.0), "trust_lr must be a finite number of at least 0, got -1.0"),
        (DenseMFAC, dict(damp=0.0), 'precondition="row" with metric="adam" needs dampening, but all of it is 0'),
        (LowRankMFAC, dict(trust_lr=0.0), 'precondition="row" with metric="adam" needs dampening'),
        (
            SparseMFAC,
            dict(relative_damp=0.0, precondition="gradient"),
            'precondition="gradient" with metric="adam" needs',
        ),
        (SparseMFAC, dict(damp=0.0, metric="none", precondition="gradient"), '"gradient" with metric="none" needs dam'),
        (DenseGGT, dict(metric="none", precondition="gradient", beta1=0.5), "beta1=0.5 of GGT is momentum over the"),
        (DenseMFAC, dict(error_dtype=torch.int8), "DenseMFAC compresses nothing, and so keeps no error"),
    ],
)
def test_what_means_nothing_is_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([torch.nn.Parameter(torch.zeros(3))], **options)


def test_a_group_may_not_turn_the_damping_off():
    """Checked in every step, before anything has changed."""
    problem = Regression(seed=62)
    params = problem.parameters()
    optimizer = LowRankMFAC(params)
    set_gradients(params, problem.gradients(params, 0))
    optimizer.step()
    optimizer.param_groups[0]["trust_lr"] = 0.0
    before = flat(params)
    with pytest.raises(ValueError, match="needs dampening"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    assert optimizer.state[params[0]]["pushed"] == optimizer.state[params[0]]["gradients"] == 1


@pytest.mark.parametrize("cls", [LowRankMFAC, LowRankGGT])
def test_a_step_ends_where_the_trusted_learning_rate_ends(cls):
    """One gradient again and again, of which M-FAC at `lr` moves `lr / (1 + n lr / trust_lr)`, GGT less and less.

    The metric is 1, as AdamW's is for a gradient of ones.
    """
    moved = {}
    for lr in (1e-6, 1e-3, 1e-1, 10.0):
        param = torch.nn.Parameter(torch.zeros(8, 6))
        optimizer = cls([param], lr, num_grads=4, rank=1, trust_lr=1e-3, precondition="gradient", **EXACT)
        for _ in range(4):
            before = param.detach().clone()
            set_gradients([param], [torch.ones(8, 6)])
            optimizer.step()
            moved[lr] = float((before - param.detach()).mean())
        f = 1 / (1 + 4 * lr / 1e-3) if cls is LowRankMFAC else (1 + 4 * lr / 1e-3) ** -0.5
        assert moved[lr] == pytest.approx(lr * f, rel=1e-2)
    assert moved[1e-6] == pytest.approx(1e-6, rel=1e-2)
    if cls is LowRankMFAC:
        assert moved[10.0] == pytest.approx(1e-3 / 4, rel=1e-2)


def test_a_learning_rate_of_zero_moves_nothing():
    """As a scheduler's last step has it; the heavy ball still gets AdamW's update."""
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = LowRankMFAC([param], 0.0, momentum=0.9, rank=1, weight_decay=0.1)
    for _ in range(3):
        set_gradients([param], [torch.ones(8, 6)])
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(8, 6))
    torch.testing.assert_close(
        optimizer.state[param]["momentum"], torch.full((8, 6), 1 + 0.9 + 0.81), rtol=1e-2, atol=0
    )


def test_the_matrix_turns_what_adamw_does():
    """The tests above would mean little if the default matrix changed nothing."""
    problem = Regression(seed=63, width=40)
    ends = []
    for damp in (1.0, 1e30):
        params = problem.parameters()
        optimizer = LowRankMFAC(params, 1e-2, rank=2, relative_damp=damp, **EXACT)
        for step in range(20):
            set_gradients(params, problem.gradients(problem.start, step))
            optimizer.step()
        ends.append(flat(params) - flat(problem.start))
    turned, adamw = ends
    assert 0.1 < turned.norm() / adamw.norm() < 0.95
    assert torch.dot(turned, adamw) / (turned.norm() * adamw.norm()) < 0.99
