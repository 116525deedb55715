"""Optimizers of others in the comparison and in the step benchmark: what they step, their options, their bytes."""

import importlib.util
import math

import pytest
import torch
from compare_cases import OPTIONS, lines
from tiny import tiny_bert

pytestmark = pytest.mark.usefixtures("private_cache")
needs_pytorch_optimizer = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch_optimizer is not installed"
)
PEERS = ["muon", *(pytest.param(name, marks=needs_pytorch_optimizer) for name in ("soap", "shampoo"))]


def with_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return model


def moves(model, optimizer, steps=1):
    starts = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in range(steps):
        with_gradients(model, step)
        optimizer.step()
    return {name: param.detach() - starts[name] for name, param in model.named_parameters()}


def test_muon_steps_hidden_matrices_and_adamw_the_rest(recipe):
    """Against torch's two optimizers, each over its own parameters, and again after the state was loaded."""
    model, twin = (with_gradients(tiny_bert()) for _ in range(2))
    inner = recipe.peers.hidden_matrices(model)
    assert "bert.encoder.layer.0.attention.self.query.weight" in inner
    assert not inner & {"classifier.weight", "bert.embeddings.word_embeddings.weight"}
    both = recipe.peers.PEERS["muon"].build(model, lr=1e-3)
    hidden = [p for name, p in twin.named_parameters() if name in inner]
    others = [p for name, p in twin.named_parameters() if name not in inner]
    muon = torch.optim.Muon(hidden, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0)
    for seed in range(3):
        for each in (model, twin):
            with_gradients(each, seed)
        both.step()
        both.load_state_dict(both.state_dict())  # as Accelerate does
        muon.step()
        adamw.step()
    start = dict(tiny_bert().named_parameters())
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p - start[name]).norm() > 0, name
        assert torch.equal(p, q), name


def test_muon_needs_something_to_do(recipe):
    with pytest.raises(ValueError, match="no linear layer before its last one"):
        recipe.peers.PEERS["muon"].build(torch.nn.Linear(3, 2), lr=1e-3)


def test_a_scheduler_reaches_both_parts(recipe):
    model = tiny_bert()
    optimizer = recipe.peers.PEERS["muon"].build(model, lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert not any(move.any() for move in moves(model, optimizer).values())


@pytest.mark.parametrize("name", PEERS)
def test_their_steps_are_about_as_long_as_adamws(recipe, name):
    """At one learning rate, after 40 steps of noise: within a factor of 3 of AdamW's way."""
    lengths = []
    for build in (
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        lambda m: recipe.peers.PEERS[name].build(m, lr=1e-3),
    ):
        model = tiny_bert()
        way = moves(model, build(model), steps=40)
        lengths.append(math.sqrt(sum(float(move.square().sum()) for move in way.values())))
    assert 1 / 3 < lengths[1] / lengths[0] < 3


@pytest.mark.parametrize("name", PEERS)
def test_biases_are_not_decayed_and_options_are_checked(recipe, name):
    groups = recipe.peers.PEERS[name].build(tiny_bert(), lr=1e-3, weight_decay=0.1).param_groups
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert {p.ndim for group in groups if group["weight_decay"] == 0.1 for p in group["params"]} == {2}
    assert sum(len(group["params"]) for group in groups) == len(list(tiny_bert().parameters()))
    with pytest.raises(ValueError, match="has no option frequency; expected some of .*eps"):
        recipe.peers.PEERS[name].build(tiny_bert(), lr=1e-3, frequency=3)


def test_what_is_not_installed_is_said(recipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match="pip install pytorch_optimizer"):
        recipe.peers.PEERS["soap"].build(tiny_bert(), lr=1e-3)


@pytest.mark.parametrize("name", PEERS)
def test_a_comparison_with_them(recipe, name, write_config, tmp_path):
    entry = {"optim": name, "learning_rates": [1e-7, 3e-3]}
    recipe.compare_optimizers.main([write_config(optimizers={**OPTIONS, "peer": entry}, seeds=[3])])
    runs = {(run["label"], run["key"]["learning_rate"]): run for run in lines(tmp_path / "out")}
    run = runs["peer", 3e-3]
    assert run["optimizer"] == run["key"]["optimizer"] == name
    assert run["optim_args"] is None
    assert run["key"]["options"] == recipe.runs.json.loads(recipe.training.to_json(recipe.peers.PEERS[name].defaults))
    assert run["metrics"]["loss"] < 0.9 * runs["peer", 1e-7]["metrics"]["loss"]  # it is this one that trains
    assert run["optimizer_memory"]["total"] > 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| peer | 0.003 | 2: 1e-07, 0.003 |" in table


def test_a_wrong_option_in_a_yaml_is_refused(recipe, write_config):
    for text, message in (("speed=3", "Muon has no option speed"), ("ns_steps", "expected key=value")):
        entry = {"optim": "muon", "optim_args": text, "learning_rates": [1e-3]}
        with pytest.raises(ValueError, match=f"optimizer 'Muon': {message}"):
            recipe.plan.read_plan([write_config(optimizers={"Muon": entry})])
    entry = {"optim": "muon", "optim_target_modules": "all-linear", "learning_rates": [1e-3]}
    with pytest.raises(ValueError, match="optim_target_modules has no effect on muon"):
        recipe.plan.read_plan([write_config(optimizers={"Muon": entry})])


def test_peers_without_their_package_are_left_out(recipe, write_config, monkeypatch):
    monkeypatch.setattr(recipe.plan, "_installed", lambda module: False)
    entry = {"optim": "soap", "learning_rates": [1e-3, 1e-2]}
    plan = recipe.plan.read_plan([write_config(optimizers={**OPTIONS, "SOAP": entry})])
    assert plan.skipped == ("SOAP is left out: pytorch_optimizer is not installed",)


def test_bytes_of_any_state(recipe):
    """Nested lists, objects, quantized tensors, and one tensor that parameters share."""

    class Quantized:
        def __init__(self):
            self.codes, self.scale = torch.zeros(100, dtype=torch.uint8), torch.zeros(2)

        def __tensor_flatten__(self):
            return ["codes", "scale"], []

    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer, table = torch.optim.SGD(params, lr=0.1), torch.zeros(256)
    optimizer.state[params[0]] = {"q": Quantized(), "table": table, "step": 3}
    optimizer.state[params[1]] = {"GG": [torch.zeros(4, 4), []], "table": table}
    assert recipe.training.state_bytes(optimizer) == 100 + 8 + 1024 + 64


@pytest.mark.parametrize("name", ["adafactor", *PEERS])
def test_the_step_benchmark_builds_them(recipe, name):
    case = recipe.bench_cases.parse_case(f"one: {name}")
    model = with_gradients(tiny_bert())
    optimizer = recipe.bench_cases.build(case, model, 0, lambda: 1 << 30)
    assert not any(move.any() for move in moves(model, optimizer, steps=2).values())  # at learning rate 0
    memory = recipe.bench_cases.state_memory(optimizer)
    numel = sum(p.numel() for p in model.parameters())
    assert memory["total"] == memory["momentum"] > (0.05 if name == "adafactor" else 4) * numel


def test_adamw_in_8_bits(recipe):
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = recipe.bench_baselines.BASELINES["adamw_8bit"](with_gradients(model))
    optimizer.step()
    size = recipe.bench_cases.state_memory(optimizer)["total"] / model.weight.numel()
    assert 2.0 < size < 2.3  # two bytes, scales of blocks, and two tables
