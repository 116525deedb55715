"""A small comparison, and what it leaves behind."""

import json

OPTIONS = {
    "EFCP": {"optim": "sparse_mfac", "optim_args": "num_grads=16,density=0.05", "learning_rates": [1e-5, 1e-2]},
    "AdamW": {"optim": "adamw_torch", "learning_rates": [1e-3, 1e-7]},
}


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
