"""Data and tiny models for the GLUE recipe."""

import csv
import random
from pathlib import Path

from tiny import WORDS

ROOT = Path(__file__).parents[2]


def sentences(count, seed):
    """Sentences that say good or bad, and which of the two they say."""
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    texts = [[*rng.choices(WORDS, k=rng.randrange(3, 9)), ("bad", "good")[label]] for label in labels]
    for words in texts:
        rng.shuffle(words)
    return {"sentence": [" ".join(words) for words in texts], "label": labels}


def write_csv(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)
