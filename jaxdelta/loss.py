"""The model's loss on a text, its output embedding taken in slices. Axes as in `jaxdelta.model`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jaxdelta.compiling import QuickJit
from jaxdelta.layers import contract
from jaxdelta.types import AnyArray

VOCAB_SLICE = 4096


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
    (losses,) = sliced_loss(head.shape[0], slices, [(targets, normed)], compute_dtype)
    return losses


def vocabulary_slices(vocab_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the slices of the vocabulary: of one size, so the last overlaps the one before."""
    size = min(VOCAB_SLICE, vocab_size)
    stops = [*range(size, vocab_size, size), vocab_size]
    return [(stop - size, stop) for stop in stops]


def sliced_loss(
    vocab_size: int,
    slices: Iterable[Float[Array, "_ D"]],
    blocks: Iterable[tuple[Float[Array, "B next D"], Float32[AnyArray, "B T D"]]],
    compute_dtype: DTypeLike,
    fetch: Callable[[Array], np.ndarray] = np.asarray,
) -> list[Float32[np.ndarray, "B next"]]:
    """ln Σ_v exp(W_v·x) - W_target·x, with W's rows coming in slices: no (T, V) matrix is ever built.

    Args:
        vocab_size: the number of W's rows.
        slices: the output embedding's rows, as `vocabulary_slices` cuts them.
        blocks: of the text, each with the W_target of every position's next token, and x, the last state
            after the final norm; its last position has no next token.
        compute_dtype: dtype of the factors of the products.
        fetch: brings an array to the host.
    """
    begun = [_begin_loss(*block, jnp.dtype(compute_dtype)) for block in blocks]
    log_sums = [log_sum for _, _, log_sum in begun]
    counted = 0
    for (start, stop), rows in zip(vocabulary_slices(vocab_size), slices, strict=True):
        for i, (x, _, _) in enumerate(begun):
            log_sums[i] = _add_slice(log_sums[i], x, rows, counted - start)
        jax.block_until_ready(log_sums)  # before the next slice is taken
        counted = stop
    with np.errstate(invalid="ignore"):  # ∞ - ∞ is NaN, and the caller's to find
        return [
            fetch(log_sum) - fetch(target_score)
            for log_sum, (_, target_score, _) in zip(log_sums, begun, strict=True)
        ]


@partial(QuickJit, static_argnums=2)
def _begin_loss(targets: Array, normed: Array, compute_dtype: Any) -> tuple[Array, Array, Array]:
    x = normed[:, :-1].astype(compute_dtype)
    return x, contract("BTD,BTD->BT", x, targets), jnp.full(x.shape[:2], -jnp.inf, jnp.float32)


@QuickJit
def _add_slice(log_sum: Array, x: Array, rows: Array, counted: int | Array) -> Array:
    """ln(exp(log_sum) + Σ exp(rows·x)) over all rows but the first `counted`."""
    new = jnp.arange(rows.shape[0]) >= counted
    scores = contract("BTD,VD->BTV", x, rows)
    return jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, axis=-1, where=new))


def compile_sliced_loss(
    vocab_size: int, shape: tuple[int, int, int], weights_dtype: DTypeLike, compute_dtype: DTypeLike
) -> None:
    """Compiles `sliced_loss` for states of a shape (B, T, D), before they and the slices are there."""
    windows, length, hidden = shape
    start, stop = vocabulary_slices(vocab_size)[0]
    abstract, dtype = jax.ShapeDtypeStruct, jnp.dtype(compute_dtype)
    targets = abstract((windows, length - 1, hidden), weights_dtype)
    _begin_loss.lower(targets, abstract(shape, jnp.float32), dtype).compile()
    x, head = abstract(targets.shape, dtype), abstract((stop - start, hidden), weights_dtype)
    _add_slice.lower(abstract(targets.shape[:2], jnp.float32), x, head, 0).compile()
