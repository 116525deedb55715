"""The paper's rule, `metric="none"`, against the formulas that M-FAC's and GGT's papers and published code compute."""

import pytest
import torch
from naive import PublishedGGT, PublishedMFAC, top_k
from problems import set_gradients

from hf_efcp import DenseGGT, DenseMFAC, LowRankGGT, SparseGGT, SparseMFAC

SIZE, STEPS = 96, 60
MFAC = [(cls, damp) for cls in (DenseMFAC, SparseMFAC) for damp in (1e-5, 1e-6)]
GGT = [(cls, ridge) for cls in (DenseGGT, SparseGGT) for ridge in (0.0, 1e-6)]


def compare(cls, published, scale, **settings):
    """The largest distance of an update from the published one, as a fraction of it.

    The gradients share a direction, as those of a model do, and the parameter starts every step at zero, where float32
    keeps all digits of a move.
    """
    generator = torch.Generator().manual_seed(90)
    sparse = {"density": 0.1, "value_dtype": torch.float32} if cls in (SparseMFAC, SparseGGT) else {}
    shared, error, worst = torch.randn(SIZE, generator=generator), torch.zeros(SIZE), 0.0
    param = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = cls([param], lr=1.0, metric="none", **sparse, **settings)
    for _ in range(STEPS):
        gradient = scale * (shared + torch.randn(SIZE, generator=generator))
        row = error + gradient
        if sparse:
            kept = top_k(row, sparse["density"], SIZE)  # one block is the whole model, as published
            row = torch.zeros(SIZE).index_copy(0, torch.tensor(kept), row[kept])
            error = error + gradient - row
        expected = published.update(row.double())
        param.data.zero_()
        set_gradients([param], [gradient])
        optimizer.step()
        worst = max(worst, float((param.detach().double() + expected).norm() / expected.norm()))
    return worst


@pytest.mark.parametrize(("cls", "damp"), MFAC)
def test_mfac_is_the_published_recursion(cls, damp):
    published = PublishedMFAC(SIZE, 32, damp)
    assert compare(cls, published, 0.1, num_grads=32, damp=damp) < 1e-6


@pytest.mark.parametrize("scale", [0.1, 1e-4])  # rows longer and shorter than the root of the ridge
@pytest.mark.parametrize(("cls", "ridge"), GGT)
def test_ggt_is_the_published_formula(cls, ridge, scale):
    published = PublishedGGT(SIZE, 20, 1e-5, ridge)
    assert compare(cls, published, scale, num_grads=20, eps=1e-5, ridge=ridge) < 1e-6


def test_the_ridge_makes_short_rows_longer():
    """A single row: `u = (1 + ridge / (eps s)) / (s + eps) g`, `s^2 = |g|^2 + ridge`; 97 times as long at 1e-4."""
    gradient, moved = torch.full((4,), 5e-5), []
    for ridge in (0.0, 1e-6):
        param = torch.nn.Parameter(torch.zeros(4))
        optimizer = DenseGGT([param], lr=1.0, num_grads=4, metric="none", eps=1e-5, ridge=ridge)
        set_gradients([param], [gradient])
        optimizer.step()
        moved.append(float(param.detach().norm()))
    s = (1e-8 + 1e-6) ** 0.5
    assert moved[0] == pytest.approx(1e-4 / (1e-4 + 1e-5), rel=1e-5)
    assert moved[1] == pytest.approx(1e-4 * (1 + 1e-6 / (1e-5 * s)) / (s + 1e-5), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 1e-6, "eps": 1e-5}, 'use ridge=0, or metric="none"'),
        ({"ridge": 1e-6, "metric": "none"}, "so needs eps: give one"),
        ({"ridge": -1.0, "metric": "none", "eps": 1e-5}, "ridge must be a finite number of at least 0, got -1.0"),
    ],
)
def test_a_ridge_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRankGGT([torch.nn.Parameter(torch.zeros(4, 4))], **settings)


def test_momentum_and_decay_of_published_programs_are_ours_by_other_numbers():
    """`v = mu v + (1 - mu) u` and `p = (1 - wd) p - lr v`, as docs/images.md says what to give for them."""
    lr, wd, mu = 1e-2, 1e-3, 0.9
    generator = torch.Generator().manual_seed(7)
    start, gradients = torch.randn(SIZE, generator=generator), torch.randn(30, SIZE, generator=generator)
    published, velocity, theirs = PublishedMFAC(SIZE, 8, 1e-2), torch.zeros(SIZE).double(), start.double()
    for gradient in gradients:
        velocity = mu * velocity + (1 - mu) * published.update(gradient.double())
        theirs = (1 - wd) * theirs - lr * velocity
    ends = {}
    for name, settings in {
        "ours": {"lr": (1 - mu) * lr, "weight_decay": wd / ((1 - mu) * lr), "momentum": mu},
        "as they stand": {"lr": lr, "weight_decay": wd / lr, "momentum": mu},
    }.items():
        param = torch.nn.Parameter(start.clone())
        optimizer = DenseMFAC([param], num_grads=8, damp=1e-2, metric="none", **settings)
        for gradient in gradients:
            set_gradients([param], [gradient])
            optimizer.step()
        ends[name] = float((param.detach().double() - theirs).norm() / (theirs - start).norm())
    assert ends["ours"] < 1e-4
    assert ends["as they stand"] > 1
