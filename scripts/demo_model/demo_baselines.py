r"""Baselines of the demo model: n-gram models on its held-out tokens.

    python scripts/demo_model/demo_baselines.py --corpus_dir=demo_work/corpus --work_dir=demo_work

Takes about a minute, writes `baselines.json` to the work folder, and prints nats per token of the
interpolated Kneser-Ney bigram and trigram, counted on the training tokens of the demo model.

With counts c, numbers N₊ of distinct n-grams, and discounts Dₙ = n₁ / (n₁ + 2 n₂) from the numbers n₁, n₂
of n-grams seen once and twice, each order passes its discounted mass to the next lower one:

    p₃(w | u v) = max(c(uvw) - D₃, 0) / c(uv·)   +  D₃ N₊(uv·) / c(uv·)    p₂(w | v)
    p₂(w | v)   = max(N₊(·vw) - D₂, 0) / N₊(·v·) +  D₂ N₊(v·) / N₊(·v·)    p₁(w)
    p₁(w)       = max(N₊(·w) - D₁, 0) / N₊(··)   +  D₁ N₊(·) / N₊(··)      / V

A lower order counts the different contexts of a word, the highest one its occurrences; the bigram
model uses c(vw) for N₊(·vw). Reference: Chen and Goodman, An empirical study of smoothing techniques for
language modeling, 1998.
"""

import json
import pathlib

import numpy as np
from absl import app, logging
from demo_tokens import CORPUS_DIR, VOCAB, WORK_DIR, prepare


def keys(tokens: np.ndarray, order: int) -> np.ndarray:
    """The n-gram that ends at each position i ≥ order - 1, as an int64 in base `VOCAB`."""
    ids, last = tokens.astype(np.int64), len(tokens)
    return sum(ids[i : last - order + 1 + i] * VOCAB ** (order - 1 - i) for i in range(order))


def look_up(table: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Counts of the wanted keys in a sorted table, 0 for missing keys."""
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[at] == wanted, counts[at], 0)


def interpolate(grams: np.ndarray, counts: np.ndarray, wanted: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """p(w | context) of the wanted n-grams at one order of the recursion, from the next lower order's p."""
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    discount = once / (once + 2 * twice)
    contexts, first = np.unique(grams // VOCAB, return_index=True)
    total = look_up(contexts, np.add.reduceat(counts, first), wanted // VOCAB)
    kinds = look_up(contexts, np.diff(np.append(first, len(grams))), wanted // VOCAB)
    seen = np.maximum(look_up(grams, counts, wanted) - discount, 0)
    return np.where(total > 0, (seen + discount * kinds * lower) / np.maximum(total, 1), lower)


def kneser_ney(train: np.ndarray, held: np.ndarray, order: int) -> float:
    """Mean -log p of `held[2:]` in nats, under the interpolated Kneser-Ney model of the given order."""
    grams, counts = np.unique(keys(train, order), return_counts=True)
    tables = [(grams, counts)]
    for lower in range(order - 1, 0, -1):  # different predecessors: each longer n-gram counts once
        grams, counts = np.unique(grams % VOCAB**lower, return_counts=True)
        tables.append((grams, counts))
    p = np.full(len(held) - 2, 1 / VOCAB)
    for n, (grams, counts) in enumerate(reversed(tables), start=1):
        p = interpolate(grams, counts, keys(held, n)[3 - n :], p)
    return float(-np.log(p).mean())


def baselines(corpus_dir: pathlib.Path, work_dir: pathlib.Path) -> dict[str, float]:
    """Held-out nats per token of bigram and trigram; counted on the first call, then read from a file."""
    stored = work_dir / "baselines.json"
    if not stored.exists():
        train, held = prepare(corpus_dir, work_dir)
        losses = {name: kneser_ney(train, held, order) for name, order in (("bigram", 2), ("trigram", 3))}
        stored.write_text(json.dumps(losses))
    return json.loads(stored.read_text())


def main(_: list[str]) -> None:
    """Logs every baseline's loss on the held-out text, in nats per token."""
    for name, loss in baselines(pathlib.Path(CORPUS_DIR.value), pathlib.Path(WORK_DIR.value)).items():
        logging.info("%s: %.4f nats per held-out token", name, loss)


if __name__ == "__main__":
    app.run(main)
