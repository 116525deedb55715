"""The benchmark of a step: an honest baseline, windows that are valid, bytes and parts that are counted right."""

import json
import pydoc
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from naive import NaiveMFAC
from problems import Regression, flat, set_gradients
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_efcp import create_optimizer
from hf_efcp.blocks import as_indices
from hf_efcp.factory import parse_optim_args

ROOT = Path(__file__).parents[2]

SIZES = [(40, 30), (17,), (300,), ()]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "good", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


def module(seed=0):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.nn.ParameterList(torch.zeros(size) for size in SIZES)
    for param in whole.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return whole


def plenty():
    return 1 << 40


# The published algorithm


@pytest.mark.parametrize("num_grads", [5, 16])  # the window wraps, or does not
def test_the_published_algorithm_makes_the_updates_of_brute_force(recipe, num_grads):
    problem = Regression(seed=3)
    theirs = problem.parameters()
    settings = dict(lr=0.02, num_grads=num_grads, density=0.15, damp=1e-3)
    published = recipe.bench_baselines.AsPublished(theirs, **settings)
    whole, blocks = (NaiveMFAC(theirs, block_size=size, **settings) for size in (None, 4096))
    off = {whole: [], blocks: []}
    for step in range(12):
        before = flat(theirs)
        gradients = problem.gradients(theirs, step)
        set_gradients(theirs, gradients)
        published.step()
        moved = flat(theirs) - before
        assert moved.norm() > 1e-3
        for naive in off:
            start = flat(naive.thetas)
            naive.step(gradients)
            expected = flat(naive.thetas) - start
            off[naive].append((moved - expected).norm() / expected.norm())
    assert max(off[whole]) < 1e-4
    assert min(off[blocks]) > 0.1  # Top-k in each parameter, which is another algorithm
    order = [i % num_grads for i in range(12)][-num_grads:]  # of the rows, oldest first
    rows = torch.stack(whole.rows)
    gram = rows @ rows.T
    assert torch.allclose(published.gram[order][:, order], gram, rtol=1e-5, atol=1e-6 * float(gram.max()))
    assert torch.equal(published.error.to(torch.float64), flat(whole.errors))


def test_the_published_window_is_filled_with_distinct_unordered_places(recipe):
    published = recipe.bench_baselines.AsPublished(module().parameters(), 0.0, num_grads=7, density=0.1)
    published.fill(seed=0)
    numel = sum(torch.Size(size).numel() for size in SIZES)
    assert published.indices.shape == (7, -(-numel // 10))
    assert all(len(set(row.tolist())) == published.kept for row in published.indices)
    assert published.indices.min() >= 0
    assert published.indices.max() < numel
    assert (published.indices.diff(dim=1) < 0).any()
    assert published.values.std() == pytest.approx(1e-2, rel=0.1)
    before = flat(param for group in published.param_groups for param in group["params"])
    published.step()
    assert published.pushed == 8
    assert torch.equal(before, flat(param for group in published.param_groups for param in group["params"]))


def test_the_published_window_shrinks_to_the_memory_there_is_and_its_time_grows_back(recipe):
    cases, steps = recipe.bench_cases, recipe.bench_steps
    model = module()
    numel = sum(param.numel() for param in model.parameters())
    row, temporaries = 12 * -(-numel // 10), 24 * numel
    case = cases.parse_case("published num_grads=64,density=0.1")
    small = cases.build(case, model, 0, lambda: int((temporaries + 8 * row + row // 2) / 0.8))
    assert small.num_grads == 8
    assert cases.build(case, model, 0, plenty).num_grads == 64
    with pytest.raises(MemoryError, match="no room for a single row"):
        cases.build(case, model, 0, lambda: temporaries)
    report = steps.measure_steps([case], {case.label: small}, model, {}, repeats=3, published_repeats=2)
    (result,) = report.results
    assert result.extrapolated_from == 8
    assert len(result.repeats) == 2
    parts = result.parts
    assert result.seconds == pytest.approx(sum(parts.values()), rel=0.2)
    measured = parts["compress"] + parts["solve"] + parts["rest"] + (parts["products"] + parts["update"]) / 8
    assert sum(result.repeats) / 2 == pytest.approx(measured, rel=1e-6)
    assert "memory had room for 8 rows" in "\n".join(report._extrapolations())


# Windows


@pytest.mark.parametrize(
    "text",
    [
        "sparse_mfac num_grads=9,density=0.05,block_size=64,metric=none",
        "sparse_mfac num_grads=9,density=0.3,block_size=500,value_dtype=float32",
        "sparse_mfac num_grads=9,exclude=^1$,metric=none",
        "sparse_ggt num_grads=9,density=0.05,metric=none",
        "microadam num_grads=9,density=0.05",
        "sparse_adagrad",
        "lowrank_mfac num_grads=9,rank=2",
        "lowrank_mfac num_grads=9,rank=2,metric=factored,precondition=momentum",
        "lowrank_ggt num_grads=9,metric=none",
        "dense_mfac num_grads=9,scope=model",
    ],
)
def test_filled_windows_are_valid(recipe, text):
    case = recipe.bench_cases.parse_case(text)
    model = module()
    before = flat(model.parameters())
    optimizer = recipe.bench_cases.build(case, model, 0, plenty)
    again = create_optimizer(case.optimizer, module(), lr=0.0, **parse_optim_args(case.optimizer, case.options))
    again.load_state_dict(optimizer.state_dict())  # which checks shapes, dtypes and indices
    group = optimizer.param_groups[0]
    capacity = group["num_grads"]
    for param, state in optimizer.state.items():
        if "indices" in state and param.numel() >= 300:
            assert as_indices(state["indices"], group["block_size"]).to(torch.int64).unique().numel() > 1
        if "gram" in state:
            assert torch.linalg.eigvalsh(state["gram"])[0] > 0.5 * state["gram"].diagonal().mean()
        if "pushed" in state:
            assert state["pushed"] == capacity
    for _ in range(capacity + 2):
        optimizer.step()
        for param, state in optimizer.state.items():
            # Nine rows of a few entries, as layers may have, cannot be orthogonal.
            if "gram" in state and (group["scope"] == "model" or param.numel() >= 300):
                # With the least dampening, the solve is a Cholesky decomposition.
                damped = state["gram"] + 1e-5 * capacity * torch.eye(capacity, dtype=torch.float64)
                assert torch.linalg.cholesky_ex(damped)[1] == 0
    assert torch.equal(before, flat(model.parameters()))


def test_rows_are_ascending_and_as_long_as_the_first(recipe):
    model = torch.nn.ParameterList([torch.zeros(50, 100)])
    model[0].grad = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    case = recipe.bench_cases.parse_case("sparse_mfac num_grads=6,density=0.1,block_size=1000,metric=none")
    optimizer = recipe.bench_cases.build(case, model, 0, plenty)
    state = optimizer.state[model[0]]
    indices = as_indices(state["indices"], 1000).to(torch.int64).view(5, 6, 100)
    assert (indices.diff(dim=2) > 0).all()
    assert indices.max() >= 985
    assert indices.max() < 1000
    kept = model[0].grad.view(5, 1000).abs().topk(100).values
    lengths = state["values"].float().view(5, 6, 100).square().sum(dim=(0, 2)).sqrt()
    assert torch.allclose(lengths, kept.norm().expand(6), rtol=0.15)
    assert state["gram"].diagonal().mean() == pytest.approx(kept.norm().item() ** 2, rel=0.1)


def test_levels_and_their_scales_are_filled(recipe):
    """The state of a window in 8 bits, whatever optimizer it belongs to."""
    state = {
        "indices": torch.zeros(4 * 32 * 3, dtype=torch.uint8),
        "values": torch.zeros(4 * 32 * 3, dtype=torch.int8),
        "scales": torch.zeros(4 * 2, dtype=torch.bfloat16),
        "error": torch.full((8,), 5, dtype=torch.int8),
        "error_scale": torch.full((1,), 2.0),
    }
    state["values"][:96] = 100
    state["scales"][::4] = 0.5
    optimizer = SimpleNamespace(
        param_groups=[{"num_grads": 4, "block_size": 256, "density": 0.01}], state={torch.zeros(32 * 256): state}
    )
    recipe.bench_cases.fill_window(optimizer, seed=0)
    assert state["values"].unique().numel() > 100
    assert state["values"].min() >= -127
    assert state["values"].max() <= 127
    assert (state["scales"] >= 0.24).all()
    assert (state["scales"] <= 0.76).all()
    assert state["scales"].unique().numel() > 1
    indices = state["indices"].to(torch.int64).view(32, 4, 3)
    assert (indices.diff(dim=2) > 0).all()
    assert (state["error"] == 5).all()
    assert state["error_scale"].item() == 2.0
    assert recipe.bench_cases.WINDOW == ("indices", "values", "scales", "left", "right")


# Measures


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


# Cases


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


# The command


def test_the_benchmark_from_end_to_end(recipe, tiny_model, tmp_path, capsys):
    cases = recipe.bench_cases
    recipe.benchmark_step.main([
        *("--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out")),
        *("--repeats", "2", "--train_repeats", "2", "--batch", "2", "--length", "8"),
        *(
            "--only",
            r"AdamW .fused|published|sparse M-FAC, m = (256|1024)$|mine",
            "--case",
            "mine: lowrank_mfac num_grads=4",
        ),
        f"{cases.SPARSE_256}: sparse_mfac num_grads=16,block_size=256,metric=none",
        f"{cases.SPARSE_1024}: sparse_mfac num_grads=32,metric=none",
        f"{cases.PUBLISHED}: published num_grads=32,density=0.1",
    ])
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = [result["label"] for result in saved["results"]]
    assert labels == [cases.ADAMW, cases.SPARSE_256, cases.SPARSE_1024, cases.PUBLISHED, "mine"]
    adamw, small, large, published, mine = saved["results"]
    assert [len(result["repeats"]) for result in saved["results"]] == [2] * 5
    assert small["options"] == "num_grads=16,block_size=256,metric=none"
    assert large["stream_bytes"] == 2 * (large["memory"]["indices"] + large["memory"]["values"])
    assert adamw["stream_bytes"] == 0
    assert list(mine["parts"]) == ["compress", "products", "solve", "update", "rest"]
    assert mine["memory"]["metric"] == mine["memory"]["error"] > saved["parameters"]  # both in int8, with scales
    assert mine["bytes_per_parameter"] == pytest.approx(mine["memory"]["total"] / saved["parameters"])
    assert saved["peak_method"] in ("VmHWM", "sampled")
    assert {"cpu", "threads", "torch", "numba", "seed"} <= saved["machine"].keys()

    assert list(saved["in_cache"]) == [cases.SPARSE_256, cases.SPARSE_1024]
    assert all(0.0 < seconds < 1.0 for cached in saved["in_cache"].values() for seconds in cached.values())
    assert list(saved["training"]) == [cases.ADAMW, cases.SPARSE_256, cases.SPARSE_1024]
    runs = saved["training"].values()
    assert all(len(run["repeats"]) == 2 and run["whole"] > run["optimizer"] > 0.0 for run in runs)

    targets = {target["what"]: target for target in saved["targets"]}
    ratio = targets[f"{cases.PUBLISHED} / {cases.SPARSE_1024}"]
    assert ratio["measured"] == pytest.approx(published["seconds"] / large["seconds"])
    assert ratio["reached"] == (ratio["measured"] >= 30)
    work = targets[f"{cases.SPARSE_1024}: (products + update) / reading the window twice"]
    assert work["measured"] == pytest.approx(
        (large["parts"]["products"] + large["parts"]["update"]) / large["stream_seconds"]
    )
    training = targets[f"training step, {cases.SPARSE_256} / {cases.ADAMW}"]
    wholes = [saved["training"][label]["whole"] for label in (cases.SPARSE_256, cases.ADAMW)]
    assert training["measured"] == pytest.approx(wholes[0] / wholes[1])
    assert targets[f"{cases.SMALLEST}: state without K, bytes per parameter"]["reached"] is None

    text = (tmp_path / "out" / "results.md").read_text()
    cached = saved["in_cache"][cases.SPARSE_1024]
    assert f"| {cached['dots']:.3f} | {cached['combine']:.3f} | {large['stream_seconds']:.3f} |" in text
    for label in labels:
        assert text.count(f"\n| {label} | ") >= 2
    entries = (large["memory"][part] / saved["parameters"] for part in ("indices", "values", "error"))
    assert f"\n| {cases.SPARSE_1024} | {' | '.join(f'{entry:.2f}' for entry in entries)} | " in text
    assert f"| {cases.SMALLEST}: state without K, bytes per parameter | not measured | at most 7.5 | - |" in text
    assert text.rstrip() in capsys.readouterr().out
    assert (tmp_path / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "must be at least 1, got 0"),
        (["--only", "("], r"'\(' is not a regular expression"),
        (["--case", "x: adam"], "unknown optimizer 'adam'"),
    ],
)
def test_wrong_flags_end_with_a_message(recipe, flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        recipe.benchmark_step.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_targets_are_reached_or_missed(recipe):
    target = recipe.bench_report.Target
    assert target("a", 30.0, 30.0, "x", at_least=True).reached is True
    assert target("a", 29.0, 30.0, "x", at_least=True).reached is False
    assert target("a", 2.3, 2.2, "x").reached is False
    assert target("a", None, 2.2, "x").reached is None
    row = recipe.bench_report._row
    assert row(target("a", 29.04, 30.0, "x", at_least=True)) == ("a", "29x", "at least 30x", "MISSED")
    assert row(target("b", 0.05, 0.06, " s")) == ("b", "0.05 s", "at most 0.06 s", "reached")


def test_the_limits_follow_the_machine_and_the_state(recipe):
    report = recipe.bench_report

    def result(label, total, peak):
        memory = {"indices": 0, "values": 0, "error": 0, "momentum": 0, "metric": 0, "gram": 10, "total": total}
        parts = {"compress": 0.05, "products": 0.2, "solve": 0.1, "update": 0.3, "rest": 0.0}
        return report.Timing(label, "sparse_mfac", "", 1.0, parts, [1.0], 0.25, 8, memory, 1.0, peak)

    labels = recipe.bench_cases
    results = [result(labels.SPARSE_1024, 1000 << 20, 40 << 20), result(labels.SMALLEST, 110, 0)]
    targets = report.Report({}, 20, 0.1, "VmHWM", results).targets()
    by_what = {target.what: target for target in targets}
    assert by_what[f"{labels.SPARSE_1024}: compress"].limit == 0.25
    peak = by_what[f"{labels.SPARSE_1024}: resident memory, peak of a step"]
    assert (peak.measured, peak.limit, peak.reached) == (40.0, 50.0, True)
    work = by_what[f"{labels.SPARSE_1024}: (products + update) / reading the window twice"]
    assert work.measured == pytest.approx(2.0)
    assert by_what[f"{labels.SMALLEST}: state without K, bytes per parameter"].measured == 5.0
    assert by_what[f"{labels.SPARSE_256}: resident memory, peak of a step"].measured is None


def test_the_sweep_from_end_to_end(recipe, tmp_path):
    recipe.benchmark_step.main([
        *("--sweep", "--sweep_parameters", str(1 << 17), "--sweep_doublings", "2", "--repeats", "2"),
        *("--output_dir", str(tmp_path)),
    ])
    saved = json.loads((tmp_path / "sweep.json").read_text())
    parameters, num_grads, density = saved["sweeps"]
    assert parameters["sizes"] == [1 << 15, 1 << 16, 1 << 17]
    assert num_grads["sizes"] == [512, 1024, 2048]
    assert density["sizes"] == [0.02, 0.04, 0.08]
    for sweep in saved["sweeps"]:
        assert len(sweep["seconds"]) == len(sweep["parts"]) == 3
        assert len(sweep["ratios"]) == 2
    text = (tmp_path / "sweep.md").read_text()
    for heading in ("| parameters | step, s |", "| num_grads | step, s |", "| density | step, s |"):
        assert heading in text
    assert "\n| 1024 | " in text
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_doublings_are_counted_above_the_fixed_part(recipe):
    sizes = [1.0, 2.0, 4.0, 8.0]

    def sweep(times, solves=(0.0,) * 4):
        parts = [{"solve": solve} for solve in solves]
        return recipe.bench_sweep.Sweep("m", "", sizes, [t + s for t, s in zip(times, solves, strict=True)], parts)

    linear = sweep([0.15 + 0.1 * size for size in sizes], [size**3 for size in sizes])
    assert linear.offset == pytest.approx(0.15)
    assert linear.ratios() == pytest.approx([2.0, 2.0, 2.0])
    assert linear.linear
    mostly_fixed = sweep([0.5 + 0.1 * size for size in sizes])
    assert mostly_fixed.ratios() == [None, None, pytest.approx(2.0)]
    assert mostly_fixed.linear
    assert not sweep([5.0 + 0.1 * size for size in sizes]).linear
    assert sweep([0.1 * size for size in sizes]).offset == pytest.approx(0.0, abs=1e-9)
    assert sweep([0.1 * size**2 for size in sizes]).ratios() == pytest.approx([4.0, 4.0, 4.0])
    steep_then_flat = sweep([1.0, 1.5, 1.5, 1.5])
    assert steep_then_flat.offset > 1.0
    assert steep_then_flat.ratios()[0] is None
    assert not steep_then_flat.linear
