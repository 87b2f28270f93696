"""The figures of a view from its moments: those of `figures`, which have the tokens themselves.

Axes: G groups, d hidden size, c directions of the basis, q = min(d, LEADING) axes within which resampling is
exact, R divisions into halves. All functions must be traced with 64-bit types on.

Leaving out a group, or taking one half of them, changes M = Σ_g M_g. Within the q leading axes of M the new
matrix is solved exactly; beyond them all λ shrink alike, see `documents.without_groups`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdelta.documents import FACTOR_ROWS, Crossed, Resampled, without_groups
from jaxdelta.lapack import eigh
from jaxdelta.spectrum import Spectrum, defect, orient, product
from jaxdelta.types import AnyArray

LEADING = 128


class Pooled(NamedTuple):
    """Of a view: Σxxᵀ and Σx of each group's tokens, x less `centred` (0 or 1) times the mean of all; how
    many they are; how the groups are divided, see `documents.Groups`."""

    squares: Float64[AnyArray, "G d d"]
    sums: Float64[AnyArray, "G d"]
    counts: Float64[AnyArray, " G"]
    centred: Float[AnyArray, ""]
    halves: Float64[AnyArray, "R 2 G"]

    @property
    def mean(self) -> Float64[Array, " d"]:
        """What is taken from every token."""
        return jnp.asarray(self.centred) * jnp.sum(self.sums, axis=0) / jnp.maximum(jnp.sum(self.counts), 1)


class PooledFigures(NamedTuple):
    """What the device finds of a view without its tokens: see `figures.Found`."""

    spectrum: Spectrum
    mean_energy: Float64[AnyArray, ""]
    resampled: Resampled
    crossed: Crossed


@jax.jit
def total(pooled: Pooled) -> Float64[Array, "d d"]:
    """M = Σ_g M_g; 0 where it is not finite: some solvers never return from a NaN."""
    mean, n = pooled.mean, jnp.sum(pooled.counts)
    matrix = jnp.sum(pooled.squares, axis=0) - n * jnp.outer(mean, mean)
    return jnp.where(jnp.isfinite(matrix).all(), matrix, 0)


@jax.jit
def solve(matrix: Float64[AnyArray, "d d"]) -> tuple[Float64[Array, " d"], Float64[Array, "d d"]]:
    """Eigenvalues and, in columns, eigenvectors, ascending."""
    return eigh(jnp.asarray(matrix))


@partial(jax.jit, static_argnums=4)
def describe(
    pooled: Pooled,
    matrix: Float64[AnyArray, "d d"],
    energies: Float64[AnyArray, " d"],
    vectors: Float64[AnyArray, "d d"],
    size: int,
) -> PooledFigures:
    """All figures of a view, `size` directions of it, from the solution of its total."""
    values, axes = jnp.sqrt(jnp.maximum(energies[::-1], 0)), jnp.asarray(vectors).T[::-1]
    n, centre = jnp.sum(pooled.counts), pooled.mean
    left = jnp.sum(pooled.sums, axis=0) - n * centre
    basis = orient(axes[:size], values[:size], left, n)
    image = product(basis, jnp.asarray(matrix))
    spectrum = Spectrum(values, basis, defect(image, values, basis, jnp.trace(matrix)))
    leading = axes[: max(LEADING, size)]
    along = _products(pooled, leading)
    within = product(along, leading.T)
    factor = (values[:FACTOR_ROWS, None] * axes[:FACTOR_ROWS]).astype(jnp.float32)
    signs = jnp.sign(jnp.sum(basis * axes[:size], axis=1))
    coupling = (signs[:, None] * along[:, :size]).astype(jnp.float32)
    return PooledFigures(
        spectrum,
        jnp.sum(jnp.square(left)) / jnp.maximum(n, 1),
        Resampled(
            without_groups(jnp.square(values), within, _beyond(pooled, within)), _split_half(pooled, within)
        ),
        Crossed(factor, coupling),
    )


def _products(pooled: Pooled, axes: Float64[Array, "q d"]) -> Float64[Array, "G q d"]:
    """V M_g of every group, its tokens less the mean: M_g - s μᵀ - μ sᵀ + n μμᵀ."""
    mean, sums = pooled.mean, jnp.asarray(pooled.sums)
    along_sums, along_mean = product(sums, axes.T), product(axes, mean)
    counts = jnp.asarray(pooled.counts)[:, None]
    rank_one = along_sums[..., None] * mean
    other = along_mean[:, None] * (sums - counts * mean)[:, None]
    return product(axes, jnp.asarray(pooled.squares)) - rank_one - other


def _beyond(pooled: Pooled, within: Float64[Array, "G q q"]) -> Float64[Array, " G"]:
    """What each group holds outside of the leading axes."""
    mean = pooled.mean
    diagonal = jnp.sum(jnp.diagonal(pooled.squares, axis1=1, axis2=2), axis=1)
    shifted = diagonal - 2 * product(jnp.asarray(pooled.sums), mean) + pooled.counts * jnp.sum(mean * mean)
    return shifted - jnp.trace(within, axis1=1, axis2=2)


def _split_half(pooled: Pooled, within: Float64[Array, "G q q"]) -> Float64[Array, " R"]:
    repeats, _, groups = pooled.halves.shape
    if not repeats:
        return jnp.zeros(0, within.dtype)
    halves = product(jnp.reshape(pooled.halves, (2 * repeats, groups)), within.reshape(groups, -1))
    values, vectors = eigh(halves.reshape(-1, *within.shape[1:]))
    first = vectors[:, :, -1].reshape(repeats, 2, -1)
    cosines = jnp.abs(jnp.sum(first[:, 0] * first[:, 1], axis=-1))
    return jnp.where((values[:, -1] > 0).reshape(repeats, 2).all(axis=1), cosines, np.nan)
