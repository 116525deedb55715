"""Steps in a graph, without a GPU: what a step starts is recorded, and then replayed with none of its Python."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efcp import LowRankGGT, LowRankMFAC, SparseMFAC, diagnostics, graphs
from hf_efcp.kernels.triton import launch, model

SHAPES = [(12, 9), (10,), (0,), (24, 17)]
CASES = {
    "default": (LowRankMFAC, {}),
    "one matrix": (LowRankMFAC, {"scope": "model", "rank": 2, "weight_decay": 0.1}),
    "lean": (LowRankMFAC, {"metric": "factored"}),
    "both moments": (LowRankMFAC, {"precondition": "momentum", "momentum": 0.5}),
    "sparse": (SparseMFAC, {"density": 0.1, "block_size": 64, "value_dtype": torch.int8}),
    "gradient": (SparseMFAC, {"density": 0.1, "block_size": 64, "precondition": "gradient", "relative_damp": 1.0}),
}
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Graph(TorchDispatchMode):
    """Records operations and launches as a CUDA graph does: with the memory that they had, and without doing them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls = []
        self.kept = []  # a graph's memory is its own
        self.patch = monkeypatch

    def __enter__(self):
        self.patch.setattr(graphs, "is_captured", lambda device: True)
        # Learning rates that are tensors are on the device, and nobody looks at them there.
        self.patch.setattr(graphs, "check_group", lambda group: {**group, "lr": 0.0})
        self.patch.setattr(
            model, "launch", lambda *given, **named: self.calls.append((launch.launch, given, named, None))
        )
        for name in READS:
            self.patch.setattr(torch.Tensor, name, refused)
        self.patch.setattr(torch, "from_numpy", refused)  # a copy from memory that may be another by then
        return super().__enter__()

    def __exit__(self, *raised):
        self.patch.undo()
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            refused()
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in function._schema.arguments
        )
        returned = function._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not writes
        found = (args[0] if returned else None) if writes else function(*args, **kwargs)
        self.kept.append((args, found))
        if not is_view and "empty" not in str(function) and not str(function).startswith("profiler"):
            self.calls.append((function, args, kwargs, None if writes else found))
        return found

    def replay(self):
        for function, args, kwargs, kept in self.calls:
            found = function(*args, **kwargs)
            if isinstance(kept, torch.Tensor):
                kept.copy_(found)


def captured(run, monkeypatch):
    """A graph of a step of a run, with gradients of its own at other addresses."""
    run.renew()
    with Graph(monkeypatch) as graph:
        run.optimizer.step()
    return graph


def refused(*_, **__):
    raise AssertionError("numbers go between the host and the device, which a replay does not see")


class Run:
    """A capturable optimizer whose gradients have places of their own, as those of a captured backward have."""

    def __init__(self, case, lr=0.01, **changes):
        cls, options = CASES[case]
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        given = {"capturable": True, "nonfinite": "ignore", "backend": "triton", "num_grads": 3, **options, **changes}
        self.optimizer = cls(self.params, lr=lr, **given)
        self.steps = 0
        self.renew()

    def renew(self):
        for param in self.params:
            param.grad = torch.zeros_like(param)

    def updates(self, step):
        """What `step` changes, after new gradients."""
        generator = torch.Generator().manual_seed(self.steps)
        for number, param in enumerate(self.params):
            param.grad.copy_(torch.randn(param.shape, generator=generator) * (1 + number))
        before = [param.detach().clone() for param in self.params]
        step()
        self.steps += 1
        return [param.detach() - old for param, old in zip(self.params, before, strict=True)]

    def step(self):
        return self.updates(self.optimizer.step)


def assert_same(left, right):
    assert any(update.any() for update in left)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(case, monkeypatch):
    eager, mine = Run(case), Run(case)
    for _ in range(2):
        assert_same(mine.step(), eager.step())
    unchanged = copy.deepcopy(mine.optimizer.state_dict())
    graph = captured(mine, monkeypatch)
    for number, state in unchanged["state"].items():
        for name, value in state.items():
            now = mine.optimizer.state_dict()["state"][number][name]
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value
    for _ in range(3):  # the window wraps
        assert_same(mine.updates(graph.replay), eager.step())
    own = [param.grad for param in mine.params]
    mine.renew()
    assert_same(mine.step(), eager.step())  # counts what was replayed, with gradients elsewhere
    for param, gradient in zip(mine.params, own, strict=True):
        param.grad = gradient
    assert_same(mine.updates(graph.replay), eager.step())
    saved, expected = mine.optimizer.state_dict(), eager.optimizer.state_dict()
    assert saved["state"][0]["pushed"] == expected["state"][0]["pushed"] == mine.steps == 7
    assert saved["state"][3]["gradients"] == 7


def test_what_is_capturable_has_the_bits_of_what_is_not():
    eager, mine = Run("default", capturable=False), Run("default")
    for _ in range(4):
        assert_same(mine.step(), eager.step())


def test_a_learning_rate_that_is_a_tensor_is_read_by_every_replay(monkeypatch):
    lr = torch.tensor(0.01)
    eager, mine = Run("default", float(lr), capturable=False), Run("default", lr)
    assert_same(mine.step(), eager.step())
    with Graph(monkeypatch) as graph:
        mine.optimizer.step()
    for rate in (0.01, 0.002, 0.0):
        lr.fill_(rate)
        eager.optimizer.param_groups[0]["lr"] = float(lr)
        found, expected = mine.updates(graph.replay), eager.step()
        assert any(update.any() for update in expected) == (rate > 0.0)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_it_resumes_and_is_copied_to_the_bit(monkeypatch):
    whole = Run("default")
    whole.step()
    graph = captured(whole, monkeypatch)
    for _ in range(3):
        whole.updates(graph.replay)
    copied, resumed = copy.deepcopy(whole), Run("default")
    copied.renew()
    resumed.steps = whole.steps
    for param, stopped in zip(resumed.params, whole.params, strict=True):
        param.data.copy_(stopped.data)
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    expected = whole.updates(graph.replay)
    assert_same(resumed.step(), expected)
    assert_same(copied.step(), expected)


def test_a_table_that_is_made_anew_leaves_the_graph_its_own(monkeypatch):
    """Switching heavy-ball momentum on is another table; the graph goes on without, and both count together."""
    mine = Run("default")
    mine.step()
    graph = captured(mine, monkeypatch)
    mine.updates(graph.replay)
    table = mine.optimizer._whole._model.table
    mine.optimizer.param_groups[0]["heavy_ball"] = 0.5
    mine.step()
    assert mine.optimizer._whole._model.table is not table
    mine.optimizer.param_groups[0]["heavy_ball"] = 0.0
    eager = copy.deepcopy(mine)
    eager.renew()
    assert_same(mine.updates(graph.replay), eager.step())
    assert mine.optimizer.state_dict()["state"][0]["pushed"] == mine.steps == 4


def test_a_number_in_the_place_of_a_tensor_is_sent():
    run = Run("default", torch.tensor(0.01))
    run.step()
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert not any(update.any() for update in run.step())


def test_diagnostics_see_what_was_replayed(monkeypatch):
    run = Run("default")
    run.step()
    graph = captured(run, monkeypatch)
    before = diagnostics.snapshot(run.optimizer)
    run.updates(graph.replay)
    assert diagnostics.measure(run.optimizer, before)["update_norm"] > 0.0  # of a step that was not skipped


# What is refused


def test_a_capture_before_the_first_step(monkeypatch):
    run = Run("default")
    with pytest.raises(RuntimeError, match="make a step with the same parameters"), Graph(monkeypatch):
        run.optimizer.step()


def test_a_learning_rate_that_is_a_tensor_elsewhere(monkeypatch):
    run = Run("default")
    run.step()
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.01, device="meta")
    with pytest.raises(RuntimeError, match="lr is a tensor on meta"), Graph(monkeypatch):
        run.optimizer.step()


def test_a_capture_without_capturable(monkeypatch):
    run = Run("default", capturable=False)
    run.step()
    with pytest.raises(RuntimeError, match=r"given capturable=True"), Graph(monkeypatch):
        run.optimizer.step()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_that_is_missing(frozen):
    run = Run("one matrix")
    run.step()
    run.params[1].grad = None
    run.params[1].requires_grad = not frozen
    before = [param.detach().clone() for param in run.params]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* had gradients and has none now"):
        run.optimizer.step()
    for param, old in zip(run.params, before, strict=True):
        assert torch.equal(param, old)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "raise"}, 'nonfinite="ignore"'),
        ({"metric": "none"}, 'metric="adam" or "factored"'),
        ({"damp": 0.1}, "without absolute dampening"),
        ({"num_grads": 65}, "num_grads of at most 64"),
        ({"num_grads": None, "memory_budget": "1GB"}, "num_grads of at most 64"),
        ({"nonfinite": "skip", "num_grads": 65}, 'nonfinite="ignore" and num_grads of at most 64'),
    ],
)
def test_settings_that_the_host_has_a_part_in(options, message):
    given = {"nonfinite": "ignore", "capturable": True, **options}
    with pytest.raises(ValueError, match=f"capturable=True needs .*{message}"):
        LowRankMFAC([torch.nn.Parameter(torch.zeros(3, 4))], **given)


def test_other_optimizers_and_backends():
    param = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="M-FAC without absolute dampening"):
        LowRankGGT([param], nonfinite="ignore", capturable=True)
    param.grad = torch.ones(3, 4)
    for backend, name in (("reference", 'backend="reference"'), ("numba", 'backend="numba"')):
        optimizer = LowRankMFAC([param], nonfinite="ignore", capturable=True, backend=backend)
        with pytest.raises(ValueError, match=f"needs the Triton kernels, which have no step for {name}"):
            optimizer.step()
    with pytest.raises(ValueError, match=r"AdamW\(capturable=True\)"):
        LowRankMFAC([{"params": [param], "preconditioned": False}], nonfinite="ignore", capturable=True)
    assert not param.detach().any()


def test_dampening_that_is_lost_in_rounding():
    run = Run("default")
    run.step()
    run.optimizer.param_groups[0].update(trust_lr=0.0, relative_damp=1e-8)
    with pytest.raises(ValueError, match="relative_damp of at least 1e-06"):
        run.step()
