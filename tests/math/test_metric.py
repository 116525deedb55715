"""AdamW's metric: AdamW where the matrix is off, explicit matrices where it is on."""

import math

import pytest
import torch
from lowrank_cases import Given, newest
from metric_cases import EXACT
from naive import NaiveGGT, NaiveMFAC
from problems import Regression, distance, set_gradients

from hf_efcp import (
    EFCP,
    DenseGGT,
    DenseMFAC,
    LowRankGGT,
    LowRankMFAC,
    SparseGGT,
    SparseMFAC,
)
from hf_efcp.compressors import Identity, LowRank, TopK
from hf_efcp.preconditioners import GGT, MFAC, WindowPosition

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
