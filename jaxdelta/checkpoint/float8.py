"""Weights in float8 (E4M3, Micikevicius et al. 2022, arXiv 2209.05433).

    W = W8 · s,   with one scale s per block of W8

Blocks are (128, 128) as Qwen publishes them, a row (1, 0) or the tensor (0, 0), where 0 is a whole axis. Only
the layers' projections are in float8; the scales of a weight have its name followed by `_scale_inv`. W x is
computed at full precision, while engines that multiply in float8 round x, too.
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
from jaxdelta.errors import JaxDeltaError

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
_PROJECTION = re.compile(r"model\.layers\.\d+\..+_proj\.weight")


def may_be_float8(name: str) -> bool:
    """Whether a tensor of this name may be in float8; embeddings, norms and routers may not."""
    return _PROJECTION.fullmatch(name) is not None


def scale_name(name: str) -> str:
    """The name of a weight's scales."""
    return f"{name}_scale_inv"


def scale_shape(shape: Shape, block: tuple[int, int]) -> Shape:
    """The shape of a weight's scales; blocks at the edges may be smaller."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // (block[0] or rows)), -(-columns // (block[1] or columns)))


def with_scales(source: TensorSource) -> TensorSource:
    """The tensors with scales under Qwen's names and with two axes, and without the scales of activations.

    compressed-tensors and AutoFP8 write `weight_scale` of shape (O, 1), (1,) or (), and `input_scale`;
    transformers writes `activation_scale`.
    """
    stored, specs, activations = {}, {}, 0
    for name, spec in source.specs.items():
        stem, _, last = name.rpartition(".")
        weight = source.specs.get(f"{stem}.weight")
        if weight is None or weight.dtype != FLOAT8 or last not in _SCALES:
            stored[name], specs[name] = name, spec
        elif last in ("weight_scale", "weight_scale_inv"):
            target = scale_name(f"{stem}.weight")
            if target in stored:
                raise JaxDeltaError(f"{name} and {stored[target]} are the scales of one weight")
            shape = spec.shape if len(spec.shape) == 2 else (*spec.shape, 1, 1)[:2]
            stored[target], specs[target] = name, TensorSpec(shape, spec.dtype)
        else:
            activations += 1

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec = source.specs[stored[name]]
        if spec == specs[name]:
            return source.read(stored[name], start, stop)
        whole = np.empty(spec.shape, spec.dtype)
        source.read_into(stored[name], whole)
        return whole.reshape(specs[name].shape)[start:stop]

    def fill(name: str, out: np.ndarray) -> None:
        source.read_into(stored[name], out.reshape(source.specs[stored[name]].shape))

    notes = source.notes
    if activations:
        notes += (f"{activations} scales of activations left out: activations are not rounded to float8",)
    return dataclasses.replace(source, specs=specs, read=read, fill=fill, notes=notes)


@partial(jax.jit, static_argnames="block")
def dequantise(
    weight: Float[Array, "*stack O I"], scale: Float32[Array, "*stack o i"], block: tuple[int, int]
) -> Float32[Array, "*stack O I"]:
    """W8 · s in float32; bfloat16 would round it by 2e-3.

    Args:
        weight: W8, or a stack of them.
        scale: s, one number per block.
        block: rows and columns of a block, 0 for all.
    """
    *_, rows, columns = weight.shape
    spread = jnp.repeat(jnp.repeat(scale, block[0] or rows, axis=-2), block[1] or columns, axis=-1)
    return weight.astype(jnp.float32) * spread[..., :rows, :columns]


@dataclasses.dataclass(frozen=True)
class Float8:
    """Tensors, some of them in float8 with blocks of one size."""

    source: TensorSource
    block: tuple[int, int]

    def holds(self, name: str) -> bool:
        """Whether a tensor is in float8."""
        return self.source.specs[name].dtype == FLOAT8

    def read(self, shape: Shape, parts: list[TensorPart]) -> Float32[Array, "..."]:
        """A parameter with all parts in float8, which is how they go to the device."""
        scales = [(scale_name(name), index) for name, index in parts]
        weight = self._fill(shape, FLOAT8, parts)
        scale = self._fill(scale_shape(shape, self.block), np.dtype(np.float32), scales)
        return dequantise(weight, scale, self.block)

    def _fill(self, shape: Shape, dtype: np.dtype, parts: list[TensorPart]) -> Array:
        buffer = aligned(shape, dtype)
        for name, index in parts:
            self.source.read_into(name, buffer[index])
        return jax.device_put(buffer, may_alias=True)

    def plain(self) -> TensorSource:
        """The same tensors dequantised to float32, without the scales."""
        specs = self.source.specs
        scales = {scale_name(name) for name in specs if self.holds(name)}
        plain = {
            name: TensorSpec(spec.shape, np.dtype(np.float32)) if self.holds(name) else spec
            for name, spec in specs.items()
            if name not in scales
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

        return TensorSource(plain, read, fill)
