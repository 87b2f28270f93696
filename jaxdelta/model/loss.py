"""The model's loss on a text, its output embedding taken in slices. Axes as in `jaxdelta.model.decoder`."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jaxdelta.model.layers import contract
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.compiling import compiler_options

VOCAB_SLICE = 4096
PROBED = 512  # tokens of a text whose loss is taken: of them all it would take as long as several layers


def next_token_loss(
    head: Float[Array, "V D"],
    normed: Float32[Array, "B T D"],
    tokens: Int[Array | np.ndarray, "B T"],
    compute_dtype: DTypeLike = jnp.float32,
) -> Float32[np.ndarray, "B T-1"]:
    """-ln p(token t+1 | tokens ..t) in nats.

    Args:
        head: the output embedding.
        normed: the last state after the final norm.
        tokens: the token ids.
        compute_dtype: dtype of the factors of the product.
    """
    targets = jnp.take(head, jnp.asarray(tokens)[:, 1:], axis=0)
    slices = (head[start:stop] for start, stop in vocabulary_slices(head.shape[0]))
    return sliced_loss(head.shape[0], slices, targets, normed[:, :-1], compute_dtype)


def vocabulary_slices(vocab_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the slices of the vocabulary: of one size, so the last overlaps the one before."""
    size = min(VOCAB_SLICE, vocab_size)
    stops = [*range(size, vocab_size, size), vocab_size]
    return [(stop - size, stop) for stop in stops]


def sliced_loss(
    vocab_size: int,
    slices: Iterable[Float[Array, "_ D"]],
    targets: Float[Array, "*batch D"],
    normed: Float32[AnyArray, "*batch D"],
    compute_dtype: DTypeLike,
) -> Float32[np.ndarray, "*batch"]:
    """ln Σ_v exp(W_v·x) - W_target·x, with W's rows coming in slices: no (T, V) matrix is ever built.

    Args:
        vocab_size: the number of W's rows.
        slices: the output embedding's rows, as `vocabulary_slices` cuts them.
        targets: W_target of every token's next one.
        normed: x, every token's last state after the final norm.
        compute_dtype: dtype of the factors of the products.
    """
    begin, add_slice = _programs()
    x, target_score, log_sum = begin(targets, normed, jnp.dtype(compute_dtype))
    counted = 0
    for (start, stop), rows in zip(vocabulary_slices(vocab_size), slices, strict=True):
        log_sum = add_slice(log_sum, x, rows, counted - start)
        jax.block_until_ready(log_sum)  # before the next slice is taken
        counted = stop
    with np.errstate(invalid="ignore"):  # ∞ - ∞ is NaN, and the caller's to find
        return np.asarray(log_sum) - np.asarray(target_score)


@cache
def _programs() -> tuple[Any, Any]:
    """The compiled `_begin_loss` and `_add_slice`."""
    options = compiler_options()
    begin = jax.jit(_begin_loss, static_argnums=2, compiler_options=options)
    return begin, jax.jit(_add_slice, compiler_options=options)


def _begin_loss(targets: Array, normed: Array, compute_dtype: Any) -> tuple[Array, Array, Array]:
    x = normed.astype(compute_dtype)
    return x, contract("...D,...D->...", x, targets), jnp.full(x.shape[:-1], -jnp.inf, jnp.float32)


def _add_slice(log_sum: Array, x: Array, rows: Array, counted: int | Array) -> Array:
    """ln(exp(log_sum) + Σ exp(rows·x)) over all rows but the first `counted`."""
    # Added, not chosen by `where`: XLA on a CPU then has all of it in one library call.
    hidden = jnp.where(jnp.arange(rows.shape[0]) >= counted, jnp.float32(0), -jnp.inf)
    scores = contract("...D,VD->...V", x, rows) + hidden
    return jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, axis=-1))
