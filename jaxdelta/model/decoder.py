"""A decoder in Flax NNX: a block takes the residual stream and returns it with what each sublayer wrote.

    a = attention(norm(h));   b = mlp(norm(h + a));   h' = h + a + b

Differences between families (norms of queries and keys, biases, windows) are fields of ModelConfig. The
module tree carries Hugging Face's names, and linear weights are stored as (out, in), so loading is a copy.
The layers of one kind, dense or sparse (the MLP is a mixture of experts), are stacked.

The residual stream is float32 (or `residual_dtype`); the factors of a product are in `compute_dtype`, its sum
is float32. Float32 products ask for full precision, since GPUs and TPUs otherwise round the factors.

Axes: B batch, T position (S where attended to), D hidden size, K key/value heads, G query heads per key/value
head, H head size, F MLP size, V vocabulary, L layers.
"""

import contextlib
import dataclasses
import math
from functools import cache, partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.attention import Context, attend, pairs_at_once, query_block
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.experts import SparseMLP
from jaxdelta.model.layers import MLP, Embedding, Init, Linear, RMSNorm, contract, rms_norm
from jaxdelta.model.rotary import rotary_tables, rotate
from jaxdelta.utils.arrays import AnyArray, check_between, check_positions, whole_numbers
from jaxdelta.utils.jax_settings import own_settings


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, and norms of queries and keys if the model has them."""

    def __init__(self, config: ModelConfig, init: Init):
        hidden, head = config.hidden_size, config.head_dim
        norm = partial(RMSNorm, head, config.rms_norm_eps, init) if config.qk_norm else lambda: None
        self.q_proj = Linear(hidden, config.num_heads * head, init, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, config.num_kv_heads * head, init, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, config.num_kv_heads * head, init, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * head, hidden, init, bias=config.o_bias)
        self.q_norm, self.k_norm = norm(), norm()
        self.num_kv_heads, self.head_dim = config.num_kv_heads, head

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float32[Array, "B T D"]:
        """The sublayer's write: W_o of the mixed values of all heads."""
        # Heads before positions, so that both products contract and run over adjacent axes.
        heads = (*x.shape[:2], self.num_kv_heads, -1, self.head_dim)
        q, k, v = (
            project(x).reshape(heads).transpose(0, 2, 3, 1, 4)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = k[:, :, 0], v[:, :, 0]
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, context.rotary, context.positions).astype(x.dtype)
        k = rotate(k, context.rotary, context.positions)
        mixed = attend(q, k, v, context)
        return self.o_proj(mixed.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], -1).astype(x.dtype))


class Block(nnx.Module):
    """One layer. With `init.stack` = (L,) it holds the weights of L layers; it is called on a single one."""

    def __init__(self, config: ModelConfig, init: Init, *, sparse: bool = False):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, init)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, init)
        self.mlp: MLP | SparseMLP
        if sparse and config.experts:
            self.mlp = SparseMLP(config.hidden_size, config.experts, init)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, init, bias=config.mlp_bias)

    def __call__(
        self, h: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Float32[Array, "B T D"], Float32[Array, "B T D"]]:
        """Returns the stream after the layer, and the writes of attention and MLP into it."""
        attention = self.self_attn(self.input_layernorm(h).astype(context.compute_dtype), context)
        h = _add(h, attention)
        mlp = self.mlp(self.post_attention_layernorm(h).astype(context.compute_dtype))
        return _add(h, mlp), attention, mlp


def _add(h: Float[Array, "B T D"], written: Float32[Array, "B T D"]) -> Float[Array, "B T D"]:
    return (h.astype(jnp.float32) + written).astype(h.dtype)


class Decoder(nnx.Module):
    """A causal language model, its layers' weights stacked along a leading axis.

    `layers` are the dense layers, `sparse_layers` the layers with experts; None for a kind without layers.
    `lm_head` is None if it is tied to the embedding, or if there is none. Initial weights are N(0, 0.02²), or
    zero without `rngs`.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs | None):
        self.config, init = config, Init(dtype=dtype, rngs=rngs)
        embedding = partial(Embedding, config.vocab_size, config.hidden_size, init)
        self.embed_tokens = embedding()

        def stacked(sparse: bool) -> Block | None:
            stack = (len(config.layers_of(sparse=sparse)),)
            return Block(config, init._replace(stack=stack), sparse=sparse) if stack[0] else None

        self.layers, self.sparse_layers = stacked(sparse=False), stacked(sparse=True)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, init)
        self.lm_head = embedding() if config.has_head and not config.tie_embeddings else None

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output embedding; a JaxDeltaError if there is none."""
        if not self.config.has_head:
            raise JaxDeltaError("the model has no head (lm_head.weight), as an embedding model: no logits")
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def layer(self, index: int) -> tuple[Any, nnx.State, int]:
        """The split stack that contains layer `index`, and the layer's index in it."""
        sparse = self.config.is_sparse(index)
        graph, weights = nnx.split(self.sparse_layers if sparse else self.layers)
        return graph, weights, self.config.layers_of(sparse=sparse).index(index)


def embed(config: ModelConfig, rows: Float[AnyArray, "*batch D"], dtype: DTypeLike) -> Any:
    """h_0, the state that enters the first layer, from the tokens' rows of the embedding (host or device)."""
    return rows.astype(dtype)


def final_norm(
    config: ModelConfig, weight: Float[Array, " D"], h: Float[Array, "*batch D"]
) -> Float32[Array, "*batch D"]:
    """The input of the head, from the last state and the final norm's weight."""
    return rms_norm(h, weight, config.rms_norm_eps)


@cache
def abstract_model(config: ModelConfig) -> Decoder:
    """The model with shapes in place of weights."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=None))


@cache
def abstract_block(config: ModelConfig, *, sparse: bool = False) -> Block:
    """One layer with shapes in place of weights."""
    return nnx.eval_shape(lambda: Block(config, Init(), sparse=sparse))


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value
class ResidualStream:
    """The residual stream at every layer, before the final norm, and its parts.

    states[l] enters layer l, states[L] leaves the last: states[l + 1] = states[l] + attention[l] + mlp[l].
    """

    states: Float[Array, "L1 B T D"]  # L1 = L + 1
    attention: Float32[Array, "L B T D"]
    mlp: Float32[Array, "L B T D"]
    normed: Float32[Array, "B T D"] | None = None

    @property
    def updates(self) -> Float32[Array, "L B T D"]:
        """δ_l, layer l's update: the sum of its sublayers' writes, not a difference of rounded states."""
        return self.attention + self.mlp


@own_settings()
def residual_stream(
    model: Any,
    tokens: Any,
    positions: Any = None,
    *,
    compute_dtype: Any = jnp.float32,
    residual_dtype: Any = jnp.float32,
    final_norm: bool = False,
) -> ResidualStream:
    """Runs the model once, compiled, and keeps the residual stream at every layer.

    >>> import numpy as np
    >>> tokens = np.array([[5, 17, 3, 99], [42, 8, 1, 7]])
    >>> stream = jaxdelta.residual_stream(model, tokens)
    >>> stream.states.shape, stream.attention.shape  # (N+1, B, T, D), (N, B, T, D)
    ((29, 2, 4, 128), (28, 2, 4, 128))
    >>> written = stream.attention + stream.mlp
    >>> np.testing.assert_allclose(stream.states[0] + written.sum(0), stream.states[-1], atol=1e-3)

    Args:
        model: a Decoder; its weights keep their dtype and are cast layer by layer.
        tokens: token ids, whole numbers of shape (B, T).
        positions: of the same shape, the tokens' positions in their segments, 0, 1, 2, ... and from 0 again
            at the start of the next segment; a token sees only its own segment. By default each row is one
            segment.
        compute_dtype: dtype of the factors of every product.
        residual_dtype: dtype of the stream itself.
        final_norm: also return the final RMSNorm of the last state, as `normed`.

    Raises:
        UsageError: `model` is no Decoder; the tokens are no array of ids that it has; the positions do not
            count up from 0; a dtype is none of floating-point numbers.
    """
    if not isinstance(model, Decoder):
        raise UsageError(f"model must be a loaded model, see load_model, not {type(model).__name__}")
    if not isinstance(tokens, jax.core.Tracer):
        tokens = whole_numbers(tokens, "tokens")
        check_between(tokens, "tokens", 0, model.config.vocab_size - 1)
    if positions is not None and not isinstance(positions, jax.core.Tracer):
        positions = whole_numbers(positions, "positions")
        check_positions(positions, tokens.shape)
    graph, weights = nnx.split(model)
    dtypes = _floating(compute_dtype, "compute_dtype"), _floating(residual_dtype, "residual_dtype")
    positions = None if positions is None else jnp.asarray(positions)
    return _residual_stream(graph, weights, jnp.asarray(tokens), dtypes, bool(final_norm), positions)


def _floating(dtype: Any, name: str) -> Any:
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(found := jnp.dtype(dtype), jnp.floating):
            return found
    raise UsageError(f"{name} must be a dtype such as float32 or bfloat16, not {dtype!r:.80}")


@partial(jax.jit, static_argnums=(0, 3, 4))
def _residual_stream(
    graph: Any, weights: Any, tokens: Array, dtypes: tuple[Any, Any], with_norm: bool, positions: Array | None
) -> ResidualStream:
    model = nnx.merge(graph, weights)
    config, (compute_dtype, residual_dtype) = model.config, dtypes
    context = block_context(config, (tokens.shape[0], tokens.shape[1]), compute_dtype)
    windows = jnp.asarray(attention_windows(config, tokens.shape[1]))
    h = first = embed(config, model.embed_tokens(tokens), residual_dtype)
    parts = []
    # One scan for each run of layers of one kind.
    for _, run in groupby(range(config.num_layers), config.is_sparse):
        layers = list(run)
        graph, weights, row = model.layer(layers[0])
        inputs = (_rows(weights, row, len(layers)), _rows(windows, layers[0], len(layers)))

        def layer(h: Array, inputs: tuple[Any, Array], graph: Any = graph) -> tuple[Array, Any]:
            layer_weights, window = inputs
            placed = dataclasses.replace(context, window=window, positions=positions)
            parts = nnx.merge(graph, layer_weights)(h, placed)
            return parts[0], parts

        h, part = jax.lax.scan(layer, h, inputs)
        parts.append(part)
    states, attention, mlp = jax.tree.map(lambda *runs: jnp.concatenate(runs), *parts)
    normed = final_norm(config, model.norm.weight[...], h) if with_norm else None
    return ResidualStream(jnp.concatenate([first[None], states]), attention, mlp, normed)


def logits(model: Decoder, tokens: Int[AnyArray, "B T"]) -> Float32[Array, "B T V"]:
    """Next-token logits; a JaxDeltaError if the model has no head."""
    head, last = model.head, residual_stream(model, tokens).states[-1]
    return contract("BTD,VD->BTV", final_norm(model.config, model.norm.weight[...], last), head)


def _rows(tree: Any, start: int, count: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[start : start + count], tree)


def attention_windows(config: ModelConfig, length: int) -> Int32[np.ndarray, " L"]:
    """Number of positions each layer attends to; `length` for all."""
    return np.array([window or length for window in config.windows], np.int32)


def block_context(
    config: ModelConfig,
    shape: tuple[int, int],
    compute_dtype: DTypeLike,
    queries: int | None = None,
    at_once: int | None = None,
) -> Context:
    """The Context of tokens of shape (B, T), whose window each layer replaces; its `query_block` (`queries`)
    and `at_once` are by default what `score_bytes()` allows."""
    block = queries or query_block(config, shape[1])
    return Context(
        rotary=rotary_tables(config.rope, config.head_dim, shape[1]),
        window=np.int32(shape[1]),
        compute_dtype=jnp.dtype(compute_dtype),
        query_block=block,
        at_once=at_once or pairs_at_once(config, block, shape[1]),
    )
