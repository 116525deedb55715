"""Every projected optimizer against its naive twin in float64, and against what it becomes at its limits."""

import pytest
import torch
from problems import flat, set_gradients
from relatives import build, decaying
from twins import AdaRank, Natural, Sketched, Twin

from hf_efcp import LORENZA, AdaRankGrad, GaLore, NaturalGaLore

SHAPES = [(14, 9), (9, 14), (12, 12), (6, 2, 5)]


def left_of(shape, proj_type="std"):
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return {"left": True, "right": False, "std": rows < columns, "reverse_std": rows >= columns}[proj_type]


def run(cls, twin, gradients, settings, twin_settings, shapes=SHAPES, dtype=torch.float32):
    """An optimizer over all shapes and a twin of each, on the same gradients; returns the twins."""
    source = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=source).to(dtype) for shape in shapes]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = cls(params, **settings)
    twins = [
        twin(start.reshape(start.shape[0], -1), left=left_of(start.shape, settings.get("proj_type", "std")),
             position=position, **twin_settings)
        for position, start in enumerate(starts)
    ]  # fmt: skip
    for step in gradients(shapes):
        set_gradients(params, step)
        optimizer.step()
        for param, gradient, one in zip(params, step, twins, strict=True):
            one.update(gradient, optimizer.state[param]["basis"])
            assert optimizer.state[param]["rank"] == one.ranks[-1]
    for param, start, one in zip(params, starts, twins, strict=True):
        moved = (one.theta - start.double().view_as(one.theta)).norm()
        assert (param.detach().double().view_as(one.theta) - one.theta).norm() < 2e-4 * moved
        assert moved > 0.05
        assert optimizer.state[param]["refreshes"] == one.refreshes
    return twins


def steady(count, seed=1):
    """Gradients that share half of themselves, with well-separated singular values."""

    def make(shapes):
        source = torch.Generator().manual_seed(seed)
        common = [decaying(shape, source) for shape in shapes]
        for _ in range(count):
            yield [0.5 * one + 0.5 * decaying(one.shape, source) for one in common]

    return make


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_galore_equals_its_twin(proj_type):
    settings = dict(lr=0.01, rank=3, scale=2.0, update_gap=7, weight_decay=0.1, proj_type=proj_type)
    twins = run(GaLore, Twin, steady(20), settings, dict(lr=0.01, rank=3, scale=2.0, gap=7, weight_decay=0.1))
    assert twins[0].refreshes == 3


def test_natural_galore_equals_its_twin():
    """The window has wrapped, and turned twice."""
    settings = dict(lr=0.01, rank=3, scale=1.0, update_gap=7, history=5, damp=1e-2)
    twin = dict(lr=0.01, rank=3, scale=1.0, gap=7, history=5, damp=1e-2)
    twins = run(NaturalGaLore, Natural, steady(20), settings, twin)
    assert twins[0].refreshes == 3


def test_lorenza_equals_its_twin_on_given_gradients():
    settings = dict(lr=0.01, rank=3, scale=1.0, update_gap=7, rho=0.0, seed=5)
    twins = run(LORENZA, Sketched, steady(20), settings, dict(lr=0.01, rank=3, scale=1.0, gap=7, seed=5))
    assert twins[0].refreshes == 3


def phases(shapes):
    """Gradients of rank 1, then 3, then 5, then 2: most of a new one lies outside the subspace of the one before."""
    source = torch.Generator().manual_seed(2)
    for rank, size in ((1, 1.0), (3, 1.0), (5, 1.0), (2, 0.5)):
        common = [size * decaying(shape, source, rank) for shape in shapes]
        for _ in range(5):
            yield common


def test_adarankgrad_equals_its_twin_while_ranks_change():
    settings = dict(lr=0.01, max_rank=4, scale=1.0, max_gap=50, residual=1e-3, threshold=0.8, seed=3)
    twin = dict(lr=0.01, rank=4, scale=1.0, gap=50, residual=1e-3, threshold=0.8, seed=3, min_rank=1)
    twins = run(AdaRankGrad, AdaRank, phases, settings, twin)
    assert sorted(set(twins[0].ranks)) == [1, 2, 3, 4]


def test_adarankgrad_refreshes_in_any_case_after_max_gap():
    settings = dict(lr=0.01, max_rank=4, scale=1.0, max_gap=6, residual=0.02, threshold=0.0)
    twin = dict(lr=0.01, rank=4, scale=1.0, gap=6, residual=0.02, threshold=0.0, seed=0, min_rank=1)
    assert run(AdaRankGrad, AdaRank, steady(20), settings, twin)[0].refreshes == 4


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 10, 30)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_adarankgrad_finds_a_known_rank(shape, rank):
    source = torch.Generator().manual_seed(rank)
    columns = torch.Size(shape[1:]).numel()
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = AdaRankGrad([param], max_rank=16, residual=0.0)
    gradient = torch.randn(shape[0], rank, generator=source) @ torch.randn(rank, columns, generator=source)
    set_gradients([param], [gradient.view(shape)])
    optimizer.step()
    assert optimizer.state[param]["rank"] == rank


def test_adarankgrad_takes_all_it_may_of_noise_and_never_less_than_it_must():
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 200, generator=source)
    for changes, gradient, rank in (({}, noise, 16), ({"min_rank": 5}, torch.outer(noise[:, 0], noise[0]), 5)):
        param = torch.nn.Parameter(torch.zeros(300, 200))
        optimizer = AdaRankGrad([param], max_rank=16, **changes)
        set_gradients([param], [gradient])
        optimizer.step()
        assert optimizer.state[param]["rank"] == rank


@pytest.mark.parametrize("name", ["galore", "adarankgrad", "lorenza", "natural_galore"])
def test_a_rank_that_no_matrix_exceeds_is_adamw(name):
    source = torch.Generator().manual_seed(4)
    starts = [torch.randn(shape, generator=source) for shape in (*SHAPES, (7,), ())]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    capacity = {"max_rank" if name == "adarankgrad" else "rank": 30}
    optimizer = build(name, ours, lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-5, **capacity)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-5)
    for _ in range(8):
        gradients = [torch.randn(start.shape, generator=source) for start in starts]
        for params, one in ((ours, optimizer), (theirs, adamw)):
            set_gradients(params, gradients)
            one.step()
    assert torch.equal(flat(ours), flat(theirs))
    assert (flat(ours) - flat(starts)).norm() > 0.1


def test_natural_galore_without_a_history_is_galore():
    source = torch.Generator().manual_seed(5)
    start = torch.randn(14, 9, generator=source)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = dict(lr=0.01, rank=3, update_gap=4)
    pairs = ((ours, NaturalGaLore([ours], history=0, **settings)), (theirs, GaLore([theirs], **settings)))
    for _ in range(10):
        gradient = torch.randn(14, 9, generator=source)
        for param, optimizer in pairs:
            set_gradients([param], [gradient])
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


def test_with_much_damping_natural_galore_is_galore():
    """`damp -> infinity` leaves `R / damp`, whose scale Adam removes."""
    source = torch.Generator().manual_seed(6)
    start = torch.randn(14, 9, generator=source)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = dict(lr=0.01, rank=3, update_gap=4, eps=1e-30)
    pairs = ((ours, NaturalGaLore([ours], damp=1e8, **settings)), (theirs, GaLore([theirs], **settings)))
    for _ in range(10):
        gradient = torch.randn(14, 9, generator=source)
        for param, optimizer in pairs:
            set_gradients([param], [gradient])
            optimizer.step()
    assert (ours - theirs).norm() < 1e-4 * (theirs - start).norm()


@pytest.mark.parametrize("name", ["galore", "adarankgrad", "lorenza", "natural_galore"])
def test_a_gradient_of_zeros_does_not_choose_the_subspace(name):
    source = torch.Generator().manual_seed(7)
    param = torch.nn.Parameter(torch.zeros(14, 9))
    optimizer = build(name, [param])
    set_gradients([param], [torch.zeros(14, 9)])
    optimizer.step()
    assert (optimizer.state[param]["rank"], optimizer.state[param]["refreshes"]) == (0, 0)
    assert not param.any()
    set_gradients([param], [decaying((14, 9), source)])
    optimizer.step()
    assert optimizer.state[param]["refreshes"] == 1
    assert param.any()
