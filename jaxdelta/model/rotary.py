"""Rotary position embedding (Su et al. 2021), scaled linearly, by YaRN (Peng et al. 2023, 2309.00071) or as
in Llama 3.1 (Grattafiori et al. 2024, 2407.21783).

Axes as in `jaxdelta.model.decoder`: T position, H head size.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxdelta.model.config import Rope
from jaxdelta.utils.arrays import AnyArray

# What the two halves of a head are multiplied by: cos, cos; and what their exchange is: -sin, sin.
Rotary = tuple[Float32[AnyArray, "T 2 halfH"], Float32[AnyArray, "T 2 halfH"]]


def rotary_frequencies(rope: Rope, head_dim: int) -> Float32[np.ndarray, " halfH"]:
    """Angular frequencies θ^(-2i/H) of RoPE, in radians per position, after scaling.

    Rounded to float32 step by step as transformers does: a frequency one rounding off is an angle 1e-4
    off at position 2000. Each power is the float32 nearest to it, by float64: the float32 powers of NumPy
    and of PyTorch are up to one rounding off on some processors, and not the same ones.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "yarn":
        kept = np.float32(1) - _yarn_ramp(rope, head_dim)
        slowed = np.float32(1) / (np.float32(rope.factor) * wavelengths)
        return slowed * (np.float32(1) - kept) + frequencies * kept
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: Rope, frequencies: Float32[np.ndarray, " halfH"]) -> Float32[np.ndarray, " halfH"]:
    """f where a turn takes less than a `high_freq_factor`th of the trained context, f / factor where it takes
    more than a `low_freq_factor`th; between them a mixture, linear in the turns within that context."""
    factor, low, high, one = map(np.float32, (rope.factor, rope.low_freq_factor, rope.high_freq_factor, 1))
    turns = np.float32(rope.original_max_positions) / (np.float32(2 * np.pi) / frequencies)
    kept = np.clip((turns - low) / (high - low), np.float32(0), one)
    mixed = (one - kept) * frequencies / factor + kept * frequencies
    return np.select([kept == 0, kept == one], [frequencies / factor, frequencies], mixed)


def _yarn_ramp(rope: Rope, head_dim: int) -> Float32[np.ndarray, " halfH"]:
    """0 for frequencies that turn often within the trained context, 1 for those that hardly turn."""

    def index(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * np.pi)
        return head_dim * np.log(turns) / (2 * np.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    high += 0.001 * (low == high)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1).astype(np.float32)


def rotary_tables(rope: Rope, head_dim: int, length: int) -> Rotary:
    """cos and sin of position · frequency, in float32, for positions 0..length-1 and both halves of a head.

    By NumPy: the same for all layers, so no layer's function should compute them.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * rotary_frequencies(rope, head_dim)
    scale = np.float32(rope.attention_factor)
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    return np.stack([cos, cos], axis=1), np.stack([-sin, sin], axis=1)


def rotate(
    x: Float32[Array, "B *heads T H"], rotary: Rotary, positions: Int[AnyArray, "B T"] | None = None
) -> Float32[Array, "B *heads T H"]:
    """Turns the pairs (x_i, x_{i+H/2}) of every head by their position's angles; without `positions` row t of
    the tables is token t's."""
    cos, sin = rotary
    if positions is not None:
        heads = tuple(range(1, x.ndim - 2))
        cos, sin = (
            jnp.expand_dims(jnp.take(table, positions, axis=0, mode="clip"), heads) for table in rotary
        )
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape)
