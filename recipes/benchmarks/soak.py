"""Thousands of steps on a small model: does memory stay flat?

    python recipes/benchmarks/soak.py
    python recipes/benchmarks/soak.py --optim sparse_mfac --optim_args num_grads=64,metric=none --steps 5000

A small BERT is trained on a toy task, with a checkpoint saved and loaded again every few hundred steps. Resident memory
is sampled all the while, and the largest sample after the warm-up is compared with the first.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp import OPTIMIZERS, create_optimizer
from hf_efcp.factory import parse_optim_args

VOCAB, LENGTH, BATCH = 512, 16, 8


def main() -> None:
    """Run, print a line per sample, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", choices=list(OPTIMIZERS), default="lowrank_mfac")
    parser.add_argument("--optim_args", default="", help="as in training arguments")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=200, help="steps before memory counts: windows fill, pools grow")
    parser.add_argument("--every", type=int, default=100, help="steps between samples")
    parser.add_argument("--save_every", type=int, default=400, help="steps between saving and loading again")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/soak"))
    args = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
    )
    model = BertForSequenceClassification(config)
    optimizer = create_optimizer(args.optim, model, **parse_optim_args(args.optim, args.optim_args))
    process = psutil.Process()
    samples: list[dict[str, float]] = []
    begin, losses = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        tokens = torch.randint(1, VOCAB, (BATCH, LENGTH))
        loss = model(input_ids=tokens, labels=(tokens[:, 0] >= VOCAB // 2).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += loss.item()
        if step % args.save_every == 0:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            del file
        if step >= args.warmup and step % args.every == 0:
            gc.collect()
            samples.append({"step": step, "resident": process.memory_info().rss, "loss": losses / args.every})
            print(f"step {step:5d}   {samples[-1]['resident'] / 2**20:8.1f} MiB   loss {samples[-1]['loss']:.3f}")
        if step % args.every == 0:
            losses = 0.0
    first, largest = samples[0]["resident"], max(sample["resident"] for sample in samples)
    result = {
        "optim": args.optim,
        "optim_args": args.optim_args,
        "parameters": sum(param.numel() for param in model.parameters()),
        "state_bytes": optimizer.memory()["total"],
        "steps": args.steps,
        "seconds": time.perf_counter() - begin,
        "growth": largest / first - 1.0,
        "skipped_steps": optimizer.skipped_steps,
        "samples": samples,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{args.optim}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"resident memory grew by {100 * result['growth']:.2f} % from step {args.warmup} to {args.steps}")


if __name__ == "__main__":
    main()
