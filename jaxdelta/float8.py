"""Weights in float8 (E4M3, Micikevicius et al. 2022, arXiv 2209.05433), as Qwen publishes them.

    W = W8 · s,   one scale s for each block of W8, (128, 128) as a rule

Only the layers' projections are stored so; each has its scales beside it, its name followed by `_scale_inv`.
What is computed is W x, at full precision: engines that multiply in float8 round x too, which this does not.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float32

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

_PROJECTION = re.compile(r"model\.layers\.\d+\..+_proj\.weight")


def may_be_float8(name: str) -> bool:
    """Whether a tensor of this name may have scales; embeddings, norms and routers have none."""
    return _PROJECTION.fullmatch(name) is not None


def scale_name(name: str) -> str:
    """Where a weight's scales are."""
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a weight's scales; blocks at the edges may be smaller than the others."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // block[0]), -(-columns // block[1]))


@partial(jax.jit, static_argnames="block")
def dequantise(
    weight: Float[Array, "*stack O I"], scale: Float32[Array, "*stack o i"], block: tuple[int, int]
) -> Float32[Array, "*stack O I"]:
    """W8 · s, in float32: W has the digits of both factors, and bfloat16 would round it by 2e-3.

    Args:
        weight: W8, with any axes before its own two.
        scale: one number a block.
        block: rows and columns of a block.
    """
    spread = jnp.repeat(jnp.repeat(scale, block[0], axis=-2), block[1], axis=-1)
    return weight.astype(jnp.float32) * spread[..., : weight.shape[-2], : weight.shape[-1]]
