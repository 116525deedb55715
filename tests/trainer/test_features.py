"""What Trainer offers beside the optimizer: schedules, groups, clipping, reports, compiling, adapters."""

import math
import shutil

import pytest
import torch
from papers import SparseMFAC
from tiny import Gradients, arguments, parameters, tiny_bert, toy_rows, train
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_efcp import EFCPTrainer

SPARSE = {"optim": "sparse_mfac", "optim_args": "num_grads=4,density=0.2,block_size=256", "learning_rate": 1e-3}
# Rows that do not hang on which entries are the largest, which the last bit may decide.
DENSE = {**SPARSE, "optim_args": "num_grads=4,density=1,value_dtype=float32,damp=1e-3,metric=none"}


def distance(left, right):
    return torch.cat([(left[name] - right[name]).float().flatten() for name in left]).norm().item()


class Steps(TrainerCallback):
    """Learning rates, and how many rows the window has seen, at every step of the optimizer."""

    def __init__(self):
        self.rates, self.pushed = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    def on_optimizer_step(self, args, state, control, **kwargs):
        states = kwargs["optimizer"].state_dict()["state"].values()
        self.pushed.append(max(state.get("pushed", 0) for state in states))


def run(args, model, rows, *callbacks, **kwargs):
    trainer = EFCPTrainer(model=model, args=args, train_dataset=rows, callbacks=[*callbacks], **kwargs)
    trainer.train()
    return trainer


# Schedules, groups, batches, clipping


@pytest.mark.parametrize(
    ("schedule", "more", "factors"),
    [
        ("linear", {"warmup_steps": 2}, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", {}, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ("constant_with_warmup", {"warmup_steps": 3}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("inverse_sqrt", {"warmup_steps": 1}, [0] + [step**-0.5 for step in range(1, 6)]),
        ("polynomial", {"lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}}, [(1 - s / 6) ** 2 for s in range(6)]),
    ],
)
def test_schedules_scale_the_rate_of_every_group(tmp_path, schedule, more, factors):
    """A step at rate 0 moves nothing, and its gradient is in the window all the same."""
    steps, model = Steps(), tiny_bert()
    options = {**SPARSE, "optim_args": SPARSE["optim_args"] + ",exclude=classifier,exclude_lr=1e-2"}
    args = arguments(tmp_path, max_steps=6, lr_scheduler_type=schedule, weight_decay=0.1, **more, **options)
    seen = []

    class Values(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append(parameters(kwargs["model"]))

    before = parameters(model)
    run(args, model, toy_rows(48), steps, Values())
    expected = [[factor * rate for rate in (1e-3, 1e-3, 1e-2, 1e-2)] for factor in factors]
    torch.testing.assert_close(torch.tensor(steps.rates), torch.tensor(expected), rtol=1e-4, atol=1e-8)
    assert steps.pushed == [1, 2, 3, 4, 5, 6]
    for factor, old, new in zip(factors, [before, *seen], seen, strict=False):
        assert (distance(old, new) == 0.0) == (factor == 0)


def test_groups_of_ones_own_keep_their_settings(tmp_path):
    model = tiny_bert()
    before = parameters(model)
    embeddings = list(model.bert.embeddings.parameters())
    layers = list(model.bert.encoder.parameters())
    groups = [
        {"params": embeddings, "lr": 0.0},
        {"params": layers, "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9},
        {"params": [*model.bert.pooler.parameters(), *model.classifier.parameters()], "preconditioned": False},
    ]
    optimizer = SparseMFAC(groups, 1e-4, num_grads=4, density=0.2, block_size=256)
    steps = Steps()
    args = arguments(tmp_path, max_steps=4, lr_scheduler_type="constant")
    trainer = run(args, model, toy_rows(32), steps, optimizers=(optimizer, None))
    assert trainer.optimizer.optimizer is optimizer
    assert steps.rates == [[0.0, 1e-3, 1e-4]] * 4
    after = parameters(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "embeddings" not in name}
    assert "momentum" in optimizer.state[layers[0]]
    assert "momentum" not in optimizer.state[embeddings[0]]
    # AdamW's entries move by about the rate per step.
    assert 3e-4 < (after["classifier.weight"] - before["classifier.weight"]).abs().max() < 4.1e-4


def test_the_window_advances_once_per_optimizer_step(tmp_path):
    ends = []
    for batches in ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 1}):
        batches["gradient_accumulation_steps"] = 8 // batches["per_device_train_batch_size"]
        steps, model = Steps(), tiny_bert()
        before = parameters(model)
        run(arguments(tmp_path, max_steps=4, max_grad_norm=0.0, **DENSE, **batches), model, toy_rows(32), steps)
        assert steps.pushed == [1, 2, 3, 4]
        ends.append(parameters(model))
    moved = distance(ends[0], before)
    assert moved > 0.01
    assert distance(*ends) < 1e-2 * moved


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_the_clipped_gradient_enters_the_window(tmp_path, limit):
    """By the paper's rule, whose rows are gradients as they are."""
    model, gradients = tiny_bert(), Gradients()
    options = {**SPARSE, "optim_args": SPARSE["optim_args"] + ",metric=none"}
    args = arguments(tmp_path, max_steps=1, max_grad_norm=limit, **options)
    optimizer = run(args, model, toy_rows(8), gradients).optimizer.optimizer
    (gradient,) = gradients.seen
    assert (gradient.norm() <= 0.0501) == (limit > 0.0)
    states = [optimizer.state[param] for param in model.parameters()]
    error = torch.cat([state["error"].flatten() for state in states])
    gram = next(state["gram"] for state in states if "gram" in state)
    # Top-k leaves the small part: nothing of it is in the row, so that the squares add up, up to bfloat16.
    assert gram[0, 0].sqrt().item() == pytest.approx(
        (gradient.double().square().sum() - error.double().square().sum()).sqrt().item(), rel=1e-2
    )


def test_skipped_steps_are_reported(tmp_path):
    """A gradient that is infinite once: nothing but that step is lost."""
    model = tiny_bert()

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                model.classifier.weight.grad[0, 0] = float("inf")

    options = {**SPARSE, "optim_args": SPARSE["optim_args"] + ",nonfinite=skip"}
    steps = Steps()
    args = arguments(tmp_path, max_steps=5, **{**options, "logging_strategy": "steps", "logging_steps": 1})
    trainer = run(args, model, toy_rows(40), Spoil(), steps)
    assert steps.pushed == [1, 2, 2, 3, 4]
    assert trainer.optimizer.optimizer.skipped_steps == 1
    logged = [entry.get("skipped_steps", 0) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 0, 1, 1, 1]
    assert all(bool(param.isfinite().all()) for param in model.parameters())


# Activations, reports, compiling


def test_gradient_checkpointing_changes_nothing(tmp_path):
    ends, counts = [], []
    names = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    for checkpointing in (False, True):
        model = tiny_bert()
        before = parameters(model)
        calls = []
        model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        args = arguments(tmp_path, max_steps=5, per_device_train_batch_size=8, **{name: checkpointing}, **SPARSE)
        run(args, model, toy_rows(40))
        ends.append(parameters(model))
        counts.append(len(calls))
    assert counts == [5, 10]  # the layers ran twice
    assert distance(ends[0], before) > 0.01
    assert distance(*ends) < 1e-4 * distance(ends[0], before)


def test_reports_get_the_metrics(tmp_path, monkeypatch):
    received = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            received.append((state.global_step, dict(logs)))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "memory", Report)
    args = arguments(
        tmp_path, max_steps=4, lr_scheduler_type="constant", report_to="memory", eval_strategy="steps", eval_steps=2,
        **{**SPARSE, "logging_strategy": "steps", "logging_steps": 1},
    )  # fmt: skip
    run(args, tiny_bert(), toy_rows(32), eval_dataset=toy_rows(8))
    losses = [(step, logs) for step, logs in received if "loss" in logs]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    for _, logs in losses:
        assert logs["learning_rate"] == 1e-3
        assert 0.0 < logs["loss"] < 5.0
        assert 0.0 < logs["grad_norm"] < 100.0
    assert [step for step, logs in received if "eval_loss" in logs] == [2, 4]


@pytest.mark.slow
def test_a_compiled_model_trains_as_it_does_uncompiled(tmp_path):
    ends = []
    for compiled in (False, True):
        model = tiny_bert()
        before = parameters(model)
        run(arguments(tmp_path, max_steps=4, torch_compile=compiled, **DENSE), model, toy_rows(32))
        ends.append(parameters(model))
    assert distance(ends[0], before) > 0.01
    assert distance(*ends) < 1e-2 * distance(ends[0], before)


# Adapters


def adapted(seed=0):
    peft = pytest.importorskip("peft")
    model = tiny_bert(seed=seed, dropout=0.1)
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    return peft.get_peft_model(model, config)


def test_only_adapters_and_the_head_have_state_and_move(tmp_path):
    model = adapted()
    before = parameters(model)
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert len(trainable) == 2 * 2 * 2 + 2  # two layers, query and value, A and B; the head
    steps = Steps()
    args = arguments(tmp_path, max_steps=6, **{**SPARSE, "learning_rate": 0.05})  # A has no gradient while B is zero
    trainer = run(args, model, toy_rows(48), steps)
    after = parameters(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable
    optimizer = trainer.optimizer.optimizer
    owners = {name for name, param in model.named_parameters() if optimizer.state.get(param)}
    assert owners == trainable
    size = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert size == 2 * 2 * 2 * 4 * 32 + 2 * 32 + 2
    # A byte an entry, and a float32 scale for 64 of them.
    scales = sum(math.ceil(param.numel() / 64) for param in model.parameters() if param.requires_grad)
    assert optimizer.memory()["error"] == size + 4 * scales
    assert optimizer.memory()["metric"] == size + 4 * scales
    assert steps.pushed == [1, 2, 3, 4, 5, 6]


def test_the_gradient_of_an_adapted_model_is_that_of_the_mean(tmp_path):
    def gradient(**batches):
        model = adapted().eval()
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, **SPARSE, **batches)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return train(args, model, toy_rows(16))[1][0]

    one = gradient(per_device_train_batch_size=16)
    accumulated = gradient(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert one.norm() > 0.01
    assert (accumulated - one).norm() < 1e-4 * one.norm()


def test_an_adapted_model_resumes_to_the_bit(tmp_path):
    options = {**SPARSE, "max_steps": 8, "weight_decay": 0.01}
    options["optim_args"] += ",momentum=0.5,exclude=classifier"
    whole = adapted()
    args = arguments(tmp_path / "whole", **{**options, "save_strategy": "steps", "save_steps": 5})
    run(args, whole, toy_rows(64))
    (tmp_path / "cut").mkdir()
    shutil.move(tmp_path / "whole" / "checkpoint-5", tmp_path / "cut" / "checkpoint-5")
    resumed = adapted(seed=0)
    with torch.no_grad():
        for param in resumed.parameters():
            if param.requires_grad:
                param.add_(1.0)  # the checkpoint's values must come back
    trainer = EFCPTrainer(model=resumed, args=arguments(tmp_path / "cut", **options), train_dataset=toy_rows(64))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    expected, found = parameters(whole), parameters(resumed)
    assert {name for name in expected if not torch.equal(expected[name], found[name])} == set()
    start = parameters(adapted())
    assert distance(found, start) > 1e-3
