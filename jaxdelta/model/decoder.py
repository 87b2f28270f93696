"""A decoder in Flax NNX: a block takes the residual stream and returns it with what each sublayer wrote.

    a = attention(norm(h));   b = mlp(norm(h + a));   h' = h + a + b

What a family has and another has not (norms of queries and keys, biases, windows) is a field of ModelConfig;
no family is known here by its name.

Axes: B batch, T position (S where a position is attended to), D hidden size, K key/value heads, G query
heads per key/value head, H head size, F MLP size, V vocabulary, L layers. Linear weights lie as Hugging
Face stores them, (out, in), and the module tree carries Hugging Face's names, so loading is a copy. A layer
is dense or sparse (its MLP a mixture of experts); the layers of one kind are stacked.

The residual stream is float32 (or `residual_dtype`); the factors of a product are in `compute_dtype`, its
sum is float32. Float32 products ask for full precision, since GPUs and TPUs otherwise round the factors.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxdelta.model.attention import Context, attend, pairs_at_once, query_block
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.experts import SparseMLP
from jaxdelta.model.layers import MLP, Embedding, Linear, RMSNorm, contract, rms_norm
from jaxdelta.model.rotary import rotary_tables, rotate
from jaxdelta.utils.arrays import AnyArray


class Attention(nnx.Module):
    """Grouped-query attention; queries and keys are normalised where the model does that, and rotated."""

    def __init__(self, config: ModelConfig, **options: Any):
        hidden, head = config.hidden_size, config.head_dim

        def linear(size_in: int, size_out: int, bias: bool) -> Linear:
            return Linear(size_in, size_out, bias=bias, **options)

        def norm() -> RMSNorm | None:
            if config.qk_norm is None:
                return None
            return RMSNorm(head, config.rms_norm_eps, stack=options["stack"], dtype=options["dtype"])

        self.q_proj = linear(hidden, config.num_heads * head, config.qkv_bias)
        self.k_proj = linear(hidden, config.num_kv_heads * head, config.qkv_bias)
        self.v_proj = linear(hidden, config.num_kv_heads * head, config.qkv_bias)
        self.o_proj = linear(config.num_heads * head, hidden, config.o_bias)
        self.q_norm, self.k_norm = norm(), norm()
        self.num_kv_heads, self.head_dim = config.num_kv_heads, head

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float32[Array, "B T D"]:
        """What the sublayer writes: W_o of all heads' mixtures of the values seen."""
        # Heads before positions, so that both products contract and run over adjacent axes as they lie.
        heads = (*x.shape[:2], self.num_kv_heads, -1, self.head_dim)
        q, k, v = (
            project(x).reshape(heads).transpose(0, 2, 3, 1, 4)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = _normed(self.q_norm, q), _normed(self.k_norm, k[:, :, 0]), v[:, :, 0]
        q = rotate(q, context.rotary, context.positions).astype(x.dtype)
        k = rotate(k, context.rotary, context.positions)
        mixed = attend(q, k, v, context)
        return self.o_proj(mixed.transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], -1).astype(x.dtype))


def _normed(norm: RMSNorm | None, x: Float32[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
    return x if norm is None else norm(x)


class Block(nnx.Module):
    """One layer. `stack=(L,)` holds L layers' weights at once; it is called on a single layer's."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        sparse: bool = False,
        stack: tuple[int, ...] = (),
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, stack=stack, dtype=dtype)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        options: dict[str, Any] = {"stack": stack, "dtype": dtype, "rngs": rngs}
        self.self_attn = Attention(config, **options)
        self.mlp: MLP | SparseMLP
        if sparse and config.experts:
            self.mlp = SparseMLP(config.hidden_size, config.experts, **options)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **options)

    def __call__(
        self, h: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Float32[Array, "B T D"], Float32[Array, "B T D"]]:
        """Returns the stream after the layer, what attention wrote into it and what the MLP wrote."""
        attention = self.self_attn(self.input_layernorm(h).astype(context.compute_dtype), context)
        h = _add(h, attention)
        mlp = self.mlp(self.post_attention_layernorm(h).astype(context.compute_dtype))
        return _add(h, mlp), attention, mlp


def _add(h: Float[Array, "B T D"], written: Float32[Array, "B T D"]) -> Float[Array, "B T D"]:
    return (h.astype(jnp.float32) + written).astype(h.dtype)


class Decoder(nnx.Module):
    """A causal language model, its layers' weights stacked along a leading axis.

    `layers` are the dense layers, `sparse_layers` those with experts, None where there are none. Initial
    weights are normal with standard deviation 0.02, or zero without `rngs`; `lm_head` is None where it is
    the embedding.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs | None):
        self.config = config
        embedding = partial(Embedding, config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.embed_tokens = embedding()

        def stacked(sparse: bool) -> Block | None:
            stack = (len(config.layers_of(sparse=sparse)),)
            return Block(config, sparse=sparse, stack=stack, dtype=dtype, rngs=rngs) if stack[0] else None

        self.layers, self.sparse_layers = stacked(sparse=False), stacked(sparse=True)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head = None if config.tie_embeddings else embedding()

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output embedding."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def final_norm(self, h: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
        """What the head is applied to, from the last state."""
        return final_norm(self.config, self.norm.weight[...], h)

    def layer(self, index: int) -> tuple[Any, nnx.State, int]:
        """The stack that layer `index` belongs to, split, and the layer's place in it."""
        sparse = self.config.is_sparse(index)
        graph, weights = nnx.split(self.sparse_layers if sparse else self.layers)
        return graph, weights, self.config.layers_of(sparse=sparse).index(index)


def embed(config: ModelConfig, rows: Float[AnyArray, "*batch D"], dtype: DTypeLike) -> Any:
    """h_0, the state that enters the first layer, from the tokens' rows of the embedding; on the host or on
    the device, as they are."""
    return rows.astype(dtype)


def final_norm(
    config: ModelConfig, weight: Float[Array, " D"], h: Float[Array, "*batch D"]
) -> Float32[Array, "*batch D"]:
    """What the head is applied to, from the last state and the final norm's weight."""
    return rms_norm(h, weight, config.rms_norm_eps)


def abstract_model(config: ModelConfig) -> Decoder:
    """The model with shapes in place of weights."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=None))


@cache
def abstract_block(config: ModelConfig, *, sparse: bool = False) -> Block:
    """One layer, with shapes in place of weights."""
    return nnx.eval_shape(lambda: Block(config, sparse=sparse, dtype=jnp.float32, rngs=None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """The residual stream at every layer, before the final norm, and its parts.

    states[l] enters layer l, states[L] leaves the last; states[l + 1] = states[l] + attention[l] + mlp[l].
    """

    states: Float[Array, "L1 B T D"]  # L1 = L + 1
    attention: Float32[Array, "L B T D"]
    mlp: Float32[Array, "L B T D"]
    normed: Float32[Array, "B T D"] | None = None

    @property
    def updates(self) -> Float32[Array, "L B T D"]:
        """δ_l, what layer l wrote: the sum of its sublayers' writes, not a difference of rounded states."""
        return self.attention + self.mlp


def residual_stream(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    residual_dtype: DTypeLike = jnp.float32,
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
        model: the model; its weights keep their dtype and are cast layer by layer.
        tokens: token ids.
        positions: of the tokens in their segments: 0, 1, 2, ... and from 0 again where the next segment
            begins; a token sees no other segment than its own. By default each row is one segment.
        compute_dtype: dtype of the factors of every product.
        residual_dtype: dtype of the stream itself.
        final_norm: also return the final RMSNorm of the last state, as `normed`.
    """
    graph, weights = nnx.split(model)
    dtypes = (jnp.dtype(compute_dtype), jnp.dtype(residual_dtype))
    placed = None if positions is None else jnp.asarray(positions)
    return _residual_stream(graph, weights, jnp.asarray(tokens), dtypes, final_norm, placed)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _residual_stream(
    graph: Any,
    weights: Any,
    tokens: Array,
    dtypes: tuple[Any, Any],
    with_norm: bool,
    positions: Array | None,
) -> ResidualStream:
    model = nnx.merge(graph, weights)
    compute_dtype, residual_dtype = dtypes
    first = embed(model.config, model.embed_tokens(tokens), residual_dtype)

    def step(h: Array, attention: Array, mlp: Array) -> tuple[Array, Array, Array]:
        return h, attention, mlp

    last, (states, attention, mlp) = _scan_layers(model, first, compute_dtype, step, positions=positions)
    states = jnp.concatenate([first[None], states])
    return ResidualStream(states, attention, mlp, model.final_norm(last) if with_norm else None)


def logits(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Float32[Array, "B T V"]:
    """Next-token logits; `remat` recomputes each layer in the backward pass instead of keeping it."""
    first = embed(model.config, model.embed_tokens(jnp.asarray(tokens)), jnp.float32)
    last, _ = _scan_layers(model, first, compute_dtype, lambda *_: None, remat=remat)
    return contract("BTD,VD->BTV", model.final_norm(last).astype(compute_dtype), model.head)


def _scan_layers(
    model: Decoder,
    h: Float[Array, "B T D"],
    compute_dtype: DTypeLike,
    keep: Callable[[Array, Array, Array], Any],
    *,
    positions: Int[Array, "B T"] | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """Passes h through all layers; `keep(h', attention, mlp)` says what is kept of each.

    One scan for each run of layers of one kind.
    """
    config = model.config
    context = block_context(config, (h.shape[0], h.shape[1]), compute_dtype, positions=positions)
    windows = jnp.asarray(attention_windows(config, h.shape[1]))
    kept = []
    for _, run in groupby(range(config.num_layers), config.is_sparse):
        layers = list(run)
        graph, weights, first = model.layer(layers[0])
        inputs = (_rows(weights, first, len(layers)), _rows(windows, layers[0], len(layers)))

        def layer(h: Array, inputs: tuple[Any, Array], graph: Any = graph) -> tuple[Array, Any]:
            layer_weights, window = inputs
            block = nnx.merge(graph, layer_weights)
            h, attention, mlp = block(h, dataclasses.replace(context, window=window))
            return h, keep(h, attention, mlp)

        h, part = jax.lax.scan(jax.checkpoint(layer) if remat else layer, h, inputs)
        kept.append(part)
    return h, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)


def _rows(tree: Any, start: int, count: int) -> Any:
    """Rows of every array; all of them without a copy."""
    return jax.tree.map(lambda leaf: leaf[start : start + count], tree)


def attention_windows(config: ModelConfig, length: int) -> Int32[np.ndarray, " L"]:
    """How many positions each layer attends to, `length` where it attends to all."""
    return np.array([window or length for window in config.windows], np.int32)


def block_context(
    config: ModelConfig,
    shape: tuple[int, int],
    compute_dtype: DTypeLike,
    queries: int | None = None,
    positions: Int[AnyArray, "B T"] | None = None,
    at_once: int | None = None,
) -> Context:
    """What the blocks need to know about tokens of shape (B, T); each sets its own window.

    `queries` and `at_once` as in Context, by default what `score_bytes` allow; `positions` as in
    `residual_stream`.
    """
    block = queries or query_block(config, shape[1])
    return Context(
        rotary=rotary_tables(config.rope, config.head_dim, shape[1]),
        window=np.int32(shape[1]),
        compute_dtype=jnp.dtype(compute_dtype),
        query_block=block,
        at_once=at_once or pairs_at_once(config, block, shape[1]),
        positions=positions,
    )
