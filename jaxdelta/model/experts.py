"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) as in Qwen3: no token is dropped.

    y = Σ_{e in top k of p} s_e · expert_e(x),   p = softmax(W_gate x),   s = p, or p / Σ_{top k} p

Every (token, expert) pair is computed once. The pairs are sorted by expert and cut into blocks of one expert
each, so that a block is a plain product and one expert's weights are cast at a time. `jax.lax.ragged_dot`
would do this on a TPU; elsewhere it casts all experts' weights and multiplies all rows by each of them.

Axes: N tokens, D hidden size, E experts, C experts chosen for a token, P = N·C pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxdelta.model.config import Experts
from jaxdelta.model.layers import MLP, Init, Linear

MIN_ROWS = 32  # per block: with fewer, casting an expert's weights takes longer than the product


class SparseMLP(nnx.Module):
    """A router and its experts, whose weights are stacked along one more leading axis."""

    def __init__(self, hidden: int, experts: Experts, init: Init):
        self.gate = Linear(hidden, experts.count, init)
        init = init._replace(stack=(*init.stack, experts.count))
        self.experts = MLP(hidden, experts.intermediate_size, init)
        self.settings = experts

    def __call__(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
        """Σ_e s_e · MLP_e(x) over the experts chosen for each token."""
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = route(self.gate(rows), self.settings)
        # transformers rounds the shares to the dtype it computes in.
        shares = shares.astype(x.dtype).astype(jnp.float32)
        return _mix(self.experts, rows, shares, _blocks(chosen, self.settings.count)).reshape(x.shape)


def route(scores: Float32[Array, "N E"], experts: Experts) -> tuple[Float32[Array, "N C"], Int[Array, "N C"]]:
    """The shares s of the experts chosen for each token, and their indices."""
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), experts.per_token)
    if experts.renormalise:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return shares, chosen


class _Blocks(NamedTuple):
    expert: Int[Array, " blocks"]
    pairs: Int[Array, "blocks rows"]  # P where a block has no more pairs


def _blocks(chosen: Int[Array, "N C"], count: int) -> _Blocks:
    """Cuts the pairs, sorted by expert, into the number of blocks that the worst routing needs."""
    pairs = chosen.size
    # A quarter of an expert's mean load, since each expert's last block is half empty on average.
    size = max(MIN_ROWS, -(-pairs // (4 * count)))
    started = min(count, pairs)
    blocks = started + (pairs - started) // size
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    load = jnp.bincount(expert, length=count)
    ends = jnp.cumsum(-(-load // size))  # of each expert's blocks
    sorted_expert = expert[order]
    rank = jnp.arange(pairs) - (jnp.cumsum(load) - load)[sorted_expert]
    first = (ends - -(-load // size))[sorted_expert] * size
    slots = jnp.full(blocks * size, pairs).at[first + rank].set(order)
    block_expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return _Blocks(jnp.minimum(block_expert, count - 1), slots.reshape(blocks, size))


def _mix(
    experts: MLP, x: Float[Array, "N D"], shares: Float32[Array, "N C"], blocks: _Blocks
) -> Float32[Array, "N D"]:
    """Σ over a token's pairs of share · expert(x), block by block."""
    graph, weights = nnx.split(experts)
    count, per_token = shares.shape

    def add_block(y: Array, block: _Blocks) -> Array:
        expert = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[block.expert], weights))
        tokens = block.pairs // per_token  # N, out of range, for the pair P
        share = shares.reshape(-1).at[block.pairs].get(mode="fill", fill_value=0)
        written = expert(x.at[tokens].get(mode="fill", fill_value=0))
        return y.at[tokens].add(written * share[:, None], mode="drop")

    def step(y: Array, block: _Blocks) -> tuple[Array, None]:
        used = block.pairs[0] < count * per_token
        return jax.lax.cond(used, add_block, lambda y, _: y, y, block), None

    return jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), blocks)[0]
