"""A small comparison, and what it leaves behind."""

import csv
import json
import random

from tiny import WORDS

OPTIONS = {
    "EFCP": {"optim": "sparse_mfac", "optim_args": "num_grads=16,density=0.05", "learning_rates": [1e-5, 1e-2]},
    "AdamW": {"optim": "adamw_torch", "learning_rates": [1e-3, 1e-7]},
}


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def write_reviews(folder):
    folder.mkdir()
    for split, count, seed in (("train", 256, 0), ("validation", 64, 1)):
        rng = random.Random(seed)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            for _ in range(count):
                label = rng.randrange(2)
                words = [*rng.choices(WORDS, k=rng.randrange(3, 9)), ("bad", "good")[label]]
                rng.shuffle(words)
                writer.writerow([" ".join(words), label])
    return folder
