"""Weights in float8 (E4M3, Micikevicius et al. 2022, arXiv 2209.05433), as Qwen publishes them.

    W = W8 · s,   one scale s for each block of W8, (128, 128) as a rule

Only the layers' projections are stored so; each has its scales beside it, its name followed by `_scale_inv`.
What is computed is W x, at full precision: engines that multiply in float8 round x too, which this does not.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxdelta.checkpoint.source import Shape, TensorPart, TensorSource, TensorSpec, aligned

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


@dataclasses.dataclass(frozen=True)
class Float8:
    """Tensors some of which are in float8, in blocks of one size."""

    source: TensorSource
    block: tuple[int, int]

    def holds(self, name: str) -> bool:
        """Whether it is in float8."""
        return self.source.specs[name].dtype == FLOAT8

    def read(self, shape: Shape, parts: list[TensorPart]) -> Float32[Array, "..."]:
        """A parameter all of whose parts are in float8: they, and not their products, go to the device."""
        scales = [(scale_name(name), place) for name, place in parts]
        weight = self._fill(shape, FLOAT8, parts)
        scale = self._fill(scale_shape(shape, self.block), np.dtype(np.float32), scales)
        return dequantise(weight, scale, self.block)

    def _fill(self, shape: Shape, dtype: np.dtype, parts: list[TensorPart]) -> Array:
        buffer = aligned(shape, dtype)
        for name, place in parts:
            self.source.read_into(name, buffer[place])
        return jax.device_put(buffer, may_alias=True)

    def plain(self) -> TensorSource:
        """The same tensors in float32, without scales, for those who want one at a time."""
        specs = self.source.specs
        hidden = {scale_name(name) for name in specs if self.holds(name)}
        shown = {
            name: TensorSpec(spec.shape, np.dtype(np.float32)) if self.holds(name) else spec
            for name, spec in specs.items()
            if name not in hidden
        }

        def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            if not self.holds(name):
                return self.source.read(name, start, stop)
            return np.asarray(self.read(specs[name].shape, [(name, ())]))[start:stop]

        def fill(name: str, out: np.ndarray) -> None:
            if self.holds(name):
                out[...] = read(name)
            else:
                self.source.read_into(name, out)

        return TensorSource(shown, read, fill)
