"""Setups of a Trainer in which EFCP optimizers cannot work, and what to use instead."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import Trainer

_INSTEAD = "train on one device, with torchrun (DDP), or with FSDP version 2 (fsdp=True)"


def refuse_what_cannot_work(trainer: Trainer, projected: bool) -> None:
    """Refuse a trainer whose parameters an EFCP optimizer could not step.

    Args:
        trainer: A trainer that was just constructed.
        projected: Its optimizer is one of `hf_efcp.projected`, which needs whole matrices.

    Raises:
        ValueError: It is set up for DeepSpeed, FSDP version 1, sharding that does not happen, a model that was
            distributed while it was loaded, or fp16 with float16 parameters; or for FSDP with a projected optimizer.
    """
    if trainer.is_fsdp_enabled and projected:
        raise ValueError(
            "GaLore and its relatives project whole matrices, which FSDP shards: train on one device or with torchrun "
            "(DDP), or take another optimizer of hf_efcp, such as lowrank_mfac"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"EFCP optimizers do not work with DeepSpeed, which hands them flattened parameters: {_INSTEAD}"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "EFCP optimizers do not work with FSDP version 1, which hands them flattened parameters: use version 2, "
            "Trainer's default, or --fsdp_config '{\"version\": 2}'"
        )
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            "fsdp=True was given, but Accelerate does not shard here (on the CPU and with XLA it never does): "
            "every process would keep the whole state: train without fsdp"
        )
    if getattr(trainer.model, "is_distributed_loading_by_transformers", False):  # older transformers do not say
        raise ValueError(
            "EFCP optimizers do not work with a model that from_pretrained has distributed (distributed_config): load "
            f"it whole and {_INSTEAD}"
        )
    model = cast(nn.Module, trainer.model)
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half and getattr(trainer.args, "mixed_precision", "fp16" if trainer.args.fp16 else "no") == "fp16":
        raise ValueError(
            f"fp16=True cannot train float16 parameters, got {len(half)} such as {half[0]}: load the model with "
            "dtype=torch.float32 (fp16=True or bf16=True then give mixed precision) or dtype=torch.bfloat16"
        )
