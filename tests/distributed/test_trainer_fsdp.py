"""FSDP2 and DDP through EFCPTrainer, on two gloo processes.

[hack] Accelerate enables FSDP on accelerators only, and on the CPU replaces it by DDP without a word. `fsdp` below
calls the processes a multi-GPU setup for as long as a trainer lives; all that follows is the code of a GPU run.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from ranks import needs_fsdp, run
from states import assert_same
from tiny import arguments, tiny_bert, toy_rows
from transformers import TrainerCallback

from hf_efcp import EFCPTrainer

pytestmark = needs_fsdp

STEPS = 8
COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "logging_strategy": "steps",
    "logging_steps": 1,
}
DENSE = {
    "optim": "sparse_mfac",
    "optim_args": "num_grads=3,density=1.0,block_size=256,value_dtype=float32,precondition=momentum,"
    "metric_dtype=float32,momentum_dtype=float32",
}
SPARSE = {"optim": "sparse_mfac", "optim_args": "num_grads=3,density=0.1,block_size=256,momentum=0.5"}
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


@contextmanager
def ddp():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield {"ddp_find_unused_parameters": False}, lambda: None
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def fsdp(state_dict_type):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = {"transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": state_dict_type}

    def pretend():  # between the arguments and the trainer
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    yield {"fsdp": True, "fsdp_config": config}, pretend
    AcceleratorState._reset_state(reset_partial_state=True)


class Start(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def build(folder, setup, **settings):
    special, pretend = setup
    args = arguments(Path(folder), **{**COMMON, **settings, **special})
    assert args.world_size == 2
    pretend()
    start = Start()
    trainer = EFCPTrainer(model=tiny_bert(dropout=0.1), args=args, train_dataset=toy_rows(64), callbacks=[start])
    trainer.start = start
    return trainer


def whole(trainer):
    params = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for name, param in params
    }


def results(trainer):
    optimizer = trainer.optimizer.optimizer
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sharded = {hasattr(param, "full_tensor") for group in optimizer.param_groups for param in group["params"]}
    return {
        "theta": whole(trainer),
        "sharded": sharded,
        "losses": losses,
        "memory": optimizer.memory(),
        "start": trainer.start.step,
    }


def trained(folder, context, **settings):
    with context as setup:
        trainer = build(folder, setup, max_steps=STEPS, **settings)
        trainer.train()
        return results(trainer)


def resumed(folder, state_dict_type, rank, **settings):
    """Checkpoints of steps 3 and 6, of which the second is incomplete for the second process."""
    settings = {**settings, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 3}
    with fsdp(state_dict_type) as setup:
        trainer = build(folder, setup, **settings)
        trainer.train()
        through = results(trainer)
        files = sorted(os.listdir(f"{folder}/checkpoint-3"))
    torch.distributed.barrier()
    if rank == 1:
        for step in (6, 8):
            os.remove(f"{folder}/checkpoint-{step}/rng_state_1.pth")
    torch.distributed.barrier()
    with fsdp(state_dict_type) as setup:
        trainer = build(folder, setup, **settings)
        trainer.train(resume_from_checkpoint=True)
        again = results(trainer)
    torch.distributed.barrier()
    if rank == 0:
        Path(folder, "checkpoint-8").rename(f"{folder}/checkpoint-9")
        shutil.copy(f"{folder}/checkpoint-9/rng_state_0.pth", f"{folder}/checkpoint-9/rng_state_2.pth")
    torch.distributed.barrier()
    messages = []
    other = {**settings, "optim_args": settings["optim_args"].replace("num_grads=3", "num_grads=4")}
    with fsdp(state_dict_type) as setup:
        trainer = build(folder, setup, **other)
        for step in (3, 9):
            try:
                trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
            except ValueError as error:
                messages.append(str(error))
    return through, again, files, messages


def replicas(folder):
    with ddp() as setup:
        trainer = build(folder, setup, max_steps=200, **{**SPARSE, "logging_strategy": "no"})
        trainer.train()
        return whole(trainer), trainer.optimizer.optimizer.state_dict()["state"]


def unsharded(folder):
    """What Accelerate really does on the CPU."""
    with fsdp(FULL) as (settings, _), pytest.raises(ValueError, match="Accelerate does not shard here.*train without"):
        build(folder, (settings, lambda: None), **SPARSE)


def everything(rank, folder):
    """All runs in one pair of processes: starting them is what takes the time."""
    unsharded(f"{folder}/unsharded")
    return {
        "ddp": trained(f"{folder}/ddp", ddp(), **DENSE),
        "fsdp": trained(f"{folder}/fsdp", fsdp(FULL), **DENSE),
        FULL: resumed(f"{folder}/full", FULL, rank, **SPARSE),
        SHARDED: resumed(f"{folder}/sharded", SHARDED, rank, **SPARSE),
        "replicas": replicas(f"{folder}/replicas"),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run(everything, 2, folder, str(folder))


def distance(a, b):
    return float(torch.cat([(a[name] - b[name]).detach().flatten() for name in a]).norm())


def test_fsdp_takes_the_steps_of_ddp(ranks):
    start = dict(tiny_bert(dropout=0.1).named_parameters())
    for rank in ranks:
        whole, sharded = rank["ddp"], rank["fsdp"]
        assert (whole["sharded"], sharded["sharded"]) == ({False}, {True})
        moved = distance(whole["theta"], start)
        assert moved > 0.05
        assert distance(whole["theta"], sharded["theta"]) < 1e-2 * moved
        assert len(sharded["losses"]) == STEPS
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-3)
        assert len(set(sharded["losses"])) == STEPS
        assert all(not torch.equal(sharded["theta"][name], start[name]) for name in start)


def test_each_rank_has_half_of_the_state(ranks):
    for rank in ranks:
        for part in ("indices", "values", "error", "momentum", "metric"):
            assert (
                0.5 * rank["ddp"]["memory"][part] <= rank["fsdp"]["memory"][part] < 0.52 * rank["ddp"]["memory"][part]
            )


@pytest.mark.parametrize("kind", [FULL, SHARDED])
def test_a_resumed_run_is_bit_equal_and_starts_where_all_ranks_can(ranks, kind):
    for rank in ranks:
        through, again, files, messages = rank[kind]
        assert (through["start"], again["start"]) == (0, 3)
        assert all(torch.equal(through["theta"][name], again["theta"][name]) for name in through["theta"])
        assert ("optimizer.bin" if kind == FULL else "optimizer_0") in files
        settings, processes = messages
        assert "made with num_grads=3, this optimizer has num_grads=4" in settings
        assert "checkpoint-9 was saved by 3 processes, and there are 2" in processes


def test_replicas_stay_bit_equal_over_200_steps(ranks):
    (theta, state), (other_theta, other_state) = (rank["replicas"] for rank in ranks)
    assert distance(theta, dict(tiny_bert().named_parameters())) > 0.1
    assert all(torch.equal(theta[name], other_theta[name]) for name in theta)
    assert max(tensors.get("pushed", 0) for tensors in state.values()) == 200
    assert_same(state, other_state)
