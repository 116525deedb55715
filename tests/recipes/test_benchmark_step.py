"""The benchmark of a step: times, bytes and parts that are counted right."""

import pydoc
import sys
import time

import pytest
import torch
from benchmark_cases import SIZES, module, plenty


def test_streaming_counts_every_byte_twice(recipe):
    tensors = [
        torch.zeros(3, 5, dtype=torch.uint8),
        torch.zeros(7, dtype=torch.bfloat16),
        torch.zeros(1000),
        torch.zeros(0),
    ]
    seconds, counted = recipe.bench_measure.stream(tensors)
    assert counted == 2 * (15 + 14 + 4000)
    assert 0.0 < seconds < 1.0
    optimizer = recipe.bench_cases.build(recipe.bench_cases.parse_case("sparse_mfac num_grads=9"), module(), 0, plenty)
    memory = optimizer.memory()
    _, counted = recipe.bench_measure.stream(recipe.bench_cases.window_tensors(optimizer))
    assert counted == 2 * (memory["indices"] + memory["values"])


@pytest.mark.parametrize(
    "text",
    [
        "lowrank_mfac num_grads=9",
        "sparse_mfac num_grads=9,precondition=gradient",
        "dense_mfac num_grads=9,metric=none,precondition=gradient",
        "microadam",
        "published num_grads=9",
    ],
)
def test_the_parts_of_a_step_add_up(recipe, text):
    optimizer = recipe.bench_cases.build(recipe.bench_cases.parse_case(text), module(), 0, plenty)
    optimizer.step()
    whole, parts = recipe.bench_measure.timed_step(optimizer)
    assert list(parts) == [*recipe.bench_measure.PARTS, "rest"]
    assert sum(parts.values()) == pytest.approx(whole)
    assert all(seconds > 0.0 for seconds in parts.values())


@pytest.mark.parametrize(
    ("text", "function", "part"),
    [
        ("sparse_mfac num_grads=9", "hf_efcp.kernels.numba.combine", "update"),
        ("lowrank_mfac num_grads=9", "hf_efcp.kernels.numba.apply", "update"),
        ("sparse_mfac num_grads=9", "hf_efcp.kernels.numba.dots", "products"),
        ("lowrank_mfac num_grads=9", "torch.linalg.qr", "compress"),
        ("lowrank_mfac num_grads=9", "torch.linalg.cholesky_ex", "solve"),
        ("dense_mfac num_grads=9,metric=none", "torch.linalg.cholesky_ex", "solve"),
    ],
)
def test_time_counts_for_the_part_that_took_it(recipe, text, function, part, monkeypatch):
    optimizer = recipe.bench_cases.build(recipe.bench_cases.parse_case(text), module(), 0, plenty)
    optimizer.step()
    original, slept = pydoc.locate(function), []

    def slow(*args, **kwargs):
        time.sleep(0.05)
        slept.append(0.05)
        return original(*args, **kwargs)

    monkeypatch.setattr(function, slow)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that sleep at the same time would make the first step shorter than its parts
    try:
        _, parts = recipe.bench_measure.timed_step(optimizer)
    finally:
        torch.set_num_threads(threads)
    assert slept
    assert parts[part] >= 0.7 * sum(slept) / 2  # in two steps, of which the second tells the shares of the first
    assert parts["rest"] > 0.0


def test_optimizers_of_other_libraries_have_no_parts(recipe):
    adamw = recipe.bench_cases.build(recipe.bench_cases.parse_case("adamw weight_decay=0.1"), module(), 0, plenty)
    assert adamw.defaults["weight_decay"] == 0.1
    assert adamw.defaults["fused"]
    whole, parts = recipe.bench_measure.timed_step(adamw)
    assert whole > 0.0
    assert parts == {}
    numel = sum(torch.Size(size).numel() for size in SIZES)
    assert recipe.bench_cases.state_memory(adamw)["total"] == 8 * numel + 4 * len(SIZES)


@pytest.mark.parametrize("method", ["VmHWM", "sampled"])
def test_the_peak_of_resident_memory_is_seen(recipe, method, monkeypatch):
    measure = recipe.bench_measure
    if method == "sampled":
        monkeypatch.setattr(measure, "_reset_high_water", lambda: False)
    elif not measure._reset_high_water():
        pytest.skip("the kernel does not let its mark be set back")

    def step():
        block = torch.ones(16 << 20)  # 64 MiB
        time.sleep(0.3)
        del block

    peak, how = measure.peak_memory(step)
    assert how == method
    assert 60 << 20 < peak < 90 << 20


def test_cases_are_read(recipe):
    parse = recipe.bench_cases.parse_case
    small = parse("small one: sparse_mfac num_grads=64,block_size=256")
    assert (small.label, small.optimizer, small.options) == ("small one", "sparse_mfac", "num_grads=64,block_size=256")
    assert parse("dense_ggt").label == "dense_ggt"
    assert not small.optional
    with pytest.raises(
        ValueError, match=r"unknown optimizer 'sparse_mfax' .* expected one of sparse_mfac, .*published"
    ):
        parse("x: sparse_mfax num_grads=3")
    assert recipe.peers.parse_options("a=1, b=0.5,c=true") == {"a": 1, "b": 0.5, "c": True}
    with pytest.raises(ValueError, match="expected key=value .* got 'fused'"):
        recipe.peers.parse_options("fused")


def test_the_default_cases_can_be_built(recipe):
    """Whatever cannot is left out of a run, for lack of memory or of GaLore; options that are wrong would be too."""
    cases = recipe.bench_cases
    elsewhere = {"galore_torch", "adamw_8bit", *recipe.peers.PEERS}  # test_peers.py has them
    chosen = [case for case in cases.DEFAULTS if case.optimizer not in elsewhere]
    built, left_out = recipe.bench_steps.build_all(chosen, module(), 0)
    assert set(built) == {case.label for case in chosen}
    assert left_out == {}
    default, moments = built[cases.LOW_RANK].param_groups[0], built[cases.MOMENTS].param_groups[0]
    assert (default["metric_dtype"], default["precondition"], default["num_grads"]) == ("int8", "row", 16)
    assert (moments["metric_dtype"], moments["precondition"]) == ("float32", "momentum")
    assert cases.state_memory(built[cases.LOW_RANK])["metric"] < cases.state_memory(built[cases.MOMENTS])["metric"]
    for label in (cases.SPARSE_256, cases.SPARSE_1024, cases.SMALLEST):
        assert built[label].param_groups[0]["metric"] == "none"


def test_what_cannot_be_built_is_left_out_or_an_error(recipe, monkeypatch):
    cases, steps = recipe.bench_cases, recipe.bench_steps
    wrong = [
        cases.Case("a", "sparse_mfac", "num_gradz=3", optional=True),
        cases.Case("b", "galore_torch", optional=True),
        cases.Case("c", "sgd", optional=True),
    ]
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    built, left_out = steps.build_all(wrong, module(), 0)
    assert list(built) == ["c"]
    assert "unknown key 'num_gradz'" in left_out["a"]
    assert "pip install galore_torch" in left_out["b"]
    with pytest.raises(ValueError, match="unknown key"):
        steps.build_all([cases.parse_case("sparse_mfac num_gradz=3")], module(), 0)
    with pytest.raises(MemoryError, match=r"dense_mfac needs .* GiB of state, and .* GiB may be used"):
        cases.build(cases.parse_case("dense_mfac"), module(), 0, lambda: 1000)
