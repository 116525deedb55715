"""Numbers that go wrong: huge, tiny, denormal, zero, identical and infinite gradients, and what they leave."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import Regression, flat, set_gradients
from states import assert_same, snapshot, through_a_file
from variants import build, exact, in_metric, names, papers_names, taken

from hf_efcp.compressors import TopK
from hf_efcp.kernels import reference
from hf_efcp.optimizer import EFCP
from hf_efcp.preconditioners import MFAC

SHAPES = [(6, 5), (7,), ()]
MFAC_NAMES = [name for name in papers_names() if taken(name, damp=0.0)]
# What multiplies normal noise.
SCALES = {"normal": 1.0, "huge": 1e38, "large": 1e27, "tiny": 1e-30, "denormal": 1e-40, "zero": 0.0}


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]


def noise(kind, step):
    """Gradients of a kind; "identical" ones are the same at every step."""
    generator = torch.Generator().manual_seed(0 if kind == "identical" else step)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(g.clamp(-3, 3) * SCALES.get(kind, 1.0)) for g in drawn]


def rows(optimizer, position=None):
    """The window over all parameters as dense float64 rows, or its row at a position."""
    capacity = optimizer.param_groups[0]["num_grads"]
    units = torch.eye(capacity, dtype=torch.float64)
    found = []
    for unit in units if position is None else units[position : position + 1]:
        parts = []
        for site in [site for together in optimizer._units() for site in optimizer._sites(together)]:
            window, held = optimizer._layout.window, (site.state, site.shape)
            spans = window.spans(site.shape, site.member.param.device)
            parts += [window.combine(*held, span, unit, reference).double() for span in spans]
        found.append(torch.cat(parts))
    return torch.stack(found)


def pushed(optimizer):
    return optimizer._gram_state(optimizer._members())["pushed"]


def errors(optimizer):
    """The error over all parameters; zeros where nothing is compressed."""
    states = [site.state for unit in optimizer._units() for site in optimizer._sites(unit)]
    return torch.cat([s["error"].double().view(-1) for s in states]) if "error" in states[0] else torch.zeros(())


def assert_finite(params, optimizer):
    for param in params:
        assert torch.isfinite(param).all()
        for key, value in optimizer.state[param].items():
            if torch.is_tensor(value) and value.is_floating_point():
                assert torch.isfinite(value).all(), key


def everything_alone(test):
    for kind in [*SCALES, "identical"]:
        test = example([kind] * 9)(test)
    return example(["zero"] * 6 + ["normal"] * 3)(example(["huge"] + ["tiny"] * 8)(test))


# What is finite stays finite


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


# Matrices without an inverse


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


# Updates that no number can hold


# Scales of int8 are normal numbers: there a denormal row is zero, and all of it stays in the error.
@pytest.mark.parametrize("name", [name for name in MFAC_NAMES if not name.endswith("int8")])
@pytest.mark.parametrize("lr", [0.0, 0.5])
def test_an_update_beyond_float32_is_refused_before_a_parameter_moves(name, lr):
    """`m row / |row|^2` of a denormal row."""
    params = parameters()
    optimizer = build(name, params, lr=lr, damp=0.0, **exact(name))
    set_gradients(params, noise("denormal", 0))
    message = r"update has length \d.*e\+\d+, .* beyond torch.float32 .*no parameter was moved"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
    assert_finite(params, optimizer)
    # The gradient is in the window and in the error, and the next one is as good as any.
    assert pushed(optimizer) == 1
    given_then = flat(noise("denormal", 0))
    assert (rows(optimizer, 0)[0] + errors(optimizer) - given_then).norm() < 1e-3 * given_then.norm()
    set_gradients(params, noise("normal", 1))
    optimizer.step()
    assert pushed(optimizer) == 2
    assert_finite(params, optimizer)
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64)) == (lr == 0.0)


def test_one_layer_that_cannot_move_keeps_all_from_moving():
    params = parameters()
    optimizer = build("lowrank_mfac_layers", params, damp=0.0)
    gradients = noise("normal", 0)
    gradients[1] = torch.full((7,), 1e-42)
    set_gradients(params, gradients)
    with pytest.raises(ValueError, match=r"in parameter 1 of group 0 .*no parameter was moved"):
        optimizer.step()
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
    assert [optimizer.state[param]["pushed"] for param in params] == [1, 1, 1]


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac"])
def test_a_dense_gradient_over_a_small_damp_is_refused(name):
    params = parameters()
    optimizer = build(name, params, precondition="gradient", damp=1e-3)
    set_gradients(params, noise("huge", 0))
    with pytest.raises(ValueError, match=r"beyond torch.float32 .*a larger damp or eps"):
        optimizer.step()
    assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
    set_gradients(params, noise("normal", 1))
    optimizer.step()
    assert_finite(params, optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_fits_depends_on_the_parameter_and_the_learning_rate(dtype, momentum):
    """An update of 20,000 at lr 1, 2e5 with the momentum that it will have; float16 ends at 65,504."""
    for lr in (1.0, 10.0, 0.01):
        params = parameters(dtype)
        optimizer = build("dense_mfac", params, lr=lr, damp=0.0, momentum=momentum)
        gradients = [torch.zeros(shape) for shape in SHAPES]
        gradients[1][2] = 5 / 20000
        set_gradients(params, gradients)
        if dtype == torch.float16 and lr * 20000 / (1 - momentum) > 65504:
            with pytest.raises(ValueError, match=r"length 2e\+04, .* beyond torch.float16 \(6.55e\+04\)"):
                optimizer.step()
            assert torch.equal(flat(params), torch.ones(38, dtype=torch.float64))
        else:
            optimizer.step()
            assert params[1][2].item() == pytest.approx(1 - lr * 20000, rel=1e-2)


@pytest.mark.parametrize("name", [name for name in papers_names() if name not in ("microadam", "sparse_adagrad")])
@pytest.mark.parametrize("precondition", ["row", "gradient"])
def test_the_length_of_an_update_is_known_before_it_exists(name, precondition):
    params = parameters()
    changes = {"precondition": precondition, **exact(name), **taken(name, beta1=0.0)}
    optimizer = build(name, params, lr=1.0, **changes)
    lengths = []
    check = optimizer._check_length
    optimizer._check_length = lambda sites, length: (lengths.append(length), check(sites, length))
    for step in range(9):
        before, lengths[:] = flat(params), []
        set_gradients(params, noise("normal", step))
        optimizer.step()
        moved = (flat(params) - before).norm().item()
        assert moved > 1e-3
        assert torch.tensor(lengths).norm().item() == pytest.approx(moved, rel=1e-4)


# The Gram matrix in the long run


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dense_mfac", "lowrank_ggt")]


@pytest.mark.parametrize("name", ["sparse_mfac", "lowrank_mfac", *SLOW])
def test_the_gram_matrix_is_the_true_one_after_thousands_of_steps(name):
    """3,000 rows through a window of 16, of sizes over six decades; parameters come and go."""
    params = parameters()
    optimizer = build(name, params, num_grads=16)
    generator = torch.Generator().manual_seed(0)
    for step in range(3000):
        size = 10 ** (3 * torch.sin(torch.tensor(step / 5.0)))
        for position, param in enumerate(params):
            absent = step % 7 == position
            param.grad = None if absent else size * torch.randn(param.shape, generator=generator)
        optimizer.step()
    set_gradients(params, noise("normal", 0))  # for rows() to see all parameters
    window = rows(optimizer)
    gram = optimizer._gram_state(optimizer._members())["gram"]
    assert pushed(optimizer) == 3000
    bound = 1e-6 if name.startswith("lowrank") else 1e-12
    scale = window.norm(dim=1)
    assert (scale > 0).all()
    assert ((gram - window @ window.T).abs() <= bound * scale[:, None] * scale).all()
    assert_finite(params, optimizer)


# Infinite gradients


def lenient(params, **changes):
    settings_ = dict(num_grads=4, nonfinite="skip", momentum=0.5, weight_decay=0.1)
    return EFCP(params, 0.02, compressor=TopK(0.3, 8), preconditioner=MFAC(1e-3), **{**settings_, **changes})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_skipped_steps_change_nothing_are_counted_saved_and_resumed(value):
    problem = Regression(seed=30)

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:3], "preconditioned": False}, {"params": params[3:]}]

    params, good = problem.parameters(), problem.parameters()
    optimizer, strict = lenient(groups(params)), lenient(groups(good), nonfinite="raise")

    def both(step):
        gradients = problem.gradients(good, step)
        set_gradients(good, gradients)
        strict.step()
        set_gradients(params, gradients)
        optimizer.step()

    def bad(position):
        set_gradients(params, problem.gradients(good, 0))
        params[position].grad.view(-1)[0] = value
        before = snapshot(params, optimizer)
        assert optimizer.step() is None
        after = snapshot(params, optimizer)
        for group in (*before[2]["param_groups"], *after[2]["param_groups"]):
            group.pop("skipped_steps")
        assert_same(before[0], after[0])
        assert_same(before[2], after[2])

    bad(0)
    assert not optimizer.state
    for step in range(6):
        both(step)
        bad(step % 4)
    assert optimizer.skipped_steps == 7
    assert strict.skipped_steps == 0
    saved = through_a_file(optimizer.state_dict())
    params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = lenient(groups(params))
    optimizer.load_state_dict(saved)
    assert optimizer.skipped_steps == 7
    bad(3)
    both(6)
    assert optimizer.skipped_steps == 8
    assert torch.equal(flat(params), flat(good))
    assert_same(optimizer.state_dict()["state"], strict.state_dict()["state"])
    assert not torch.equal(flat(params), flat(problem.start))
