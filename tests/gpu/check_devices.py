"""What a step moves between a device and the host: "meta" is the device, so nothing is computed, and nothing hidden."""

import pytest
import torch
from check_steps import CASES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_efcp import LowRankGGT, LowRankMFAC, SparseGGT, SparseMFAC, kernels, whole
from hf_efcp.kernels.triton import changing, finite, model

META, CPU = torch.device("meta"), torch.device("cpu")
SHAPES = [(12, 9), (10,), (0,), (24, 17)]
DENSE = {"precondition": "momentum"}
PAPERS = {"metric": "none", "damp": 1e-3}
MORE = {
    "large, sparse, both moments": (SparseMFAC, {"num_grads": 65, **DENSE}),
    "large, one matrix": (LowRankMFAC, {"num_grads": 65, "scope": "model"}),
    "large, GGT, lean": (LowRankGGT, {"num_grads": 65, "metric": "factored", **DENSE}),
    "sparse GGT, both moments": (SparseGGT, DENSE),
    "the paper's, by layer": (SparseMFAC, {"num_grads": 65, "scope": "layer", **PAPERS}),
}
EVERY = {name: (cls, options) for name, (cls, options, _) in CASES.items()} | MORE
# What a step reads of the device, and what it copies: nothing, but for these. Eigenvalues on a device are waited for
# inside torch.
READS = {
    "large, absolute": ["tolist"],  # which matrices are singular
    "absolute dampening": ["tolist"],
    "hardly damped": ["tolist"],
    "large, the paper's": ["tolist", "__float__"],  # and how long the update is
    "the paper's, by layer": ["tolist", "__float__"] * len(SHAPES),
    "large, GGT of the paper": ["__float__"],
}
COPIES = {
    **{case: ["to the host"] for case in ("GGT", "GGT, L2", "sparse GGT", "sparse GGT, both moments")},
    "sparse, the paper's": ["to the host", "to the device"],
}


class Moved(TorchDispatchMode):
    """Refuses operations on tensors of two devices, notes copies from one to the other, and counts what is computed."""

    def __init__(self):
        super().__init__()
        self.copies, self.operations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in ("aten::_to_copy", "aten::copy_"):
            to = kwargs.get("device", args[0].device)
            if tensors[-1].device != to:
                self.copies.append("to the device" if to == META else "to the host")
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype), device=to)
        given = {x.device.type for x in tensors if x.dim()}
        assert len(given) <= 1, f"{name} of tensors on {given}"
        returned = function._schema.returns
        self.operations += not (returned and returned[0].alias_info and not returned[0].alias_info.is_write)
        return function(*args, **kwargs)


def uploaded(array, where):
    """Through pinned memory, which nothing waits for."""
    tensor = torch.from_numpy(array)
    return tensor if where == CPU else torch.empty(tensor.shape, dtype=tensor.dtype, device=where)


@pytest.fixture
def step(monkeypatch):
    """Makes the last of some steps, and tells what it reads, copies, launches and computes."""
    reads, launched = [], []

    def launch(kernel, grid, *given, **_):
        assert all(x.device == META for x in given if isinstance(x, torch.Tensor)), kernel
        launched.extend([kernel.fn.__name__] if all(grid) else [])

    def reading(name, read, number):
        def noted(tensor):
            reads.extend([name] if tensor.device == META else [])
            return number(tensor) if tensor.device == META else read(tensor)

        monkeypatch.setattr(torch.Tensor, name, noted)

    def stepped(case, shapes=SHAPES, absent=(), **changes):
        cls, options = EVERY[case]
        params = [torch.nn.Parameter(torch.zeros(shape, device=META)) for shape in shapes]
        optimizer = cls(params, lr=0.01, backend="triton", **{"num_grads": 3, **options, **changes})
        for number in range(3):
            for place, param in enumerate(params):
                param.grad = None if number == 1 and place in absent else torch.zeros_like(param)
            reads.clear(), launched.clear()
            with Moved() as moved:
                optimizer.step()
        assert optimizer._whole is not None
        return reads, moved.copies, launched, moved.operations

    for module in (model, finite):
        monkeypatch.setattr(module, "launch", launch)
    for module in (changing, finite, model, whole):
        monkeypatch.setattr(module, "upload", uploaded)
    monkeypatch.setattr(kernels, "_check_triton", lambda device: None)
    reading("tolist", torch.Tensor.tolist, lambda tensor: torch.zeros(tensor.shape).tolist())
    for name in ("__float__", "item"):
        reading(name, getattr(torch.Tensor, name), lambda tensor: 0.0)
    return stepped


@pytest.mark.parametrize("case", EVERY)
def test_what_a_step_waits_for(case, step):
    reads, copies, launched, _ = step(case, nonfinite="skip")
    assert reads == ["tolist", *READS.get(case, [])]  # the check of the gradients
    assert copies == COPIES.get(case, [])
    assert 6 <= len(launched) <= 12
    reads, copies, _, _ = step(case, nonfinite="ignore")
    assert reads == READS.get(case, [])
    assert copies == COPIES.get(case, [])


@pytest.mark.parametrize("case", ["large", "large, sparse, both moments", "large, GGT"])
def test_windows_at_several_places_are_not_waited_for(case, step):
    reads, copies, _, _ = step(case, absent=(1,), nonfinite="ignore")
    assert reads == copies == []


@pytest.mark.parametrize("case", ["default", "GGT", "large", "large, GGT, lean", "large, absolute"])
def test_operations_do_not_depend_on_the_number_of_tensors(case, step):
    few, many = (step(case, shapes)[3] for shapes in (SHAPES, SHAPES * 10))
    assert few == many
