"""AdamW for what is not preconditioned: against float64 in every dtype, with tiny and huge gradients; its state."""

import copy

import pytest
import torch
from problems import flat, set_gradients, step_beside
from states import assert_same, through_a_file

from hf_efcp import GaLore, LowRankMFAC, adamw, estimate_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(12, 7), (90,), ()]


def excluded(params, **settings):
    """A group that is not preconditioned, beside a matrix that is."""
    inside = torch.nn.Parameter(torch.ones(8, 8, dtype=params[0].dtype))
    inside.grad = torch.eye(8, dtype=params[0].dtype)
    return LowRankMFAC([{"params": [inside]}, {"params": params, "preconditioned": False}], rank=2, **settings)


def not_projected(params, **settings):
    """Vectors, and matrices with no more rows or columns than the rank."""
    return GaLore(params, rank=7, **settings)


MAKERS = pytest.mark.parametrize("make", [excluded, not_projected])


def parameters(dtype, shapes=SHAPES, scale=0.3):
    source = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((scale * torch.randn(shape, generator=source)).to(dtype)) for shape in shapes]


def gradients(dtype, step, scale=1.0, shapes=SHAPES):
    source = torch.Generator().manual_seed(step)
    return [(scale * torch.randn(shape, generator=source)).to(dtype) for shape in shapes]


class Naive:
    """AdamW in float64; parameters are rounded to their dtype once a step."""

    def __init__(self, thetas, dtype, lr, weight_decay=0.0):
        self.thetas = [theta.detach().to(torch.float64) for theta in thetas]
        self.m, self.v = ([torch.zeros_like(theta) for theta in self.thetas] for _ in range(2))
        self.dtype, self.lr, self.keep, self.count = dtype, lr, 1 - lr * weight_decay, 0

    def step(self, grads):
        self.count += 1
        for number, grad in enumerate(grads):
            g = grad.to(torch.float64)
            self.m[number] = 0.9 * self.m[number] + 0.1 * g
            self.v[number] = 0.999 * self.v[number] + 0.001 * g * g
            m = self.m[number] / (1 - 0.9**self.count)
            root = (self.v[number] / (1 - 0.999**self.count)).sqrt()
            theta = self.keep * self.thetas[number] - self.lr * m / (root + 1e-8)
            self.thetas[number] = theta.to(self.dtype).to(torch.float64)


@MAKERS
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_hundred_steps_are_those_of_float64(make, dtype):
    """Gradients fall to a hundredth on the way, so that steps are only as long if the second moment decays."""
    params = parameters(dtype)
    start = flat(params)
    naive = Naive(params, dtype, 0.02, weight_decay=0.1)
    optimizer = make(params, lr=0.02, weight_decay=0.1)
    middle = None
    for step in range(300):
        grads = gradients(dtype, step, 1.0 if step < 50 else 0.01)
        set_gradients(params, grads)
        optimizer.step()
        naive.step(grads)
        middle = (flat(params), flat(naive.thetas)) if step == 150 else middle
    for ours, theirs in ((start, start), middle):  # since then
        moved = flat(naive.thetas) - theirs
        assert moved.norm() > 0.1
        assert (flat(params) - ours - moved).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * moved.norm()
    for number, param in enumerate(params):
        state = optimizer.state[param]
        assert state["step"] == 300
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, torch.float32)
        assert (state["exp_avg_sq"] / naive.v[number] - 1).abs().max() < 1e-4


@MAKERS
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("at_a_time", [1 << 18, 700])
def test_low_precision_is_float32_steps_rounded_once(make, dtype, at_a_time, monkeypatch):
    """Equal to the bit, state included; also if large ones are cut by rows, one of them not contiguous."""
    monkeypatch.setattr(adamw, "span_length", lambda device: at_a_time)
    shapes = [(150, 7), (3, 3), (), (200, 2, 3), (0, 4), (700,)]
    params, twins = (parameters(t, shapes) for t in (dtype, torch.float32))
    for some in (params, twins):
        some[0] = torch.nn.Parameter(some[0].detach().t().contiguous().t())
    start = flat(params)
    optimizer, twin = (make(some, lr=0.02, weight_decay=0.1) for some in (params, twins))
    for step in range(5):
        step_beside(params, optimizer, twins, twin, gradients(dtype, step, shapes=shapes))
    assert {param.dtype for param in params} == {dtype}
    assert (flat(params) - start).norm() > 0.5
    for param, other in zip(params, twins, strict=True):
        assert_same(optimizer.state[param], twin.state[other])


@MAKERS
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_the_first_step_in_float16_is_as_long_as_the_rate(make, size):
    """`lr g / (|g| + eps)`: in float16, eps is 0, and so is a thousandth of the square."""
    param = torch.nn.Parameter(torch.zeros(5, dtype=torch.float16))
    optimizer = make([param], lr=0.01)
    set_gradients([param], [torch.tensor([size, -size, 2 * size, 0.0, -0.0])])
    g = param.grad.to(torch.float64)
    optimizer.step()
    torch.testing.assert_close(param.detach().double(), -0.01 * g / (g.abs() + 1e-8), rtol=1e-3, atol=0.0)
    assert (param != 0).tolist() == [True, True, True, False, False]


@MAKERS
def test_the_second_moment_decays_in_bfloat16(make):
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = make([param])
    for step in range(200):
        set_gradients([param], [torch.full((3,), 2.0 * (step == 0))])
        optimizer.step()
    v = optimizer.state[param]["exp_avg_sq"]
    torch.testing.assert_close(v, torch.full((3,), 0.004 * 0.999**199), rtol=1e-4, atol=0.0)


# Huge gradients


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_huge_gradients_move_as_the_largest_whose_square_there_is(dtype, nonfinite):
    """Also of alternating signs; what is beside them is stepped as if they were not there."""
    params, alone = parameters(dtype, [(4, 5)], 0.0), parameters(dtype, [(4, 5)], 0.0)
    optimizer, other = excluded(params, lr=0.02, nonfinite=nonfinite), excluded(alone, lr=0.02)
    naive = Naive(params, dtype, 0.02)
    for step in range(60):
        (grad,) = gradients(dtype, step, shapes=[(4, 5)])
        set_gradients(alone, [grad])
        large = grad.clone()
        large[0] = torch.tensor([1e30, -1e30, 3e38, -3e38, 1e19]) * (step < 20)
        large[1] = torch.tensor([1e30, 3e38, -3e38, 1e20, 2e19]) * (-1) ** step
        large[2, 0] = 1e30 if step == 10 else large[2, 0]
        set_gradients(params, [large])
        naive.step([large.double().clamp(-adamw.LARGEST, adamw.LARGEST)])
        optimizer.step()
        other.step()
        state = optimizer.state[params[0]]
        assert all(value.isfinite().all() for value in (*params, state["exp_avg"], state["exp_avg_sq"]))
        if step == 0:
            assert params[0][0].tolist() == pytest.approx([-0.02, 0.02, -0.02, 0.02, -0.02], rel=4e-3)
        assert torch.equal(params[0][3], alone[0][3])
    assert naive.thetas[0].abs().min() > 5e-3
    assert (params[0] - naive.thetas[0]).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * naive.thetas[0].norm()


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_float32_is_torchs_to_the_bit_up_to_there(nonfinite):
    params, reference = parameters(torch.float32), parameters(torch.float32)
    optimizer = excluded(params, lr=0.02, weight_decay=0.1, nonfinite=nonfinite)
    theirs = torch.optim.AdamW(reference, lr=0.02, weight_decay=0.1)
    for step in range(20):
        for some in (params, reference):
            set_gradients(some, gradients(torch.float32, step, 10.0 ** (step - 4)))
        optimizer.step()
        theirs.step()
        assert flat([param.grad for param in params]).equal(flat([param.grad for param in reference]))
        assert flat(params).equal(flat(reference))
    assert (flat(params) - flat(parameters(torch.float32))).norm() > 0.5
    assert_same([optimizer.state[p] for p in params], [dict(theirs.state[p]) for p in reference])


# State


@MAKERS
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_what_was_announced(make, dtype):
    params = parameters(dtype)
    optimizer = make(params)
    planned = optimizer.planned_memory()
    set_gradients(params, gradients(dtype, 0))
    optimizer.step()
    assert optimizer.memory() == planned
    own = sum(v.nbytes for param in params for v in optimizer.state[param].values())
    assert own == 8 * (12 * 7 + 90 + 1) + 4 * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_told_of_torchs_adamw_is_what_it_keeps(dtype):
    """Its moments have the dtypes of the parameters."""
    params = parameters(dtype)
    theirs = torch.optim.AdamW(params)
    set_gradients(params, gradients(dtype, 0))
    theirs.step()
    kept = sum(value.nbytes for state in theirs.state.values() for value in state.values())
    assert estimate_memory(params).adamw == kept == 2 * params[0].element_size() * 175 + 12


@MAKERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", [False, True])
def test_resuming_is_bit_equal_also_from_moments_that_were_saved_in_the_dtype_of_the_parameter(make, dtype, narrow):
    params = parameters(dtype)
    optimizer = make(params, lr=0.02)
    for step in range(4):
        set_gradients(params, gradients(dtype, step))
        optimizer.step()
    if narrow:
        for param in params:
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[param][name].copy_(optimizer.state[param][name].to(dtype))
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values() if narrow else ():
        if "step" in state:
            state.update({name: state[name].to(dtype) for name in ("exp_avg", "exp_avg_sq")})
    resumed = copy.deepcopy(params)
    other = make(resumed, lr=0.02)
    if make is excluded:
        other.param_groups[0]["params"][0].data.copy_(optimizer.param_groups[0]["params"][0])
    other.load_state_dict(saved)
    assert_same(other.state_dict(), optimizer.state_dict())
    middle = flat(params)
    for step in range(4, 8):
        for some, stepped in ((params, optimizer), (resumed, other)):
            set_gradients(some, gradients(dtype, step))
            stepped.step()
    assert torch.equal(flat(params), flat(resumed))
    assert_same(other.state_dict(), optimizer.state_dict())
    assert (flat(params) - middle).norm() > 0.1


@MAKERS
def test_moments_of_yet_another_dtype_are_refused(make):
    params = parameters(torch.bfloat16)
    optimizer = make(params)
    set_gradients(params, gradients(torch.bfloat16, 0))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    key = max(saved["state"])
    saved["state"][key]["exp_avg_sq"] = saved["state"][key]["exp_avg_sq"].to(torch.float16)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"does not fit: exp_avg_sq is torch.float16 .*, expected torch.float32"):
        optimizer.load_state_dict(saved)
    assert_same(before, optimizer.state_dict())
