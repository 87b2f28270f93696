"""The spectrum of one layer's update δ (n, d), in float64.

Axes: n tokens, d hidden size, r = min(n, d) singular values, k kept directions, v computed eigenvectors.

The spectrum comes from the Gram matrix of δ's short side. A product of two float32 numbers is exact in
float64, so squaring float32 input loses nothing: σ is within 1e-12 of a float64 SVD's at a fraction of its
time (float32 arithmetic would lose half the digits of the small ones). Every spectrum carries a certificate.
All functions here must be traced with 64-bit types on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdelta.spectra import _lapack, linalg
from jaxdelta.spectra.linalg import gram, product
from jaxdelta.spectra.view_summary import resolved
from jaxdelta.utils.arrays import AnyArray

METHODS = ("gram", "full")
MAX_RESIDUAL = 1e-10  # Certificates measure 1e-15 .. 1e-13; a failed solver leaves 1e-2 or NaN.
_SIGN_FLOOR = 1e-3


class Solved(NamedTuple):
    """The smaller of x xᵀ and xᵀx, its eigenvalues, ascending, and its last v eigenvectors, in columns."""

    square: Float64[AnyArray, "r r"]
    energies: Float64[AnyArray, " r"]
    vectors: Float64[AnyArray, "r v"]


class Spectrum(NamedTuple):
    """All singular values of δ, descending, its top right singular vectors, and their certificate.

    Directions beyond the rank are zero, see `resolved`. `residual` is the largest of: ‖δᵀδv - σ²v‖/σ_1² over
    the kept v; ‖VVᵀ - I‖ over the nonzero v; |Σσ² - ‖δ‖_F²|/‖δ‖_F².
    """

    singular_values: Float64[AnyArray, "*layers r"]
    directions: Float64[AnyArray, "*layers k d"]
    residual: Float64[AnyArray, "*layers"]


def decompose(
    delta: Float[Array, "n d"], k: int, method: str = "gram", solved: Solved | None = None
) -> tuple[Spectrum, Float64[Array, "n v"]]:
    """Singular values, top-k right singular vectors and coordinates δV of δ = U diag(σ) Vᵀ.

    `gram`: eigenvalues of δδᵀ (n ≤ d) or δᵀδ (n > d) are σ²; for n ≤ d, V_k = qr(δᵀU_k). `full`: an SVD.
    A direction's sign makes <v, Σ_i δ_i> positive or, where that is too small to be stable, its largest
    entry. A direction beyond the rank of δ is zero, see `resolved`. The coordinates U diag(σ) keep the
    solver's signs. `solved` is the result of `solve`, if it is known; there is a coordinate for each of its
    vectors.
    """
    x = delta.astype(jnp.float64)
    if method == "full":
        left, values, vectors = linalg.svd(x)
        vectors, coordinates = vectors[:k], left * values
    else:
        values, vectors, coordinates = _by_gram(x, k, solved or solve(x, k))
    directions = orient(vectors, values[:k], x.sum(axis=0), x.shape[0])
    return Spectrum(values, directions, _residual(x, values, directions)), coordinates


def solve(x: Float64[AnyArray, "n d"], k: int) -> Solved:
    """All eigenvalues of the smaller of x xᵀ and xᵀx, and at least the last k of its eigenvectors.

    A NumPy array is solved on the host with exactly k eigenvectors, which on a CPU is faster than XLA and
    than all vectors. If it is not finite, zero is solved instead: some solvers never return from a NaN.
    """
    if not isinstance(x, np.ndarray):
        traced = _short_gram(x)
        return Solved(traced, *linalg.eigh(traced))
    square = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    if not np.isfinite(square.sum()):
        square[:] = 0
    return Solved(square, *(linalg.eigh(square) if k == len(square) else _lapack.largest(square, k)))


def host_decompose(x: Float64[np.ndarray, "n d"], k: int) -> tuple[Spectrum, Float64[Array, "n r"]]:
    """`decompose` by NumPy's float64 SVD, for spectra that fail their certificate."""
    left, values, vectors = map(jnp.asarray, np.linalg.svd(x, full_matrices=False))
    directions = orient(vectors[:k], values[:k], jnp.asarray(x).sum(axis=0), len(x))
    return Spectrum(values, directions, _residual(jnp.asarray(x), values, directions)), left * values


def _short_gram(x: Float64[Array, "n d"]) -> Float64[Array, "r r"]:
    # The transpose is materialised: XLA on a CPU multiplies A Aᵀ twice as fast as AᵀA.
    return gram(x if x.shape[0] <= x.shape[1] else jax.lax.optimization_barrier(x.T))


def _by_gram(
    x: Float64[Array, "n d"], k: int, solved: Solved
) -> tuple[Float64[Array, " r"], Float64[Array, "k d"], Float64[Array, "n v"]]:
    vectors = jnp.asarray(solved.vectors)[:, ::-1]
    values = jnp.sqrt(jnp.maximum(jnp.asarray(solved.energies)[::-1], 0))
    top = vectors[:, :k]
    if x.shape[0] > x.shape[1]:
        return values, top.T, product(x, vectors)
    return values, linalg.orthonormal(product(x.T, top)).T, vectors * values[: vectors.shape[1]]


def orient(
    directions: Float64[Array, "k d"], values: Float64[Array, " k"], total: Float64[Array, " d"], n: Any
) -> Float64[Array, "k d"]:
    """Directions signed as by `decompose`, and zero beyond the rank; `total` is Σ_i δ_i over n tokens."""
    along = directions @ total
    largest = jnp.take_along_axis(directions, jnp.abs(directions).argmax(axis=1)[:, None], axis=1)[:, 0]
    stable = jnp.abs(along) > _SIGN_FLOOR * values * jnp.sqrt(jnp.asarray(n, jnp.float64))
    signs = jnp.where(jnp.where(stable, along, largest) < 0, -1.0, 1.0)
    return jnp.where(resolved(values)[:, None], signs[:, None] * directions, 0)


def _residual(
    x: Float64[Array, "n d"], values: Float64[Array, " r"], directions: Float64[Array, "k d"]
) -> Float64[Array, ""]:
    return residual(product(product(directions, x.T), x), values, directions, jnp.sum(jnp.square(x)))


def residual(
    image: Float64[Array, "k d"],
    values: Float64[Array, " r"],
    directions: Float64[Array, "k d"],
    energy: Float64[Array, ""],
) -> Float64[Array, ""]:
    """The certificate of a Spectrum; `image` is δᵀδ times its directions, `energy` is ‖δ‖_F²."""
    k, tiny = len(directions), np.finfo(np.float64).tiny
    missed = image - jnp.square(values[:k])[:, None] * directions
    residual = jnp.linalg.norm(missed, axis=1).max() / jnp.maximum(values[0] ** 2, tiny)
    skew = product(directions, directions.T) - jnp.diag(resolved(values[:k]).astype(directions.dtype))
    trace = jnp.abs(jnp.sum(jnp.square(values)) - energy) / jnp.maximum(energy, tiny)
    return jnp.maximum(jnp.maximum(residual, jnp.abs(skew).max()), trace)
