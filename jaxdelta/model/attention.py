"""Grouped-query attention of many rows: what is compared with what, and how much of it at once.

Axes: as in `jaxdelta.model.decoder`; t queries of a span, S places they may see.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxdelta.model.config import ModelConfig
from jaxdelta.model.layers import contract

MIN_SPAN, MAX_SPANS = 512, 8  # queries of a row that are compared with the same keys; how often a row is cut

# Bytes of the scores of what is compared at once: on a CPU they should stay in its cache, on an accelerator
# fill it; at least so many queries of a row.
CACHED_SCORES, SCORE_BYTES, MIN_QUERY_BLOCK = 8 << 20, 64 << 20, 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a block knows of positions and of how to compute.

    `rotary`: (cos, sin) of the rotation; `window`: how many positions one attends to; `positions` (B, T):
    every token's position in its segment, outside which it attends to nothing, or None where each row is one
    segment; `query_block`: how many queries are compared with all keys at once; `at_once`: of how many pairs
    of a row and a key/value head. (No shapes in the types: JAX makes such objects of what is no array, too.)
    """

    rotary: Any
    window: Any
    compute_dtype: Any = dataclasses.field(metadata={"static": True})
    query_block: int = dataclasses.field(metadata={"static": True})
    at_once: int = dataclasses.field(metadata={"static": True})
    positions: Any = None


def attend(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    context: Context,
) -> Float32[Array, "B K G T H"]:
    """softmax(q kᵀ/√H) v over the positions seen, for `context.at_once` pairs of a row and a key/value head
    at a time."""
    of_heads = jax.vmap(partial(_attend_head, context), (0, 0, 0, None))
    rows, heads = k.shape[:2]
    if context.at_once >= rows * heads:
        return jax.vmap(of_heads)(q, k, v, context.positions)
    pairs = [x.reshape(rows * heads, *x.shape[2:]) for x in (q, k, v)]
    places = None if context.positions is None else jnp.repeat(context.positions, heads, axis=0)
    # A divisor: what is left over would be compiled a second time.
    at_once = next(count for count in range(context.at_once, 0, -1) if rows * heads % count == 0)
    # Nor is one pair a batch, whose products XLA on a CPU would take more slowly.
    size = at_once if at_once > 1 else None
    mixed = jax.lax.map(lambda pair: _attend_head(context, *pair), (*pairs, places), batch_size=size)
    return mixed.reshape(q.shape)


def _attend_head(
    context: Context,
    q: Float[Array, "G T H"],
    k: Float[Array, "T H"],
    v: Float[Array, "T H"],
    positions: Int[Array, " T"] | None,
) -> Float32[Array, "G T H"]:
    """One pair's, in spans of queries: later keys are none of their business, which in a long row saves
    nearly half of the work."""
    length = len(k)
    span = max(MIN_SPAN, -(-length // MAX_SPANS))
    stops = [min(start + span, length) for start in range(0, length, span)]
    mixed = [
        _attend_span(context, q[:, i * span : stop], k[:stop], v[:stop], positions)
        for i, stop in enumerate(stops)
    ]
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)


def _attend_span(
    context: Context,
    q: Float[Array, "G t H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    positions: Int[Array, " T"] | None,
) -> Float32[Array, "G t H"]:
    """That of the last t of S places, for `context.query_block` queries at a time."""
    count, length = q.shape[1], len(k)
    block, start = min(context.query_block, count), length - count

    def attend_block(q: Array, places: Array) -> Array:
        visible = causal_mask(places, length, context.window, positions)
        # What is hidden is added, and the shares are rounded before they are summed: as sums, maxima and
        # exponentials alone XLA on a CPU makes them in vectors, with nothing between written to memory.
        hidden = jnp.where(visible, jnp.float32(0), -jnp.inf)
        scores = contract("GTH,SH->GTS", q, k) * q.shape[-1] ** -0.5 + hidden
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        shares = jax.lax.optimization_barrier(weights.astype(q.dtype))
        # Divided by their sum when they are a head's width: one pass less over the scores.
        mixed = contract("GTS,SH->GTH", shares, v)
        return mixed / shares.sum(axis=-1, keepdims=True, dtype=jnp.float32)

    if block == count:
        return attend_block(q, jnp.arange(start, length))
    # The last block is filled up with queries whose answers are dropped.
    blocks = -(-count // block)
    padded = jnp.pad(q, [(0, 0), (0, blocks * block - count), (0, 0)])
    parts = jnp.moveaxis(padded.reshape(len(q), blocks, block, -1), 1, 0)
    places = jnp.arange(start, start + blocks * block).reshape(blocks, block)
    mixed = jax.lax.map(lambda part: attend_block(*part), (parts, places))
    return jnp.moveaxis(mixed, 0, 1).reshape(len(q), blocks * block, -1)[:, :count]


def causal_mask(
    places: Int[Array, " T"],
    length: int,
    window: int | Int[Array, ""],
    positions: Int[Array, " S"] | None = None,
) -> Bool[Array, "T S"]:
    """visible[t, s]: place t of a row sees the `window` places s = t, t - 1, ... of `length`.

    With the positions of all tokens in their segments only those of its segment: the one at position p sees
    p places before its own.
    """
    distance = places[:, None] - jnp.arange(length)[None, :]
    visible = (distance >= 0) & (distance < window)
    if positions is None:
        return visible
    reach = jnp.take(positions, places, mode="clip")  # the last block may go beyond the last token
    return visible & (distance <= reach[:, None])


def score_bytes() -> int:
    """What the scores of all that is compared at once may take."""
    return CACHED_SCORES if jax.default_backend() == "cpu" else SCORE_BYTES


def query_block(config: ModelConfig, length: int, pairs: int = 1) -> int:
    """As many queries of a row of so many tokens as keep the scores of such pairs within `score_bytes`."""
    fitting = score_bytes() // (pairs * _query_bytes(config, length))
    return min(length, max(MIN_QUERY_BLOCK, fitting))


def pairs_at_once(config: ModelConfig, queries: int, length: int) -> int:
    """As many pairs of a row and a key/value head, of so many queries, as `score_bytes` allow; at least 1."""
    return max(1, score_bytes() // (queries * _query_bytes(config, length)))


def _query_bytes(config: ModelConfig, length: int) -> int:
    """Of a query's scores, in float32, with all heads that share a pair's keys."""
    return 4 * config.num_heads // config.num_kv_heads * length
