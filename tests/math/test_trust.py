"""What is refused of a metric, and what `trust_lr` and the matrix do in it."""

import pytest
import torch
from metric_cases import EXACT
from problems import Regression, flat, set_gradients

from hf_efcp import (
    DenseGGT,
    DenseMFAC,
    LowRankGGT,
    LowRankMFAC,
    MicroAdam,
    SparseAdaGrad,
    SparseMFAC,
)


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


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_the_rate_of_what_is_frozen_does_not_shorten_the_others(backend):
    moved = {}
    for frozen_lr in (1e-5, 1e-2):
        frozen, param = (torch.nn.Parameter(torch.zeros(8, 6)) for _ in range(2))
        groups = [{"params": [frozen], "lr": frozen_lr}, {"params": [param]}]
        optimizer = LowRankMFAC(groups, 1e-5, scope="model", rank=1, backend=backend)
        for step in range(4):
            set_gradients([param], [torch.ones(8, 6)])
            frozen.grad = torch.ones(8, 6) if step == 0 else None
            before = param.detach().clone()
            optimizer.step()
            moved.setdefault(frozen_lr, []).append(float((param.detach() - before).norm()))
    slow, fast = moved.values()
    assert fast[0] < 0.1 * slow[0]  # while both move, one matrix trusts one rate
    assert fast[1:] == pytest.approx(slow[1:], rel=1e-5)


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
