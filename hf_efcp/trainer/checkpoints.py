"""Which of Trainer's checkpoints can be resumed from: they are written file by file, and a run may end in between."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import (
    FSDP_MODEL_NAME,
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..family import AnyOptimizer

logger = logging.getLogger(__name__)

# Each may be in a checkpoint; adapters may have folders of their own.
_WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
_ADAPTERS = tuple(f"{place}adapter_model.{kind}" for place in ("", "*/") for kind in ("safetensors", "bin"))
_OPTIMIZERS = (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)
_RANDOM = "rng_state*.pth"
_GROUPS = "param_groups"
_OTHER_NUMBER = " (if another number of processes saved the checkpoint, give its path to resume from it all the same)"


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint that depend on how a run is distributed.

    Args:
        model: The weights, or None for what `save_pretrained` writes.
        optimizer: The state of the optimizer.
        random: The states of this process's random generators.
        processes: How many processes must have saved it, or None for any number.
    """

    model: str | None
    optimizer: str
    random: str
    processes: int | None


def choose(trainer: Trainer, asked: str | bool) -> str | bool:
    """Find the checkpoint to resume from.

    Args:
        trainer: The trainer that is to resume.
        asked: A checkpoint, or True for the newest complete one in `output_dir`.

    Returns:
        The checkpoint; `asked` itself if there are none, for which Trainer has its own words.

    Raises:
        ValueError: The checkpoint is incomplete, or all are.
    """
    layout = _layout(trainer)
    if asked is True:
        newest = _newest_complete(str(trainer.args.output_dir), layout)
        if newest is None:
            return asked
        asked = newest
    folder = Path(str(asked))
    if text := _problem(folder, layout) or _altered(folder / layout.optimizer):
        raise ValueError(
            f"{text}: training would not go on where it stopped. Resume from another checkpoint, or load the model "
            "from this one and train without resume_from_checkpoint"
        )
    return asked


def _newest_complete(output_dir: str, layout: Layout) -> str | None:
    """The newest checkpoint that is complete for every process, with a warning about newer ones; None without any."""
    own = {
        str(folder): _problem(folder, layout) or _absent(folder / layout.random, _OTHER_NUMBER)
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and _step(folder).isdigit()
    }
    everyone = _from_all_processes(own)
    folders = sorted({folder for problems in everyone for folder in problems}, key=lambda name: -int(_step(name)))
    incomplete: dict[str, str] = {}
    for folder in folders:
        texts = [problems.get(folder, f"{folder} is not there for every process") for problems in everyone]
        text = next(filter(None, texts), None)
        if text is None:
            for skipped, why in incomplete.items():
                logger.warning("%s is incomplete and was skipped: %s", skipped, why)
            return folder
        incomplete[folder] = text
    if not folders:
        return None
    raise ValueError(
        f"none of the {len(folders)} checkpoints in {output_dir} is complete: {'; '.join(incomplete.values())}. Resume "
        "from a checkpoint in another folder, or train without resume_from_checkpoint to start anew"
    )


def _problem(folder: Path, layout: Layout) -> str | None:
    """What is wrong with a checkpoint; None if it is complete. Files are opened, but not read."""
    weights = [folder / layout.model] if layout.model else _weights(folder)
    if not weights:
        return f"{folder} has no weights of a model"
    needed = [*weights, *(folder / name for name in (layout.optimizer, SCHEDULER_NAME, TRAINER_STATE_NAME))]
    savers = len(list(folder.glob(_RANDOM)))  # nothing else in it tells their number
    if layout.processes not in (None, savers):
        return (
            f"{folder} was saved by {savers} processes, and there are {layout.processes}: the state of sharded "
            "parameters fits only as many as saved it"
        )
    optional = [path for name in (SCALER_NAME, layout.random) if (path := folder / name).exists()]
    return next((text for path in [*needed, *optional] if (text := _absent(path) or _damaged(path))), None)


def _weights(folder: Path) -> list[Path]:
    found = [path for name in _WEIGHTS + _ADAPTERS for path in sorted(folder.glob(name))]
    for index in [path for path in found if path.suffix == ".json" and not _damaged(path)]:
        found += [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return found


def _sharded(folder: Path) -> list[Path]:
    """What FSDP writes instead: a file or a folder for the model, and a folder for the optimizer."""
    return [*folder.glob(f"{FSDP_MODEL_NAME}*"), *folder.glob("optimizer_*")]


def _step(folder: str | Path) -> str:
    return Path(folder).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def check_settings(folder: str, trainer: Trainer, optimizer: AnyOptimizer) -> None:
    """Refuse a checkpoint of sharded state whose settings differ, of which torch would only say that shapes do.

    Args:
        folder: The checkpoint.
        trainer: The trainer that resumes.
        optimizer: Its optimizer.

    Raises:
        ValueError: A setting differs, or the optimizer is another one.
    """
    path = Path(folder, _layout(trainer).optimizer)
    groups = _distributed_groups(path) if path.is_dir() else torch.load(path, mmap=True, weights_only=True)[_GROUPS]
    optimizer._check_groups(groups)


def refuse_ours(folder: str, reader: str) -> None:
    """Refuse a checkpoint of ours for another optimizer, whose own words would be `KeyError: 'step'`.

    Args:
        folder: The checkpoint.
        reader: What to call the other optimizer.

    Raises:
        ValueError: An EFCP optimizer has written it.
    """
    path = Path(folder, OPTIMIZER_NAME)
    if not path.is_file() or _damaged(path):
        return  # for the parent to judge
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # tensors stay in the file
    if any("efcp_format" in group for group in saved.get(_GROUPS, ())):
        raise ValueError(
            f"the checkpoint {folder} was written by an optimizer of hf_efcp, and this optimizer is {reader}, whose "
            "state is another. Resume with the optim that wrote it, or load the model alone and train without "
            "resume_from_checkpoint"
        )


def invalidate(trainer: Trainer, output_dir: str) -> None:
    """Before a checkpoint is written, remove what an earlier run in the same folder left there.

    Else half of the new checkpoint and half of the old would look complete; or a file that the new run does not write,
    such as the weights of a model of which it saves an adapter, would be read with it.

    Args:
        trainer: The trainer, at the step whose checkpoint is about to be written.
        output_dir: The folder of the checkpoints.
    """
    if trainer.args.should_save:
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        # What is written last goes first: a run may end in between here as well.
        names = (TRAINER_STATE_NAME, SCHEDULER_NAME, SCALER_NAME, *_OPTIMIZERS)
        for path in (*(folder / name for name in names), *folder.glob(_RANDOM), *_weights(folder), *_sharded(folder)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def _layout(trainer: Trainer) -> Layout:
    args = trainer.args
    random = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    if not trainer.is_fsdp_enabled:
        return Layout(None, OPTIMIZER_NAME, random, None)
    if "FULL_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        return Layout(f"{FSDP_MODEL_NAME}.bin", OPTIMIZER_NAME_BIN, random, args.world_size)
    return Layout(f"{FSDP_MODEL_NAME}_0", "optimizer_0", random, args.world_size)


def _from_all_processes(own: dict[str, str | None]) -> list[dict[str, str | None]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    found: list[dict[str, str | None]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def _absent(path: Path, hint: str = "") -> str | None:
    return None if path.exists() else f"{path} is missing{hint}"


def _damaged(path: Path) -> str | None:
    try:
        if path.is_dir():
            _check_distributed(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length of the file
                pass
        else:
            with zipfile.ZipFile(path):  # torch.save writes a zip file, whose directory is at the end
                pass
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
        return f"{path} is damaged ({error})"
    return None


def _altered(path: Path) -> str | None:
    """Compare a file with the checksums that torch.save wrote into it: torch.load does not look at them."""
    if path.is_dir():
        return None
    with zipfile.ZipFile(path) as archive:
        entry = archive.testzip()
    return f"{path} is damaged (the checksum of its entry {entry} is wrong)" if entry else None


def _check_distributed(folder: Path) -> None:
    for part in _metadata(folder).storage_data.values():
        size = (folder / part.relative_path).stat().st_size
        if size < part.offset + part.length:
            raise ValueError(f"{part.relative_path} has {size} bytes of at least {part.offset + part.length}")


def _distributed_groups(folder: Path) -> list[dict[str, Any]]:
    from torch.distributed.checkpoint.state_dict_loader import load  # slow to import, and rarely needed

    paths = {key: path for key, path in _metadata(folder).planner_data.items() if path[1] == _GROUPS}
    flat: dict[str, Any] = dict.fromkeys(paths)
    load(flat, checkpoint_id=folder)
    groups: dict[int, dict[str, Any]] = {}
    for key, (_, _, number, name) in paths.items():
        groups.setdefault(number, {})[name] = flat[key]
    return [groups[number] for number in sorted(groups)]


def _metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # slow to import, and rarely needed

    return FileSystemReader(folder).read_metadata()
