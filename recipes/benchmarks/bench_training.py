"""Whole training steps: forward, backward and the optimizer, with each optimizer in turn on the same model."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch


def measure_training(
    model: Any, optimizers: dict[str, torch.optim.Optimizer], *, repeats: int, batch: int, length: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Time training steps on random tokens. The optimizers have learning rate 0, so that all train the same model.

    Args:
        model: A sequence classifier of transformers.
        optimizers: By label; stepped.
        repeats: Steps of each; one more warms up.
        batch: Sequences of a batch.
        length: Tokens of a sequence.
        seed: Seed of the tokens and of dropout.

    Returns:
        By label, the medians of `forward_backward`, `optimizer` and `whole` in seconds, and all `repeats` of the last.
    """
    torch.manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length))
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.randint(0, model.config.num_labels, (batch,)),
    }
    model.train()
    runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for turn in range(repeats + 1):
        for label, optimizer in optimizers.items():
            model.zero_grad()
            start = time.perf_counter()
            model(**inputs).loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            if turn:  # the first round warms up
                runs[label].append((middle - start, time.perf_counter() - middle))
        print(f"training steps: round {turn} of {repeats}", flush=True)
    return {
        label: {
            "forward_backward": statistics.median(run[0] for run in pairs),
            "optimizer": statistics.median(run[1] for run in pairs),
            "whole": statistics.median(sum(run) for run in pairs),
            "repeats": [sum(run) for run in pairs],
        }
        for label, pairs in runs.items()
    }
