"""The comparison of optimizers: its YAML, and the key of a run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from compare_cases import OPTIONS

from hf_efcp.factory import parse_optim_args
from hf_efcp.glue import TASKS
from hf_efcp.variants import VARIANTS

ROOT = Path(__file__).parents[2]


CONFIGS = [
    path
    for path in sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
    if "optimizers" in yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
]


pytestmark = pytest.mark.usefixtures("private_cache")


def test_there_are_comparisons():
    assert {path.name for path in CONFIGS} >= {"compare_variants.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_every_comparison_binds_and_states_what_matters(recipe, path):
    text = path.read_text(encoding="utf-8")
    written = yaml.load(text, Loader=yaml.BaseLoader)
    plan = recipe.plan.read_plan([str(path)])
    assert text.startswith("# ")
    assert f"python recipes/benchmarks/compare_optimizers.py {path.relative_to(ROOT)}" in text
    assert set(plan.comparison.tasks) <= set(TASKS)
    assert str(plan.output_dir).startswith("outputs/")
    # What chose the learning rate is not reported, where something else than the metric can choose.
    assert (plan.comparison.search_seed in plan.comparison.seeds) == (plan.comparison.select_by == "metric")
    assert len(plan.contenders) + len(plan.skipped) == len(written["optimizers"])
    # As many learning rates for each, where the best one of them counts.
    assert plan.comparison.every_rate or len({len(contender.learning_rates) for contender in plan.contenders}) == 1
    for contender in plan.contenders:
        assert contender.args.max_grad_norm == float(written["max_grad_norm"])
        assert contender.args.logging_nan_inf_filter is False
        assert contender.args.warmup_steps == float(written["warmup_steps"])
        assert contender.args.save_strategy == "no"


def test_the_variants_are_all_compared_and_dense_ones_at_an_equal_window(recipe):
    plan = recipe.plan.read_plan([str(ROOT / "recipes" / "configs" / "compare_variants.yaml")])
    optimizers = [(contender.args.optim, contender.args.optim_args) for contender in plan.contenders]
    assert {name for name, _ in optimizers} == {*VARIANTS, "adamw_torch"}
    for kind in ("mfac", "ggt"):
        assert {f"dense_{kind}", f"sparse_{kind}", f"lowrank_{kind}"} <= {
            name for name, options in optimizers if options and "num_grads=32,metric=none" in options
        }
    assert ("sparse_mfac", "num_grads=256,metric=none,damp=1e-5") in optimizers
    for name, options in optimizers:
        if name in VARIANTS:  # by the paper's rules, all of them
            built = VARIANTS[name]([torch.nn.Parameter(torch.zeros(1))], **parse_optim_args(name, options))
            assert built.defaults["metric"] == "none"
    assert plan.comparison.search_seed in plan.comparison.seeds
    assert {len(contender.learning_rates) for contender in plan.contenders} == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": {"A": {"optim": "sparse_mfak", "learning_rates": [1]}}}, "optimizer 'A': .*sparse_mfak"),
        ({"optimizers": {"A": {"optim": "sgd"}}}, "'A' must be a mapping with the keys optim and learning_rates"),
        ({"optimizers": {"A": {"optim": "sgd", "learning_rates": [1], "lr": 1}}}, "unknown key 'lr'"),
        ({"optimizers": {"A": {"optim": "sgd", "learning_rates": ["x"]}}}, "'A' must be a list of numbers: .*'x'"),
        ({"optimizers": {"A": {"optim": "sgd", "learning_rates": [0]}}}, "must be positive, and each once"),
        ({"optimizers": {"A": {"optim": "sgd", "learning_rates": [1, 1.0]}}}, "must be positive, and each once"),
        (
            {"optimizers": {"A": {"optim": "sgd", "optim_args": "momentun=0.9", "learning_rates": [1]}}},
            "optimizer 'A': 'momentun=0.9' in optim_args has no effect",
        ),
        (
            {"optimizers": {"A": {"optim": "sgd", "optim_args": "momentum", "learning_rates": [1]}}},
            "expected key=value in optim_args, got 'momentum'",
        ),
        (
            {"optimizers": {"A": {"optim": "sparse_mfac", "optim_args": "num_grad=3", "learning_rates": [1]}}},
            "optimizer 'A': .*num_grad",
        ),
        ({"tasks": ["sst3"]}, "unknown task 'sst3'"),
        ({"seeds": [1, 1]}, r"seeds must have one or more values, each once: \[1, 1\]"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_is_loaded(recipe, write_config, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe.plan.read_plan([write_config(**changes)])


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"seed": 1}, [], "seed does not belong here: use search_seed and seeds"),
        ({"learning_rate": 1}, [], "learning_rate does not belong here: use learning_rates under optimizers"),
        ({}, ["--optim", "sgd"], "optim does not belong here"),
        ({"do_predict": True}, [], "do_predict does not belong here: use run_glue.py: no model is stored"),
        ({"optimizers": ["sgd"]}, [], "must have the key 'optimizers' with a mapping under it"),
        ({}, ["--learning-rate", "1"], "learning_rate does not belong here: use learning_rates under optimizers"),
        ({}, ["--save-strategy=epoch"], "save_strategy does not belong here: use run_glue.py"),
        ({"max_step": 1}, [], "unknown key 'max_step' in .*did you mean max_steps"),
    ],
)
def test_misplaced_settings_end_with_a_message(recipe, write_config, capsys, changes, flags, message):
    with pytest.raises(SystemExit):
        recipe.plan.read_plan([write_config(**changes), *flags])
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_may_have_the_name_of_a_flag(recipe, write_config):
    plan = recipe.plan.read_plan([write_config(), "--output_dir", "seed"])
    assert plan.output_dir == Path("seed")


def test_a_label_that_is_there_twice_is_refused(recipe, write_config, capsys):
    path = write_config()
    text = Path(path).read_text()
    Path(path).write_text(text + text[text.index("  AdamW:") :])
    with pytest.raises(SystemExit):
        recipe.plan.read_plan([path])
    assert "the key 'AdamW' is in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recipe.plan.read_plan(["--max_steps", "3"])
    assert "the first argument must be a YAML file with the key optimizers" in capsys.readouterr().err


def test_galore_is_left_out_visibly_when_it_is_not_installed(recipe, write_config, monkeypatch):
    galore = {"optim": "galore_adamw", "optim_target_modules": "all-linear", "learning_rates": [1e-3, 1e-2]}
    path = write_config(optimizers={**OPTIONS, "GaLore": galore})
    monkeypatch.setattr(recipe.plan, "_installed", lambda module: False)
    plan = recipe.plan.read_plan([path])
    assert [contender.label for contender in plan.contenders] == ["EFCP", "AdamW"]
    assert plan.skipped == ("GaLore is left out: galore_torch is not installed",)
    monkeypatch.setattr(recipe.plan, "_installed", lambda module: module != "bitsandbytes")
    assert recipe.plan.read_plan([path]).skipped == ("GaLore is left out: bitsandbytes is not installed",)
    monkeypatch.setattr(recipe.plan, "_installed", lambda module: True)
    assert recipe.plan.read_plan([path]).contenders[2].args.optim_target_modules == "all-linear"


def test_every_task_has_data_of_its_own(recipe, write_config, reviews):
    path = write_config(tasks=["sst2", "cola"])
    with pytest.raises(FileNotFoundError, match="with several tasks, --data_dir must have a folder for each: .*sst2"):
        recipe.compare_optimizers.main([path])


def test_the_key_holds_what_decides_the_result_and_nothing_else(recipe, write_config, reviews):
    def keys(*flags, **changes):
        plan = recipe.plan.read_plan([write_config(**changes), *flags])
        bench = recipe.bench.Bench(plan, TASKS["sst2"])
        return [json.loads(recipe.training.to_json(bench.key(c, 1e-3, 3))) for c in plan.contenders]

    efcp, adamw = keys()
    assert efcp["optimizer"] == "sparse_mfac"
    assert (efcp["options"]["num_grads"], efcp["options"]["density"]) == (16, 0.05)
    assert efcp["options"]["trust_lr"] == 4e-4  # a default, which may change
    assert (adamw["optimizer"], adamw["options"]) == ("adamw_torch", {})
    arguments = {"max_steps": 40, "per_device_train_batch_size": 16, "warmup_steps": 0.1, "use_cpu": True}
    assert efcp["arguments"] == adamw["arguments"] == arguments
    assert str(reviews) not in json.dumps(efcp)

    same = [
        keys("--logging_steps", "1", "--output_dir", "elsewhere"),
        keys(optimizers={"other": OPTIONS["EFCP"], "names": {**OPTIONS["AdamW"], "learning_rates": [1]}}),
        keys("--lr_scheduler_type", "linear"),
    ]
    assert all(other == [efcp, adamw] for other in same)
    others = [
        keys("--max_steps", "41"),
        keys("--max_grad_norm", "0"),
        keys("--eval_strategy", "steps", "--eval_steps", "20"),
        keys("--num_hidden_layers", "1"),
        keys("--max_seq_length", "15"),
        keys(optimizers={**OPTIONS, "EFCP": {**OPTIONS["EFCP"], "optim_args": "num_grads=17"}}),
    ]
    (reviews / "train.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    others.append(keys())
    assert all(other[0] != efcp for other in others)
    assert [other[1] == adamw for other in others] == [False, False, False, False, False, True, False]


def test_other_weights_in_a_local_folder_are_another_run(recipe, write_config, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))

    def key():
        plan = recipe.plan.read_plan([write_config(model_name_or_path=str(folder))])
        bench = recipe.bench.Bench(plan, TASKS["sst2"])
        keys = [bench.key(contender, 1e-3, 3) for contender in plan.contenders]
        assert len({key["model_files"] for key in keys}) == 1
        return keys[0]

    seen = [key()]
    (folder / "README.md").write_text("of no matter")
    assert key() == seen[0]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        seen.append(key())
        assert {**seen[-1], "model_files": None} == {**seen[0], "model_files": None}
    assert len({key["model_files"] for key in seen}) == 4


def test_the_files_of_a_model_are_read_once(recipe, write_config, monkeypatch):
    plan = recipe.plan.read_plan([write_config()])
    benches = [recipe.bench.Bench(plan, TASKS[name]) for name in ("sst2", "sst2")]
    first = benches[0].key(plan.contenders[0], 1e-3, 3)["model_files"]
    monkeypatch.setattr(recipe.plan.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert benches[1].key(plan.contenders[1], 1e-3, 4)["model_files"] == first


@pytest.mark.parametrize("name", ["ablations", "epochs", "peers", "protocol", "range", "relatives"])
def test_the_keys_of_committed_runs_are_those_of_today(recipe, write_config, name):
    lines = (ROOT / "recipes" / "results" / f"compare_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    plan = recipe.plan.read_plan([write_config(model_name_or_path="packaged-minilm")])
    today = recipe.bench.Bench(plan, TASKS["sst2"]).key(plan.contenders[0], 1e-3, 3)
    for line in lines:
        key = json.loads(line)["key"]
        assert list(key) == list(today)
        assert key["model"] == today["model"]
