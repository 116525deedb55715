"""Tiny BERT models, toy data and short runs for the tests of the Hugging Face side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_efcp import EFCPTrainer, EFCPTrainingArguments

# Transformers 4: BERT takes no further keyword arguments, so that Trainer believes nothing wrong of it; Trainer does
# not ask whether a loss is scaled, smooths labels batch by batch, and rounds what it logs to four decimals.
OLD = transformers.__version__ < "5"
needs_transformers_5 = pytest.mark.skipif(OLD, reason="transformers 4 does otherwise: see docs/stacks.md")

VOCAB, LENGTH = 64, 8
WORDS = ["film", "plot", "scene", "actor", "camera", "story", "music", "the", "a", "of"]


def tiny_bert(
    cls: type = BertForSequenceClassification,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    set_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    return cls(config).to(dtype)


def save_tiny_bert(folder: Path) -> Path:
    """Write a BERT of two small layers, without a head, and a tokenizer that knows good, bad and WORDS."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "good", "bad", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def toy_rows(n: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Sentences whose label is whether their first token is in the upper half of the vocabulary."""
    tokens = torch.randint(1, VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": (t[0] >= VOCAB // 2).long()} for t in tokens
    ]


def arguments(output_dir: Path, **kwargs: Any) -> EFCPTrainingArguments:
    quiet = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    return EFCPTrainingArguments(output_dir=str(output_dir), **{**quiet, **kwargs})


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Gradients(TrainerCallback):
    """Collects the flat gradient that the optimizer is about to see, once per step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]
        self.seen.append(torch.cat(grads).clone())


def train(
    args: EFCPTrainingArguments,
    model: torch.nn.Module,
    rows: list[dict[str, torch.Tensor]],
    *,
    trainer_cls: type[Trainer] = EFCPTrainer,
    **kwargs: Any,
) -> tuple[Trainer, list[torch.Tensor]]:
    """Train and return the trainer with the gradients that its optimizer saw."""
    gradients = Gradients()
    trainer = trainer_cls(model=model, args=args, train_dataset=rows, callbacks=[gradients], **kwargs)
    trainer.train()
    return trainer, gradients.seen
