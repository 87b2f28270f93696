"""The parts of a decoder's layers: linear maps, embeddings, norms, and the MLP, in Flax NNX.

Linear weights lie as Hugging Face stores them, (out, in). Axes as in `jaxdelta.model.decoder`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int


def contract(spec: str, x: Array, y: Array) -> Array:
    """`einsum` of two factors in x's dtype, summed in float32 at full precision."""
    return jnp.einsum(
        spec,
        x,
        y.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class Linear(nnx.Module):
    """y = W x + b with W (out, in); `stack` puts leading axes (layers) before the weight's own."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        bias: bool,
        stack: tuple[int, ...],
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        self.weight = nnx.Param(_normal(rngs, (*stack, size_out, size_in), dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, size_out), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*batch I"]) -> Float32[Array, "*batch O"]:
        """W x + b over the last axis: factors in x's dtype, sums in float32."""
        y = contract("...i,oi->...o", x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """Token embeddings (V, D)."""

    def __init__(self, vocab_size: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.weight = nnx.Param(_normal(rngs, (vocab_size, size), dtype))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """The tokens' rows, in the dtype in which they are stored."""
        return jnp.take(self.weight[...], tokens, axis=0)


class RMSNorm(nnx.Module):
    """`rms_norm` with a weight."""

    def __init__(self, size: int, eps: float, *, stack: tuple[int, ...] = (), dtype: DTypeLike):
        self.weight = nnx.Param(initial_norm((*stack, size), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
        """x over its root mean square, times the weight, in float32."""
        return rms_norm(x, self.weight[...], self.eps)


def initial_norm(shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "*stack D"]:
    """A norm's weight before training: it changes nothing."""
    return jnp.ones(shape, dtype)


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float
) -> Float32[Array, "*batch D"]:
    """x / sqrt(mean x² + eps) · w over the last axis, in float32 (Zhang & Sennrich 2019)."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)


class MLP(nnx.Module):
    """SwiGLU: W_down (silu(W_gate x) ∘ W_up x) (Shazeer 2020); with `bias`, each product has one added."""

    def __init__(self, hidden: int, inner: int, *, bias: bool = False, **options: Any):
        self.gate_proj = Linear(hidden, inner, bias=bias, **options)
        self.up_proj = Linear(hidden, inner, bias=bias, **options)
        self.down_proj = Linear(inner, hidden, bias=bias, **options)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch D"]:
        """W_down (silu(W_gate x) ∘ W_up x); what enters W_down is rounded to x's dtype."""
        return self.down_proj((jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)).astype(x.dtype))


def _normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    if rngs is None:  # for shapes alone: tracing a random generator takes longer than all the rest
        return jnp.zeros(shape, dtype)
    return nnx.initializers.normal(0.02)(rngs.params(), shape, dtype)
