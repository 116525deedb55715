"""The benchmark of a step: the command from end to end, targets and sweeps."""

import json
import re

import pytest
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


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
