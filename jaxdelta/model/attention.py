"""Grouped-query attention in blocks of bounded memory.

A row of queries is cut into spans, and a span into blocks of queries whose scores are computed at once.

Axes: as in `jaxdelta.model.decoder`; t queries of a span, S positions up to its end.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxdelta.model.config import ModelConfig
from jaxdelta.model.layers import contract

MIN_SPAN, MAX_SPANS = 512, 8  # queries of a span; spans of a row

# Bytes of the scores computed at once: they fit the cache of a CPU, or fill an accelerator. Never fewer than
# MIN_QUERY_BLOCK queries.
CACHED_SCORES, SCORE_BYTES, MIN_QUERY_BLOCK = 8 << 20, 64 << 20, 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a block knows of positions, and how it computes.

    `rotary`: (cos, sin) of the rotation; `window`: number of positions that a token attends to; `positions`
    (B, T): every token's position in its segment, outside which it attends to nothing; None if each row is
    one segment. Scores are computed for `query_block` queries, and `at_once` pairs of a row and a key/value
    head, at a time.
    """

    rotary: Any  # no shapes: JAX also builds such objects from shardings and specs
    window: Any
    compute_dtype: Any = dataclasses.field(metadata={"static": True})
    query_block: int = dataclasses.field(metadata={"static": True})
    at_once: int = dataclasses.field(metadata={"static": True})
    positions: Any = None


def attend(
    q: Float[Array, "B K G T H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], context: Context
) -> Float32[Array, "B K G T H"]:
    """softmax(q kᵀ/√H) v over the visible positions."""
    attend_heads = jax.vmap(partial(_attend_head, context), (0, 0, 0, None))
    rows, heads = k.shape[:2]
    if context.at_once >= rows * heads:
        return jax.vmap(attend_heads)(q, k, v, context.positions)
    pairs = [x.reshape(rows * heads, *x.shape[2:]) for x in (q, k, v)]
    positions = None if context.positions is None else jnp.repeat(context.positions, heads, axis=0)
    # A divisor: a remainder would be compiled a second time.
    at_once = next(count for count in range(context.at_once, 0, -1) if rows * heads % count == 0)
    # XLA on a CPU is slower on a batch of one pair than without a batch.
    size = at_once if at_once > 1 else None
    mixed = jax.lax.map(lambda pair: _attend_head(context, *pair), (*pairs, positions), batch_size=size)
    return mixed.reshape(q.shape)


def _attend_head(
    context: Context,
    q: Float[Array, "G T H"],
    k: Float[Array, "T H"],
    v: Float[Array, "T H"],
    positions: Int[Array, " T"] | None,
) -> Float32[Array, "G T H"]:
    """Attention of one pair, in spans of queries; skipping later keys, which are masked anyway, saves nearly
    half of the work of a long row."""
    length = len(k)
    span = max(MIN_SPAN, -(-length // MAX_SPANS))
    stops = range(span, length + span, span)
    mixed = [_attend_span(context, q[:, stop - span : stop], k[:stop], v[:stop], positions) for stop in stops]
    return jnp.concatenate(mixed, axis=1)


def _attend_span(
    context: Context,
    q: Float[Array, "G t H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    positions: Int[Array, " T"] | None,
) -> Float32[Array, "G t H"]:
    """Attention of the last t of S positions, for `context.query_block` queries at a time."""
    count, length = q.shape[1], len(k)
    block, start = min(context.query_block, count), length - count

    def attend_block(q: Array, queries: Array) -> Array:
        visible = causal_mask(queries, length, context.window, positions)
        # The mask is added, and the shares are rounded before their sum: XLA on a CPU vectorises sums, maxima
        # and exponentials, and writes nothing in between to memory.
        hidden = jnp.where(visible, jnp.float32(0), -jnp.inf)
        scores = contract("GTH,SH->GTS", q, k) * q.shape[-1] ** -0.5 + hidden
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        shares = jax.lax.optimization_barrier(weights.astype(q.dtype))
        # Divided by their sum after the product: one pass less over the scores.
        mixed = contract("GTS,SH->GTH", shares, v)
        return mixed / shares.sum(axis=-1, keepdims=True, dtype=jnp.float32)

    if block == count:
        return attend_block(q, jnp.arange(start, length))
    # The last block is padded with queries whose results are dropped.
    blocks = -(-count // block)
    padded = jnp.pad(q, [(0, 0), (0, blocks * block - count), (0, 0)])
    parts = jnp.moveaxis(padded.reshape(len(q), blocks, block, -1), 1, 0)
    queries = jnp.arange(start, start + blocks * block).reshape(blocks, block)
    mixed = jax.lax.map(lambda part: attend_block(*part), (parts, queries))
    return jnp.moveaxis(mixed, 0, 1).reshape(len(q), blocks * block, -1)[:, :count]


def causal_mask(
    queries: Int[Array, " T"],
    length: int,
    window: int | Int[Array, ""],
    positions: Int[Array, " S"] | None = None,
) -> Bool[Array, "T S"]:
    """visible[t, s]: token queries[t] of a row sees the `window` tokens s up to itself, and with `positions`
    (every token's position in its segment) no other segment."""
    distance = queries[:, None] - jnp.arange(length)[None, :]
    visible = (distance >= 0) & (distance < window)
    if positions is None:
        return visible
    reach = jnp.take(positions, queries, mode="clip")  # a padded block goes beyond the last token
    return visible & (distance <= reach[:, None])


def score_bytes() -> int:
    """Upper limit of the bytes of the scores computed at once."""
    return CACHED_SCORES if jax.default_backend() == "cpu" else SCORE_BYTES


def query_block(config: ModelConfig, length: int, pairs: int = 1) -> int:
    """Number of queries per block that keeps the scores of `pairs` within `score_bytes()`."""
    fitting = score_bytes() // (pairs * _query_bytes(config, length))
    return min(length, max(MIN_QUERY_BLOCK, fitting))


def pairs_at_once(config: ModelConfig, queries: int, length: int) -> int:
    """Number of (row, key/value head) pairs that keeps their scores within `score_bytes()`; at least 1."""
    return max(1, score_bytes() // (queries * _query_bytes(config, length)))


def _query_bytes(config: ModelConfig, length: int) -> int:
    """Bytes of a query's float32 scores in all heads that share its keys."""
    return 4 * config.num_heads // config.num_kv_heads * length
