"""N-gram teachers of the demo model: its initial embeddings, and soft targets early in training.

In the time available, a model of 5 M parameters on two CPU cores sees part of the text once; bigrams and
trigrams of all of it are counted in seconds. No held-out token is used here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from demo_baselines import keys
from demo_tokens import VOCAB

FOLLOWERS = 16  # most frequent followers of each context; the others' share goes to the rest


class Soft(NamedTuple):
    """Soft targets of N positions: K followers and their shares (N, K), the rest and the last token (N,)."""

    followers: np.ndarray
    shares: np.ndarray
    rest: np.ndarray
    last: np.ndarray

    def loss(self, log_p: jax.Array, bigram: jax.Array) -> jax.Array:
        """Cross entropy with the soft targets, (N,), of log probabilities (N, V)."""
        few = jnp.sum(self.shares * jnp.take_along_axis(log_p, self.followers, axis=-1), axis=-1)
        return -few - self.rest * jnp.sum(bigram[self.last] * log_p, axis=-1)


def discount_of(counts: np.ndarray) -> float:
    """D = n₁ / (n₁ + 2 n₂)."""
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    return once / (once + 2 * twice)


def smooth(grams: np.ndarray) -> np.ndarray:
    """p₂(w | v), dense (V, V), from the distinct trigrams: the number of different tokens before v w."""
    pairs, kinds = np.unique(grams % VOCAB**2, return_counts=True)
    words, bigrams = np.unique(pairs % VOCAB, return_counts=True)
    discount = discount_of(bigrams)
    unigram = np.full(VOCAB, discount * len(words) / bigrams.sum() / VOCAB)
    unigram[words] += np.maximum(bigrams - discount, 0) / bigrams.sum()
    discount, first = discount_of(kinds), pairs // VOCAB
    total = np.bincount(first, weights=kinds, minlength=VOCAB)
    spared = discount * np.bincount(first, minlength=VOCAB) / np.maximum(total, 1)
    table = np.where(total > 0, spared, 1.0)[:, None] * unigram
    table[first, pairs % VOCAB] += np.maximum(kinds - discount, 0) / total[first]
    return table.astype(np.float32)


def bigram_embeddings(tokens: np.ndarray, size: int, std: float) -> np.ndarray:
    """Embeddings from bigram counts, (V, size).

    The positive pointwise mutual information max(0, log p(a b) / p(a) p(b)) of neighbours is factored as
    U S Vᵀ; a token's row is the concatenation of its rows of U √S and V √S, its roles as first and as second
    token (Levy and Goldberg, 2014). `std` is the standard deviation of all entries.
    """
    pairs, counts = np.unique(tokens[:-1].astype(np.int64) * VOCAB + tokens[1:], return_counts=True)
    share = np.maximum(np.bincount(tokens, minlength=VOCAB), 1) / len(tokens)
    first, second = pairs // VOCAB, pairs % VOCAB
    information = np.log(counts / len(tokens) / (share[first] * share[second]))
    matrix = scipy.sparse.csr_matrix((np.maximum(information, 0), (first, second)), (VOCAB, VOCAB))
    u, s, vt = scipy.sparse.linalg.svds(matrix, k=size // 2, v0=np.ones(VOCAB))
    rows = np.concatenate([u * np.sqrt(s), vt.T * np.sqrt(s)], axis=1)
    return (rows * std / rows.std()).astype(np.float32)


class Teacher:
    """The trigram model of a token stream, evaluated for a batch at a time.

        p₃(w | u v) = max(c(uvw) - D₃, 0) / c(uv·)  +  rest(u v) p₂(w | v),

    given as the `FOLLOWERS` most frequent w with their shares, and the rest, which goes to the dense p₂ (see
    demo_baselines.py for p₂ and the discounts).
    """

    def __init__(self, tokens: np.ndarray):
        grams, counts = np.unique(keys(tokens, 3), return_counts=True)
        self.bigram = jnp.asarray(smooth(grams))
        order = np.lexsort((-counts, grams // VOCAB))  # by context, its most frequent follower first
        self.words = (grams[order] % VOCAB).astype(np.int32)
        self.contexts, first = np.unique(grams[order] // VOCAB, return_index=True)
        self.bounds = np.append(first, len(grams))
        totals = np.repeat(np.add.reduceat(counts[order], first), np.diff(self.bounds))
        self.shares = (np.maximum(counts[order] - discount_of(counts), 0) / totals).astype(np.float32)

    def __call__(self, inputs: np.ndarray) -> Soft:
        """The targets of every position of inputs (B, T); the first of a row has no token before it."""
        pairs = np.full(inputs.shape, -1, np.int64)
        pairs[:, 1:] = inputs[:, :-1].astype(np.int64) * VOCAB + inputs[:, 1:]
        context = pairs.ravel()
        at = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        index = self.bounds[at][:, None] + np.arange(FOLLOWERS)
        known = (self.contexts[at] == context)[:, None] & (index < self.bounds[at + 1][:, None])
        index = np.where(known, index, 0)
        shares = np.where(known, self.shares[index], 0).astype(np.float32)
        return Soft(self.words[index], shares, 1 - shares.sum(axis=1), inputs.reshape(-1))
