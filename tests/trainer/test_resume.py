"""Nothing is lost: killed runs, incomplete and foreign checkpoints, and resuming without Trainer."""

import copy
import json
import logging
import random
import shutil
import warnings
from pathlib import Path

import crash
import pytest
import torch
from problems import flat
from states import ALONE, assert_same
from tiny import arguments, parameters, tiny_bert, toy_rows
from torch import nn
from transformers import TrainerCallback
from variants import build, names

from hf_efcp import OPTIMIZERS, EFCPTrainer

ARGUMENTS = {
    "sparse_mfac": "num_grads=3,density=0.1,block_size=1024,momentum=0.5,exclude=word_embeddings",
    "sparse_ggt": "num_grads=3,density=0.1,block_size=256,beta1=0.5",
    "dense_mfac": "num_grads=3",
    "dense_ggt": "num_grads=3",
    "lowrank_mfac": "num_grads=3,rank=2,momentum=0.9",
    "lowrank_ggt": "num_grads=3,rank=2",
    "sparse_adagrad": "density=0.1",
    "microadam": "num_grads=3,density=0.1",
    "galore": "rank=4,update_gap=3,exclude=word_embeddings",
    "adarankgrad": "max_rank=4,max_gap=4,threshold=0.5",
    "lorenza": "rank=4,update_gap=3,probes=2",
    "natural_galore": "rank=4,update_gap=4,history=3",
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Parameters at the end of a run that nobody killed, by optimizer and dtype."""
    ends = {}

    def run(optim, dtype=torch.float32):
        if (optim, dtype) not in ends:
            folder = tmp_path_factory.mktemp("whole")
            assert not crash.start(folder, optim, optim_args=ARGUMENTS[optim], dtype=dtype)
            theta, starts = crash.end(folder)
            assert starts == ["0"]
            ends[optim, dtype] = theta
        return ends[optim, dtype]

    return run


def assert_equal(found, expected):
    """Bit-equal, and not because nobody moved."""
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()
    start = parameters(tiny_bert(dtype=next(iter(expected.values())).dtype))
    assert any(not torch.equal(found[name], start[name]) for name in found)


def killed_and_resumed(folder, optim, kills, dtype=torch.float32):
    for kill in kills:
        assert crash.start(folder, optim, optim_args=ARGUMENTS[optim], kill=kill, dtype=dtype)
    assert not crash.start(folder, optim, optim_args=ARGUMENTS[optim], dtype=dtype)
    return crash.end(folder)


@pytest.mark.parametrize(
    ("optim", "kills", "starts"),
    [
        ("sparse_mfac", [("step", random.Random(1).randrange(4, 7)), ("optimizer.pt", 12)], ["0", "3", "9"]),
        ("lowrank_mfac", [("model.safetensors", 6), ("trainer_state.json", 9)], ["0", "3", "6"]),
        ("sparse_ggt", [("rng_state.pth", 9)], ["0", "6"]),
        ("lorenza", [("step", 5), ("optimizer.pt", 9)], ["0", "3", "6"]),
        ("adarankgrad", [("step", 8)], ["0", "6"]),
    ],
)
def test_a_killed_run_ends_bit_equal(tmp_path, uninterrupted, optim, kills, starts):
    found, resumed_from = killed_and_resumed(tmp_path, optim, kills)
    assert_equal(found, uninterrupted(optim))
    assert resumed_from == starts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_a_killed_run_of_every_optimizer_ends_bit_equal(tmp_path, uninterrupted, optim, dtype):
    """Three runs of three kills each: at two random steps, and in the middle of a random file of a checkpoint."""
    numbers = random.Random(optim)
    for run in range(3):
        kills = [("step", step) for step in numbers.sample(range(4, crash.STEPS + 1), 2)]
        kills = sorted([*kills, (numbers.choice(FILES), 6)], key=lambda kill: kill[1])
        found, starts = killed_and_resumed(tmp_path / str(run), optim, kills, dtype)
        assert_equal(found, uninterrupted(optim, dtype))
        assert len(starts) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_run_killed_in_every_checkpoint_ends_bit_equal(tmp_path, uninterrupted, name):
    kills = [(name, step) for step in (6, 9, 12, 14)]
    found, starts = killed_and_resumed(tmp_path, "sparse_mfac", kills)
    assert_equal(found, uninterrupted("sparse_mfac"))
    assert starts == ["0", "3", "6", "9", "12"]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sparse_mfac", "microadam"])
def test_a_run_killed_from_outside_at_random_moments_ends_bit_equal(tmp_path, uninterrupted, optim):
    numbers, kills = random.Random(2), 0
    while kills < 12 and crash.start(tmp_path, optim, optim_args=ARGUMENTS[optim], after=numbers.uniform(0.0, 0.1)):
        kills += 1
    if kills == 12:
        assert not crash.start(tmp_path, optim, optim_args=ARGUMENTS[optim])
    assert_equal(crash.end(tmp_path)[0], uninterrupted(optim))
    assert kills >= 3


# Which checkpoint


SETTINGS = {"optim": "sparse_mfac", "optim_args": "num_grads=3,density=0.1,block_size=1024", "max_steps": 8}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A run's folder with checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    args = arguments(folder, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, **SETTINGS)
    EFCPTrainer(model=tiny_bert(), args=args, train_dataset=toy_rows(32)).train()
    return folder


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(checkpoints, tmp_path / "run")


class Start(TrainerCallback):
    """Remembers the step that training starts at, and the optimizer's state then."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.state = copy.deepcopy(kwargs["optimizer"].state_dict()["state"])


def trainer(folder, **changes):
    args = arguments(folder, per_device_train_batch_size=4, **{**SETTINGS, **changes})
    run = EFCPTrainer(model=tiny_bert(seed=1), args=args, train_dataset=toy_rows(32), callbacks=[start := Start()])
    run.start = start
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_complete_checkpoint_is_taken_and_the_others_are_warned_about(folder, caplog):
    cut(folder / "checkpoint-8" / "trainer_state.json")
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    (folder / "checkpoint-100x").mkdir()
    run = trainer(folder)
    with caplog.at_level(logging.WARNING, logger="hf_efcp"):
        run.train(resume_from_checkpoint=True)
    assert run.start.step == 4
    first, second = (record.getMessage() for record in caplog.records if record.name == "hf_efcp.trainer.checkpoints")
    assert f"{folder}/checkpoint-8 is incomplete and was skipped: {folder}/checkpoint-8/trainer_state.json is" in first
    assert f"{folder}/checkpoint-6/optimizer.pt is missing" in second
    saved = torch.load(folder / "checkpoint-4" / "optimizer.pt")["state"]
    assert_same(saved, run.start.state)


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_needed_is_looked_at(folder, caplog, name):
    for step, spoil in ((6, cut), (8, Path.unlink)):
        spoil(folder / f"checkpoint-{step}" / name)
    run = trainer(folder)
    with caplog.at_level(logging.WARNING, logger="hf_efcp"):
        run.train(resume_from_checkpoint=True)
    assert run.start.step == 4
    assert len([record for record in caplog.records if record.name == "hf_efcp.trainer.checkpoints"]) == 2


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("spoil", [cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_an_incomplete_checkpoint_that_is_asked_for_is_refused(folder, name, spoil):
    path = folder / "checkpoint-6" / name
    spoil(path)
    lacks = "has no weights of a model" if not path.exists() and name == "model.safetensors" else f"{name} is"
    with pytest.raises(ValueError, match=f"checkpoint-6.*{lacks}.*training would not go on where it stopped"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_no_complete_checkpoint_is_an_error(folder):
    for step in (2, 4, 6, 8):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="none of the 4 checkpoints in .* is complete: .*checkpoint-8/optimizer.pt is"):
        trainer(folder).train(resume_from_checkpoint=True)
    for step in (2, 4, 6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="No valid checkpoint found"):  # Trainer's own words
        trainer(folder).train(resume_from_checkpoint=True)


def test_stock_optimizers_resume_as_with_the_parent(folder):
    (folder / "checkpoint-8" / "optimizer.pt").unlink()
    run = trainer(folder, optim="sgd", optim_args=None, max_steps=9)
    run.train(resume_from_checkpoint=True)
    assert (run.start.step, run.state.global_step) == (8, 9)


def test_a_damage_inside_the_optimizer_file_is_seen(folder):
    """In the second moment, where neither torch.load nor the shapes of tensors would notice."""
    path = folder / "checkpoint-8" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    moment = torch.load(path)["state"][0]["second_moment"]
    found = data.find(moment.numpy().tobytes())
    assert found > 0
    data[found + 6] ^= 0x40
    path.write_bytes(bytes(data))
    assert not torch.equal(torch.load(path)["state"][0]["second_moment"], moment)
    for asked in (True, str(folder / "checkpoint-8")):
        with pytest.raises(ValueError, match="checkpoint-8/optimizer.pt is damaged .the checksum of its entry .*data/"):
            trainer(folder, max_steps=9).train(resume_from_checkpoint=asked)


def test_sharded_weights_are_looked_at(folder):
    model = tiny_bert()
    for step in (6, 8):
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="10KB")
        assert len(list(checkpoint.glob("model-*"))) > 1
    cut(max((folder / "checkpoint-8").glob("model-*")))
    run = trainer(folder)
    run.train(resume_from_checkpoint=True)
    assert run.start.step == 6
    index = json.loads((folder / "checkpoint-6" / "model.safetensors.index.json").read_text())
    (folder / "checkpoint-6" / min(index["weight_map"].values())).unlink()
    with pytest.raises(ValueError, match="checkpoint-6/model-00001.* is missing"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_checkpoint_is_incomplete_while_it_is_overwritten(folder, monkeypatch):
    """Weights of a new run beside the optimizer of an old one must not pass for a checkpoint."""
    for step in (2, 6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run = trainer(folder, save_strategy="steps", save_steps=4)
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", lambda output_dir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    with pytest.raises(ValueError, match="none of the 1 checkpoints .*checkpoint-4/trainer_state.json is missing"):
        trainer(folder).train(resume_from_checkpoint=True)


def test_checkpoints_of_other_optimizers_and_settings_are_refused(folder):
    with pytest.raises(ValueError, match="made with num_grads=3, this optimizer has num_grads=5") as caught:
        trainer(folder, optim_args="num_grads=5,density=0.1,block_size=1024").train(resume_from_checkpoint=True)
    assert any("checkpoint-8" in note for note in caught.value.__notes__)
    shutil.rmtree(folder)
    stock = trainer(folder, optim="adamw_torch", optim_args=None, save_strategy="steps", save_steps=4)
    stock.train()
    with pytest.raises(
        ValueError, match=r"written by (torch\.optim\.Adam or )?torch\.optim\.AdamW, and this optimizer is SparseMFAC"
    ):
        trainer(folder).train(resume_from_checkpoint=True)


def test_a_stock_optimizer_refuses_our_checkpoint_in_words(folder):
    """And goes on with its own."""
    for optim, name in (("adamw_torch", "AdamW"), ("sgd", "SGD")):
        with pytest.raises(ValueError, match=f"checkpoint-8 was written by .* hf_efcp, and this optimizer is {name}"):
            trainer(folder, optim=optim, optim_args=None).train(resume_from_checkpoint=True)
    shutil.rmtree(folder)
    trainer(folder, optim="sgd", optim_args=None, save_strategy="steps", save_steps=4).train()
    trainer(folder, optim="sgd", optim_args=None, max_steps=9).train(resume_from_checkpoint=True)


def test_resuming_warns_of_what_the_user_has_changed_and_of_nothing_else(folder):
    def caught(**changes):
        run = trainer(folder, **{"max_steps": 9, "warmup_steps": 3, **changes})
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            run.train(resume_from_checkpoint=True)
        return [str(warning.message) for warning in record if "settings of the checkpoint" in str(warning.message)]

    assert caught() == caught(lr_scheduler_type="cosine") == []
    options = SETTINGS["optim_args"]
    (message,) = caught(learning_rate=3e-4, weight_decay=0.2, optim_args=f"{options},damp=1e-3,momentum=0.5")
    given = "lr=0.0003 (in the checkpoint 0.0001), momentum=0.5 (in the checkpoint 0.0), weight_decay=0.2 (in the "
    given += "checkpoint 0.0), damp=0.001 (in the checkpoint 0.0), trust_lr=0.0 (in the checkpoint 0.0004). To use"
    assert f"those that were given: {given}" in message
    assert message.count("lr=0.0003") == 1  # of two groups


def test_a_window_that_training_cannot_fill_is_warned_of(tmp_path, caplog):
    def warned(**changes):
        caplog.clear()
        run = trainer(tmp_path, save_strategy="no", **changes)
        run.train()
        texts = [text for text in caplog.messages if "the window will never be full" in text]
        return run.optimizer.optimizer.memory()["total"], texts

    exact, texts = warned(optim_args="num_grads=8,density=0.1,block_size=1024")
    assert texts == []
    more, (text,) = warned(optim_args="num_grads=11,density=0.1,block_size=1024")
    assert text == (
        "num_grads=11, but there are only 8 training steps: the window will never be full. num_grads=8 holds as many "
        f"gradients, and takes {more - exact:,} bytes less"
    )
    assert more > exact


# Without Trainer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))


def steps(model, optimizer, numbers, backward=torch.Tensor.backward):
    for number in numbers:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(model(x), x[:, :2].sin()))
        optimizer.step()


def settled(name, model):
    """With momentum in one group, and one that is stepped as AdamW would."""
    first, second, third = (list(model[position].parameters()) for position in (0, 2, 4))
    return build(name, [{"params": first, "momentum": 0.5}, {"params": second},
                        {"params": third, "preconditioned": False}])  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_accelerators_save_state_and_load_state_are_exact(tmp_path, name):
    from accelerate import Accelerator

    def prepared():
        accelerator = Accelerator(cpu=True)
        model = network()
        return accelerator, *accelerator.prepare(model, settled(name, model))

    accelerator, model, optimizer = prepared()
    steps(model, optimizer, range(8), accelerator.backward)
    accelerator.save_state(str(tmp_path))
    steps(model, optimizer, range(8, 14), accelerator.backward)

    accelerator, other, fresh = prepared()
    accelerator.load_state(str(tmp_path))
    middle = flat(other.parameters())
    steps(other, fresh, range(8, 14), accelerator.backward)
    assert torch.equal(flat(other.parameters()), flat(model.parameters()))
    assert not torch.equal(middle, flat(model.parameters()))
    assert_same(fresh.optimizer.state_dict()["state"], optimizer.optimizer.state_dict()["state"])


@pytest.mark.parametrize("through", ["memory", "file", "dcp"])
@pytest.mark.parametrize("name", names())
def test_distributed_checkpoints_of_one_process_are_exact(tmp_path, name, through):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = network()
    optimizer = settled(name, model)
    steps(model, optimizer, range(8))
    middle = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    steps(model, optimizer, range(8, 14))

    other = network()
    other.load_state_dict(middle)
    fresh = settled(name, other)
    if through == "file":
        torch.save(saved, tmp_path / "optimizer.bin")
        saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    elif through == "dcp":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, **ALONE)
            container = {"optimizer": get_optimizer_state_dict(other, fresh)}
            dcp.load(container, checkpoint_id=tmp_path, **ALONE)
        saved = container["optimizer"]
    set_optimizer_state_dict(other, fresh, saved)
    steps(other, fresh, range(8, 14))
    assert torch.equal(flat(other.parameters()), flat(model.parameters()))
    assert not torch.equal(flat(middle.values()), flat(model.parameters()))
    assert_same(fresh.state_dict()["state"], optimizer.state_dict()["state"])
