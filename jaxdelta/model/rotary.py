"""Rotary position embedding, plain or scaled; sources at `jaxdelta.model.config.Rope`, axes as in
`jaxdelta.model.decoder`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxdelta.model.config import Rope
from jaxdelta.utils.arrays import AnyArray

# Factors of the two halves of a head (cos, cos), and of the halves exchanged (-sin, sin).
Rotary = tuple[Float32[AnyArray, "T 2 halfH"], Float32[AnyArray, "T 2 halfH"]]


def rotary_frequencies(rope: Rope, head_dim: int) -> Float32[np.ndarray, " halfH"]:
    """Angular frequencies θ^(-2i/H) of RoPE, in radians per position, after scaling.

    Rounded to float32 step by step as in transformers: one rounding error in a frequency is an error of 1e-4
    in the angle at position 2000. Powers are computed in float64, then rounded: the float32 powers of NumPy
    and PyTorch are off by one rounding, differently, on some processors.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "yarn":
        unscaled = np.float32(1) - _yarn_ramp(rope, head_dim)
        slowed = np.float32(1) / (np.float32(rope.factor) * wavelengths)
        return slowed * (np.float32(1) - unscaled) + frequencies * unscaled
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: Rope, frequencies: Float32[np.ndarray, " halfH"]) -> Float32[np.ndarray, " halfH"]:
    """f for more than `high_freq_factor` turns within the trained context, f / factor for fewer than
    `low_freq_factor`; a mixture in between, linear in the number of turns."""
    factor, low, high, one = map(np.float32, (rope.factor, rope.low_freq_factor, rope.high_freq_factor, 1))
    turns = np.float32(rope.original_max_positions) / (np.float32(2 * np.pi) / frequencies)
    unscaled = np.clip((turns - low) / (high - low), np.float32(0), one)
    mixed = (one - unscaled) * frequencies / factor + unscaled * frequencies
    return np.select([unscaled == 0, unscaled == one], [frequencies / factor, frequencies], mixed)


def _yarn_ramp(rope: Rope, head_dim: int) -> Float32[np.ndarray, " halfH"]:
    """0 for frequencies with many turns within the trained context, 1 for those with hardly any."""

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

    In NumPy, so that they are arguments of the compiled layers and not computed in each.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * rotary_frequencies(rope, head_dim)
    scale = np.float32(rope.attention_factor)
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    return np.stack([cos, cos], axis=1), np.stack([-sin, sin], axis=1)


def rotate(
    x: Float32[Array, "B *heads T H"], rotary: Rotary, positions: Int[AnyArray, "B T"] | None = None
) -> Float32[Array, "B *heads T H"]:
    """Rotates the pairs (x_i, x_{i+H/2}) of every head by the angles of their position: row t of the tables
    for token t, or row positions[b, t]."""
    cos, sin = rotary
    if positions is not None:
        heads = tuple(range(1, x.ndim - 2))
        rows = (jnp.take(table, positions, axis=0, mode="clip") for table in rotary)
        cos, sin = (jnp.expand_dims(row, heads) for row in rows)
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape)
