"""The parts of a decoder's layers: linear maps, embeddings, norms, and the MLP, in Flax NNX.

Linear weights are stored as in Hugging Face's files, (out, in). Axes as in `jaxdelta.model.decoder`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int


class Init(NamedTuple):
    """How weights are made: leading axes (layers, experts), dtype, and random numbers; zeros without."""

    stack: tuple[int, ...] = ()
    dtype: DTypeLike = jnp.float32
    rngs: nnx.Rngs | None = None

    def normal(self, *shape: int) -> nnx.Param:
        """N(0, 0.02²)."""
        shape = (*self.stack, *shape)
        if self.rngs is None:  # only the shapes matter, and tracing a random generator is slow
            return nnx.Param(jnp.zeros(shape, self.dtype))
        return nnx.Param(nnx.initializers.normal(0.02)(self.rngs.params(), shape, self.dtype))


def contract(spec: str, x: Array, y: Array) -> Array:
    """`einsum` of two factors in x's dtype, summed in float32 at full precision."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, x, y.astype(x.dtype), precision=highest, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """y = W x + b, with W (out, in)."""

    def __init__(self, size_in: int, size_out: int, init: Init, *, bias: bool = False):
        self.weight = init.normal(size_out, size_in)
        self.bias = nnx.Param(jnp.zeros((*init.stack, size_out), init.dtype)) if bias else None

    def __call__(self, x: Float[Array, "*batch I"]) -> Float32[Array, "*batch O"]:
        """W x + b over the last axis: factors in x's dtype, sums in float32."""
        y = contract("...i,oi->...o", x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """Token embeddings (V, D)."""

    def __init__(self, vocab_size: int, size: int, init: Init):
        self.weight = init.normal(vocab_size, size)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The tokens' rows, in the dtype of the weights."""
        return jnp.take(self.weight[...], tokens, axis=0)


class RMSNorm(nnx.Module):
    """`rms_norm` with a weight."""

    def __init__(self, size: int, eps: float, init: Init):
        self.weight = nnx.Param(initial_norm((*init.stack, size), init.dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
        """x over its root mean square, times the weight, in float32."""
        return rms_norm(x, self.weight[...], self.eps)


def initial_norm(shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "*stack D"]:
    """An untrained norm's weight, which leaves the normalised state as it is."""
    return jnp.ones(shape, dtype)


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float
) -> Float32[Array, "*batch D"]:
    """x / sqrt(mean x² + eps) · w over the last axis, in float32 (Zhang & Sennrich 2019)."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)


class MLP(nnx.Module):
    """SwiGLU: W_down (silu(W_gate x) ∘ W_up x) (Shazeer 2020); `bias` adds one to each product."""

    def __init__(self, hidden: int, inner: int, init: Init, *, bias: bool = False):
        self.gate_proj = Linear(hidden, inner, init, bias=bias)
        self.up_proj = Linear(hidden, inner, init, bias=bias)
        self.down_proj = Linear(inner, hidden, init, bias=bias)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
        """The MLP's output in float32; the input of W_down is rounded to x's dtype."""
        return self.down_proj((jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)).astype(x.dtype))
