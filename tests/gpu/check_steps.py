"""Whole steps of the Triton kernels in the interpreter: against plain torch, twice, resumed, compiled, counted."""

import collections
import copy
import io
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efcp import DenseMFAC, LowRankGGT, LowRankMFAC, MicroAdam, SparseGGT, SparseMFAC, graphs
from hf_efcp.errors import UINT4
from hf_efcp.kernels.triton import finite, model

EXACT = {"error_dtype": torch.float32, "metric_dtype": torch.float32, "value_dtype": torch.float32}
SHAPES = [(12, 9), (10,), (0,), (24, 17)]
# Optimizer, settings, and by how much updates may differ, as a fraction of the largest entry: where factors and errors
# are rounded, a float32 sum in another order can be another level, or another bfloat16.
CASES = {
    "default": (LowRankMFAC, {}, 5e-2),
    "exact": (LowRankMFAC, {**EXACT, "rank": 2}, 2e-5),
    "one matrix": (LowRankMFAC, {**EXACT, "rank": 2, "scope": "model"}, 2e-5),
    "bfloat16": (LowRankMFAC, {"error_dtype": torch.bfloat16, "metric_dtype": torch.bfloat16, "rank": 3}, 1e-2),
    "heavy ball": (LowRankMFAC, {**EXACT, "momentum": 0.5, "weight_decay": 0.1}, 2e-5),
    "L2": (LowRankMFAC, {**EXACT, "weight_decay": 0.1, "decoupled_weight_decay": False}, 2e-5),
    "GGT": (LowRankGGT, EXACT, 2e-5),
    "factored": (LowRankMFAC, {**EXACT, "rank": 2, "metric": "factored"}, 2e-5),
    "lean": (LowRankMFAC, {"metric": "factored"}, 5e-2),
    "lean, both moments": (LowRankMFAC, {"metric": "factored", "precondition": "momentum"}, 5e-2),
    "large": (LowRankMFAC, {**EXACT, "num_grads": 65}, 2e-5),
    "large, both moments": (LowRankMFAC, {**EXACT, "num_grads": 65, "precondition": "momentum"}, 2e-5),
    "large, absolute": (LowRankMFAC, {**EXACT, "num_grads": 65, "damp": 0.1}, 2e-5),
    "large, the paper's": (
        SparseMFAC,
        {"density": 0.1, "block_size": 64, "metric": "none", "damp": 1e-3, "num_grads": 65},
        1e-4,
    ),
    "large, GGT": (SparseGGT, {"density": 0.1, "block_size": 64, "num_grads": 65}, 1e-4),
    "large, GGT of the paper": (SparseGGT, {"density": 0.1, "block_size": 64, "metric": "none", "num_grads": 65}, 1e-4),
    "factored, both moments": (LowRankMFAC, {**EXACT, "metric": "factored", "precondition": "momentum"}, 2e-5),
    "sparse, factored": (SparseMFAC, {"density": 0.1, "block_size": 64, "metric": "factored"}, 1e-4),
    "hardly damped": (LowRankMFAC, {**EXACT, "relative_damp": 1e-7}, 1e-3),
    "absolute dampening": (LowRankMFAC, {**EXACT, "damp": 0.1}, 2e-5),
    "gradient": (LowRankMFAC, {**EXACT, "rank": 2, "precondition": "gradient"}, 2e-5),
    "both moments": (LowRankMFAC, {**EXACT, "precondition": "momentum", "momentum_dtype": torch.float32}, 2e-5),
    "rounded moments": (LowRankMFAC, {"precondition": "momentum", "scope": "model", "rank": 1}, 5e-2),
    "GGT, L2": (
        LowRankGGT,
        {**EXACT, "precondition": "gradient", "weight_decay": 0.1, "decoupled_weight_decay": False},
        2e-5,
    ),
    "sparse, gradient": (SparseMFAC, {**EXACT, "density": 0.1, "block_size": 48, "precondition": "gradient"}, 2e-5),
    "sparse, both moments": (
        SparseMFAC,
        {"density": 0.1, "block_size": 64, "precondition": "momentum", "value_dtype": torch.int8},
        1e-2,
    ),
    "sparse": (SparseMFAC, {"density": 0.1, "block_size": 64}, 1e-4),
    "sparse, exact": (SparseMFAC, {**EXACT, "density": 0.1, "block_size": 48}, 2e-5),
    "sparse, small": (
        SparseMFAC,
        {"density": 0.2, "block_size": 64, "value_dtype": torch.int8, "error_dtype": UINT4},
        1e-4,
    ),
    "sparse, one matrix": (SparseMFAC, {"density": 0.1, "block_size": 512, "scope": "model"}, 1e-4),
    "sparse, the paper's": (SparseMFAC, {"density": 0.1, "block_size": 64, "metric": "none", "damp": 1e-3}, 1e-4),
    "sparse GGT": (SparseGGT, {"density": 0.1, "block_size": 64}, 1e-4),
}


class Run:
    """An optimizer over parameters of zeros, whose gradients depend on the seed and the step alone."""

    def __init__(self, case, backend, shapes=SHAPES, dtype=torch.float32, **changes):
        cls, options, _ = CASES[case]
        self.params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
        options = {"num_grads": 3, **options, **changes}
        self.optimizer = cls(self.params, lr=0.01, backend=backend, **options)
        self.steps, self.bad = 0, None

    def step(self, absent=(), **changes):
        """The updates of one more step."""
        generator = torch.Generator().manual_seed(self.steps)
        before = [param.detach().clone() for param in self.params]
        for number, param in enumerate(self.params):
            drawn = torch.randn(param.shape, generator=generator) * (1 + number)
            param.grad = None if number in absent else drawn.to(param.dtype)
        if self.steps == self.bad:
            self.params[3].grad[3, 3] = float("nan")
        self.optimizer.step()
        self.steps += 1
        return [(param.detach() - old).double() for param, old in zip(self.params, before, strict=True)]


def assert_close(found, expected, tolerance):
    largest = max(float(update.abs().max()) for update in expected if update.numel())
    assert largest > 1e-9
    for one, other in zip(found, expected, strict=True):
        if one.numel():
            assert float((one - other).abs().max()) <= tolerance * max(float(other.abs().max()), 0.1 * largest)


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_references(case, monkeypatch):
    changes = {}
    if case.startswith("large, "):  # the interpreter is slow, and a window that is only called large wraps
        monkeypatch.setattr(graphs, "LARGEST_SOLVED", 2)
        changes = {"num_grads": 3}
    mine, expected = (Run(case, backend, **changes) for backend in ("triton", "reference"))
    assert mine.optimizer.backend == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none falls back
        for _ in range(4):  # the window wraps
            assert_close(mine.step(), expected.step(), CASES[case][2])
    assert mine.optimizer._whole is not None


@pytest.mark.parametrize("case", ["default", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters(case, dtype):
    mine, expected = Run(case, "triton", dtype=dtype), Run(case, "reference", dtype=dtype)
    for _ in range(3):
        assert_close(mine.step(), expected.step(), 2e-2)  # of a parameter that has grown


@pytest.mark.parametrize("case", ["default", "sparse, small", "sparse, one matrix"])
def test_two_runs_and_a_resume_have_the_same_bits(case):
    whole, part, resumed = (Run(case, "triton") for _ in range(3))
    updates = [whole.step() for _ in range(5)]
    for update in updates[:3]:
        assert_same(part.step(), update)
    file = io.BytesIO()
    torch.save(part.optimizer.state_dict(), file)
    file.seek(0)
    resumed.steps = 3
    for param, stopped in zip(resumed.params, part.params, strict=True):
        param.data.copy_(stopped.data)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(part)
    for update in updates[3:]:
        assert_same(resumed.step(), update)
    assert_same(copied.step(), updates[3])


def test_the_compiler_leaves_a_step_as_it_is():
    eager, mine = Run("sparse", "triton"), Run("sparse", "triton")
    torch._dynamo.reset()
    mine.optimizer.step = torch.compile(mine.optimizer.step, backend="eager")
    for _ in range(3):
        assert_same(mine.step(), eager.step())
    assert any(param.detach().any() for param in mine.params)
    torch._dynamo.reset()


def test_nonfinite_gradients():
    for nonfinite in ("raise", "skip"):
        run = Run("default", "triton", nonfinite=nonfinite)
        run.step()
        before = copy.deepcopy(run.optimizer.state_dict())
        for param in run.params:
            param.grad = torch.zeros_like(param)
        run.params[3].grad[3, 3] = float("nan")
        if nonfinite == "raise":
            with pytest.raises(ValueError, match=r"parameter 3 of group 0"):
                run.optimizer.step()
        else:
            run.optimizer.step()
            assert run.optimizer.skipped_steps == 1
        for number, state in before["state"].items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(run.optimizer.state_dict()["state"][number][name], value), name


@pytest.mark.parametrize("case", ["default", "factored", "rounded moments", "sparse, exact", "sparse, small"])
def test_nan_that_nobody_looks_for_does_what_it_does_in_plain_torch(case):
    mine, expected = (Run(case, backend, nonfinite="ignore") for backend in ("triton", "reference"))
    mine.bad = expected.bad = 1  # the step
    for _ in range(4):
        assert_close(mine.step(), expected.step(), CASES[case][2])
    for number, param in enumerate(mine.params):
        state, same = mine.optimizer.state[param], expected.optimizer.state[expected.params[number]]
        names = [name for name in same if name.startswith("second_moment") and same[name].is_floating_point()]
        for name in names:
            assert torch.equal(state[name].isnan(), same[name].isnan()), name
        assert any(same[name].isnan().any() for name in names) == (number == 3)


@pytest.mark.parametrize("case", ["default", "sparse"])
def test_gradients_of_zeros_move_nothing(case):
    run, expected = (Run(case, backend) for backend in ("triton", "reference"))
    for own in (run, expected):
        for _ in range(2):
            for param in own.params:
                param.grad = torch.zeros_like(param)
            own.optimizer.step()
        assert not any(param.detach().any() for param in own.params)
    assert_close(run.step(), expected.step(), CASES[case][2])


# What a step costs


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that would have been launched; none is."""
    names = []
    for module in (model, finite):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, *_, **__: names.append(kernel.fn.__name__) if all(grid) else None
        )
    return names


class Operations(TorchDispatchMode):
    """Counts torch's operations that are more than another view of a tensor."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function._schema.returns
        is_view = returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not is_view and not str(function).startswith("profiler"):
            self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


BEGIN = ["find_nonfinite", "advance"]
LOW_RANK = [*BEGIN, "observe", "sketch", "orthonormalise", "project", "keep_factors", "keep_error"]
LEAN = [*BEGIN, "observe_factored", "keep_means", *LOW_RANK[3:]]
LAUNCHES = {
    "default": [*LOW_RANK, "dots", "solve", "move"],
    "one matrix": [*LOW_RANK, "dots", "solve", "move"],
    "both moments": [*LOW_RANK, "dots_and_outside", "solve", "move"],
    "lean": [*LEAN, "dots", "solve", "move"],
    "lean, both moments": [*LEAN, "dots_and_outside", "solve", "move"],
    "sparse, factored": [*BEGIN, "observe_factored", "keep_means", "select", "sparse_products", "solve", "sparse_move"],
    "sparse, both moments": [*BEGIN, "observe", "select", "sparse_products", "solve", "sparse_move"],
    "sparse": [*BEGIN, "observe", "select", "sparse_products", "solve", "sparse_move"],
    "sparse, the paper's": [*BEGIN, "select", "sparse_products", "add_up", "sparse_move"],
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_do_not_depend_on_the_number_of_tensors(case, launched):
    counts = []
    for shapes in (SHAPES, SHAPES * 20):
        shapes = [shape for shape in shapes if shape != (0,)]
        run = Run(case, "triton", shapes=shapes, nonfinite="skip")
        run.step()
        launched.clear()
        with Operations() as operations:
            run.optimizer.step()
        assert launched == LAUNCHES[case]
        assert len(launched) <= 12
        counts.append(operations.seen)
    if case != "sparse, the paper's":  # whose matrix is solved on the CPU, and the length of its update checked
        assert counts[0] == counts[1]
        assert counts[0].total() <= 8


# What is refused


def test_what_the_kernels_have_no_step_for_is_said_once():
    for cls, options, reason in (
        (SparseMFAC, {"precondition": "gradient", "metric": "none", "damp": 1.0}, 'precondition="gradient"'),
        (LowRankMFAC, {"metric": "none", "damp": 1e-3}, "low-rank rows"),
        (SparseMFAC, {"block_size": 100}, "block_size=100"),
        (DenseMFAC, {}, "Identity rows"),
        (MicroAdam, {}, "AdamMoments"),
    ):
        param = torch.nn.Parameter(torch.zeros(20, 30))
        optimizer = cls([param], backend="triton", **options)
        param.grad = torch.ones_like(param)
        with pytest.warns(UserWarning, match="have no step for") as warned:
            (optimizer.step(), optimizer.step())
        assert len(warned) == 1
        assert reason in str(warned[0].message)
        assert param.detach().any()


def test_a_state_on_another_device_is_named():
    run = Run("default", "triton")
    run.step()
    run.optimizer.state[run.params[0]]["error"] = run.optimizer.state[run.params[0]]["error"].to("meta")
    before = [param.detach().clone() for param in run.params]
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* is on cpu, but error of its state on meta: load"):
        run.step()
    assert_same([param.detach() for param in run.params], before)
