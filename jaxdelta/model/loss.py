"""The model's loss on a text, one slice of the output embedding at a time. Axes: `jaxdelta.model.decoder`."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jaxdelta.model.layers import contract
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.compiling import compiler_options

VOCAB_SLICE = 4096
PROBED = 512  # tokens of a text in its loss: the loss of all would take as long as several layers


def vocabulary_slices(vocab_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the slices of the vocabulary: all of one size, so the last two overlap."""
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
    """-ln p(next token) = ln Σ_v exp(W_v·x) - W_target·x, in nats; no (T, V) matrix is ever built.

    W is the output embedding: its V rows come in `slices`, as `vocabulary_slices` cuts them, and `targets`
    are the rows of every next token. `normed` is x, every token's last state after the final norm. The
    factors of the products are in `compute_dtype`.
    """
    begin, add_slice = _programs()
    x, target_score, log_sum = begin(targets, normed, jnp.dtype(compute_dtype))
    counted = 0
    for (start, stop), rows in zip(vocabulary_slices(vocab_size), slices, strict=True):
        log_sum = add_slice(log_sum, x, rows, counted - start)
        jax.block_until_ready(log_sum)  # before the next slice is taken
        counted = stop
    with np.errstate(invalid="ignore"):  # ∞ - ∞ is NaN, which the caller looks for
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
    # Added, not selected by `where`: XLA on a CPU then computes all of it in one library call.
    hidden = jnp.where(jnp.arange(rows.shape[0]) >= counted, jnp.float32(0), -jnp.inf)
    scores = contract("...D,VD->...V", x, rows) + hidden
    return jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, axis=-1))
