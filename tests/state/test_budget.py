"""A memory budget: what it means, and the largest window that fits."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Regression, set_gradients
from torch import nn
from variants import VARIANTS, names, taken

from hf_efcp import (
    EFCP,
    SparseAdaGrad,
    SparseMFAC,
    create_optimizer,
    estimate_memory,
    largest_window,
)
from hf_efcp.budget import in_bytes
from hf_efcp.compressors import TopK
from hf_efcp.preconditioners import MFAC

WINDOWED = [name for name in names() if VARIANTS[name][0] is not SparseAdaGrad]


def without_window(name: str) -> tuple[type[EFCP], dict]:
    cls, arguments = VARIANTS[name]
    return cls, {key: value for key, value in arguments.items() if key != "num_grads"}


def stepped(optimizer: EFCP) -> EFCP:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_gradients(params, [torch.ones_like(param) if param.requires_grad else None for param in params])
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        (300_000_000, 300_000_000),
        ("300000000", 300_000_000),
        ("7B", 7),
        ("1kB", 1000),
        ("1.5 MB", 1_500_000),
        ("2GB", 2 * 10**9),
        ("1TB", 10**12),
        ("1KiB", 1024),
        ("0.5MiB", 2**19),
        ("2GiB", 2**31),
        ("1TiB", 2**40),
        ("8B/param", 8 * 12_345),
        (" 7.5 B/param ", 92_587),  # 92,587.5, rounded down
        ("1.001kB", 1001),  # 1000.9999... in floating point
        ("1kB/param", 12_345_000),
    ],
)
def test_budgets_in_bytes(text, expected):
    assert in_bytes(text, 12_345) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "much", "8b", "8 bits", "300mb", "300Mb", "KB", "1KB", "8/param", "8B/parameter", "8B per param", "-1B"),
        *("0B", 0, -5, True, 8.0, "1e9B", "8,5B", "nanB", "8B/param/param", b"8B", "٣B"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_forms_that_are(wrong):
    forms = r'memory_budget must be "8B/param" \(bytes per trainable parameter\), "300MB", "2GiB", or a positive int of'
    with pytest.raises(ValueError, match=forms + f".*got {re.escape(repr(wrong))}$"):
        SparseMFAC([nn.Parameter(torch.zeros(9))], memory_budget=wrong)


@pytest.mark.parametrize("name", WINDOWED)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_window_is_the_largest_that_fits(name, data):
    cls, arguments = without_window(name)
    drawn = {
        "density": data.draw(st.floats(0.001, 1.0)),
        "rank": data.draw(st.integers(1, 9)),
        "momentum": data.draw(st.sampled_from((0.0, 0.9))),
        "error_dtype": data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.int8, torch.uint4))),
        "value_dtype": data.draw(st.sampled_from((torch.float32, torch.bfloat16))),
        "block_size": data.draw(st.sampled_from((1, 7, 64, 256, 300))),
    }
    if "block_size" in arguments and data.draw(st.booleans()):
        drawn["value_dtype"] = torch.int8
    arguments |= taken(name, **drawn)
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=4))
    params = [nn.Parameter(torch.empty(*shape, 1, device="meta")) for shape in shapes]
    groups = [{"params": params}, {"params": [nn.Parameter(torch.empty(50, device="meta"))]}]
    groups[1]["preconditioned"] = data.draw(st.booleans())
    if not sum(param.numel() for param in params):
        groups[1]["preconditioned"] = True

    least = estimate_memory(groups, cls, num_grads=1, **arguments)["total"]
    limit = data.draw(st.one_of(st.integers(least, 2 * least), st.integers(least, 10**7)))
    largest = largest_window(groups, cls, memory_budget=limit, **arguments)
    totals = [estimate_memory(groups, cls, num_grads=m, **arguments)["total"] for m in (largest, largest + 1)]
    assert totals[0] <= limit < totals[1]
    # And where a window just fits, it is taken; a byte less, and it is not.
    for m in {1, largest, 17}:
        exact = estimate_memory(groups, cls, num_grads=m, **arguments)["total"]
        assert largest_window(groups, cls, memory_budget=exact, **arguments) == m
        if m > 1:
            assert largest_window(groups, cls, memory_budget=exact - 1, **arguments) == m - 1
    with pytest.raises(ValueError, match=f"a window of one gradient takes {least:,}"):
        largest_window(groups, cls, memory_budget=least - 1, **arguments)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_state_of_a_real_step_fits_and_is_that_of_the_number(name):
    cls, arguments = without_window(name)
    arguments |= taken(name, backend="reference")  # compiles nothing
    problem = Regression(width=90)
    least = estimate_memory(problem.parameters(), cls, num_grads=11, **arguments)["total"]
    budgeted = cls(problem.parameters(), memory_budget=least + 3, **arguments)
    assert all(type(group["num_grads"]) is int and group["num_grads"] == 11 for group in budgeted.param_groups)
    assert stepped(budgeted).memory()["total"] == least
    numbered = cls(problem.parameters(), num_grads=11, **arguments)
    numbered.load_state_dict(torch.load(_saved(budgeted), weights_only=True))
    params = [[p for group in o.param_groups for p in group["params"]] for o in (budgeted, numbered)]
    for ours, theirs in zip(*params, strict=True):
        theirs.data.copy_(ours.data)
    for step in range(13):  # the window wraps
        for own, optimizer in zip(params, (budgeted, numbered), strict=True):
            set_gradients(own, problem.gradients(own, step))
            optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*params, strict=True))
    assert any(not torch.equal(ours, start) for ours, start in zip(params[0], problem.start, strict=True))
    copy.deepcopy(budgeted).load_state_dict(copy.deepcopy(numbered.state_dict()))  # and the other way round
    other = cls(problem.parameters(), num_grads=12, **arguments)
    with pytest.raises(ValueError, match="num_grads=11, this optimizer has num_grads=12"):
        other.load_state_dict(budgeted.state_dict())


def _saved(optimizer: EFCP) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", WINDOWED)
def test_both_a_number_and_a_budget_are_an_error(name):
    cls, arguments = without_window(name)
    default = cls([nn.Parameter(torch.zeros(9))], **arguments).param_groups[0]["num_grads"]
    for num_grads in (3, default):
        with pytest.raises(ValueError, match=f"num_grads={num_grads} and memory_budget='9kB' both choose the window"):
            cls([nn.Parameter(torch.zeros(9))], num_grads=num_grads, memory_budget="9kB", **arguments)
    assert type(default) is int


def test_an_optimizer_of_own_parts_takes_a_budget_too():
    parts = {"compressor": TopK(0.5), "preconditioner": MFAC(damp=1e-3)}
    optimizer = EFCP([nn.Parameter(torch.zeros(10))], 0.1, memory_budget=10 * 4 + 5 * 4 * 7 + 8 * 7**2, **parts)
    assert optimizer.param_groups[0]["num_grads"] == 7
    with pytest.raises(TypeError, match="num_grads must be an int, got None"):
        EFCP([nn.Parameter(torch.zeros(10))], 0.1, **parts)


def test_parameters_later_added_are_not_counted_but_share_the_window():
    optimizer = SparseMFAC([nn.Parameter(torch.zeros(100))], memory_budget="40B/param", backend="reference")
    window = optimizer.param_groups[0]["num_grads"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1000))]})
    assert [group["num_grads"] for group in optimizer.param_groups] == [window, window]
    assert stepped(optimizer).param_groups[0]["num_grads"] == window


def test_excluded_parameters_count_and_frozen_ones_do_not():
    inside, outside, frozen = (nn.Parameter(torch.zeros(1000)) for _ in range(3))
    frozen.requires_grad_(False)
    alone = largest_window([inside, frozen], memory_budget=12_000)
    assert alone == largest_window([inside, frozen], memory_budget="12B/param") > 1
    groups = [{"params": [inside]}, {"params": [outside, frozen], "preconditioned": False}]
    assert largest_window(groups, memory_budget=12_000 + 8_004) == alone  # AdamW's moments and its step
    assert largest_window(groups, memory_budget=12_000 + 8_003) <= alone
    assert largest_window(groups, memory_budget="12B/param") == largest_window(groups, memory_budget=24_000)
    assert set(groups[0]) == {"params"}


def test_a_budget_that_is_too_small_says_what_is_needed():
    params = [nn.Parameter(torch.zeros(4096)), nn.Parameter(torch.zeros(4))]
    # One row: 41 + 1 entries of 4 bytes, and 8 of each Gram matrix. A byte an entry and 4 for 64 of them are the error.
    message = (
        "memory_budget='4B/param' is 16,400 bytes for 4,100 parameters, but a window of one gradient takes 29,144: 184 "
        "for the row, and 28,960 whatever num_grads is (error 4,360, momentum 8,200, metric 16,400). Raise the budget, "
        "or lower what the optimizer has of these: "
    )
    moments = {"metric_dtype": torch.float32, "precondition": "momentum"}
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseMFAC(params, memory_budget="4B/param", **moments)
    assert largest_window(params, SparseMFAC, memory_budget=29_144, **moments) == 1
    assert largest_window(params, SparseMFAC, memory_budget="4B/param") > 1
    # Without a metric: one Gram matrix, and the error in float32.
    with pytest.raises(ValueError, match=r"takes 16,576: 176 for the row, and 16,400 whatever .* \(error 16,400\)\."):
        SparseMFAC(params, memory_budget="4B/param", metric="none")
    settings = {"metric": "none", "error_dtype": torch.int8}
    assert largest_window(params, SparseMFAC, memory_budget="4B/param", **settings) > 1


def test_nothing_to_fit_is_an_error():
    param = nn.Parameter(torch.zeros(10))
    with pytest.raises(ValueError, match="none of them requires a gradient: give num_grads"):
        SparseMFAC([{"params": [param], "preconditioned": False}], memory_budget="8B/param")
    with pytest.raises(ValueError, match="none of them requires a gradient: give num_grads"):
        SparseMFAC([param.requires_grad_(False)], memory_budget="1GB")
    with pytest.raises(ValueError, match="SparseAdaGrad keeps one row: leave it out"):
        largest_window([nn.Parameter(torch.zeros(10))], SparseAdaGrad, memory_budget="8B/param")
    with pytest.raises(ValueError, match="SparseAdaGrad keeps one row: leave it out"):
        create_optimizer("sparse_adagrad", nn.Linear(2, 2), memory_budget="8B/param")


def test_sharded_parameters_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        whole = nn.Parameter(torch.zeros(8, 4))
        param = nn.Parameter(distribute_tensor(whole.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match="call hf_efcp.largest_window before fully_shard, and give the num_grads"):
            SparseMFAC([param], memory_budget="80B/param")
        assert SparseMFAC([param], num_grads=largest_window([whole], SparseMFAC, memory_budget="80B/param"))
    finally:
        torch.distributed.destroy_process_group()
