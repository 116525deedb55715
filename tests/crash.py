"""A training run that kills itself (SIGKILL), in a process of its own; started again, it resumes.

A `kill` says where: ("step", n) before the optimizer's n-th step, or (file, n) when half of that file of the checkpoint
of step n has been written.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils
from tiny import arguments, parameters, tiny_bert, toy_rows
from transformers import TrainerCallback, TrainerState

from hf_efcp import EFCPTrainer

STEPS, EVERY = 14, 3

# One server imports what all runs need and forks them; it has no threads that a fork could lose.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hf_efcp.trainer.trainer", "hf_efcp.trainer.training_args", "hf_efcp.kernels.numba"])


def start(folder, optim, *, optim_args="", kill=None, after=None, dtype=torch.float32):
    """Run to the end, or to a kill; returns whether it was killed.

    With `after`, it is killed from outside that many seconds after its first step.
    """
    process = _context.Process(target=_run, args=(str(folder), optim, optim_args, kill, dtype))
    process.start()
    if after is not None:
        while process.is_alive() and not Path(folder, "started").exists():
            time.sleep(0.01)
        process.join(after)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    assert (process.exitcode == 0) == Path(folder, "end.pt").exists()
    return process.exitcode != 0


def end(folder):
    """The parameters at the end of a run, and the checkpoint that each of its starts resumed from."""
    log = Path(folder, "log")
    return torch.load(Path(folder, "end.pt")), log.read_text().split("\n")[:-1]


def _run(folder, optim, optim_args, kill, dtype):
    torch.set_num_threads(1)
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "started").unlink(missing_ok=True)
    if kill and kill[0] != "step":
        _die_writing(kill[0], f"checkpoint-{kill[1]}")
    args = arguments(
        Path(folder), optim=optim, optim_args=optim_args, max_steps=STEPS, save_strategy="steps", save_steps=EVERY,
        learning_rate=1e-3, weight_decay=0.01, per_device_train_batch_size=4,
    )  # fmt: skip
    model = tiny_bert(dropout=0.1, dtype=dtype)
    watch = _Watch(kill[1] if kill and kill[0] == "step" else None, folder)
    trainer = EFCPTrainer(model=model, args=args, train_dataset=toy_rows(32), callbacks=[watch])
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*/trainer_state.json")))
    torch.save(parameters(model), Path(folder, "end.pt"))


class _Watch(TrainerCallback):
    def __init__(self, last, folder):
        self.last = last
        self.folder = Path(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        with open(self.folder / "log", "a") as log:
            log.write(f"{state.global_step}\n")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.last:
            _die()

    def on_step_end(self, args, state, control, **kwargs):
        (self.folder / "started").touch()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_writing(name, checkpoint):
    """What is on the disk when a process dies in the middle of a file: the first half of its bytes."""

    def dying(write, position):
        def wrapper(*args, **kwargs):
            write(*args, **kwargs)
            path = Path(str(args[position]))
            if path.name == name and path.parent.name == checkpoint:
                os.truncate(path, path.stat().st_size // 2)
                _die()

        return wrapper

    torch.save = dying(torch.save, 1)
    transformers.modeling_utils.safe_save_file = dying(safetensors.torch.save_file, 1)
    TrainerState.save_to_json = dying(TrainerState.save_to_json, 1)
