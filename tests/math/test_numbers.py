"""Numbers that go wrong: huge, tiny, denormal, zero and identical gradients, and what they leave."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from number_cases import MFAC_NAMES, SCALES, SHAPES, assert_finite, errors, noise, parameters, pushed, rows
from problems import flat, set_gradients
from variants import build, exact, in_metric, names, taken


def everything_alone(test):
    for kind in [*SCALES, "identical"]:
        test = example([kind] * 9)(test)
    return example(["zero"] * 6 + ["normal"] * 3)(example(["huge"] + ["tiny"] * 8)(test))


@pytest.mark.parametrize("name", names())
@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.lists(st.sampled_from([*SCALES, "identical"]), min_size=1, max_size=9))
@everything_alone
def test_gradients_of_any_size_leave_finite_numbers_and_lose_nothing(name, kinds):
    """Where the accumulator cannot saturate, all rows ever pushed and the error add up to all gradients."""
    params = parameters()
    optimizer = build(name, params, **exact(name))
    in_all = torch.zeros(len(flat(params)), dtype=torch.float64)
    stored, sizes, smallest = torch.zeros_like(in_all), 0.0, torch.finfo(torch.float32).smallest_normal * 2**-23
    for step, kind in enumerate(kinds):
        gradients = noise(kind, step)
        set_gradients(params, gradients)
        optimizer.step()
        assert_finite(params, optimizer)
        in_all += flat(gradients)
        sizes += float(flat(gradients).norm())
        stored += rows(optimizer, step % optimizer.param_groups[0]["num_grads"])[0]
    if "huge" not in kinds and not in_metric(name):  # in a metric they add up to what was whitened
        lost = (stored + errors(optimizer) - in_all).norm()
        assert lost <= len(kinds) * (2**-20 * sizes + 100 * smallest)
    if set(kinds) == {"zero"}:
        assert torch.equal(flat(params), torch.ones_like(in_all))
    if set(kinds) <= {"normal", "identical"}:
        assert (flat(params) - 1).norm() > 1e-3


def directions(step):
    """Small integers, whose sums and products are exact, from a space of three dimensions; some of them are equal."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randint(-3, 4, (3, sum(torch.Size(shape).numel() for shape in SHAPES)), generator=generator).float()
    weights = [(1, 0, 0), (1, 0, 0), (0, 2, 0), (1, -1, 0), (0, 0, 1), (2, 1, -1), (2, 1, -1)][step % 7]
    parts = (torch.tensor(weights, dtype=torch.float32) @ basis).split([torch.Size(s).numel() for s in SHAPES])
    return [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", ["sparse_mfac_float32", "dense_mfac"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_no_dampening_is_the_pseudo_inverse_of_the_window(name, density, backend):
    """Twelve steps over a window of five, of rank one to three; what is stored decides, compressed or not."""
    params = parameters()
    changes = taken(name, damp=0.0, density=density, value_dtype=torch.float32, backend=backend)
    optimizer = build(name, params, lr=1.0, **changes)
    ranks = []
    for step in range(12):
        before = flat(params)
        set_gradients(params, directions(step))
        optimizer.step()
        window = rows(optimizer)
        fisher = window.T @ window / len(window)
        ranks.append(int(torch.linalg.matrix_rank(fisher, hermitian=True, rtol=1e-10)))
        expected = torch.linalg.pinv(fisher, hermitian=True, rtol=1e-10) @ window[step % len(window)]
        assert expected.norm() > 1e-3
        assert (before - flat(params) - expected).norm() < 1e-5 * expected.norm() + 1e-6 * before.norm()
    if density == 1.0 or name == "dense_mfac":
        assert ranks[:3] == [1, 1, 2]
        assert max(ranks) == 3


@pytest.mark.parametrize("name", MFAC_NAMES)
def test_no_dampening_and_no_gradient_is_no_update(name):
    params = parameters()
    optimizer = build(name, params, damp=0.0)
    for kind in ["zero", "zero", "normal", "zero"]:
        before = flat(params)
        set_gradients(params, noise(kind, 3))
        optimizer.step()
        assert_finite(params, optimizer)
        if pushed(optimizer) < 3:
            assert torch.equal(flat(params), before)
        elif kind == "normal":
            assert not torch.equal(flat(params), before)
