"""One layer's figures: the spectrum of its update δ (n, d) and the statistics of its tokens, in float64.

Axes: n tokens, d hidden size, r = min(n, d) singular values, k kept directions.

The spectrum comes from the Gram matrix of δ's short side. A product of two float32 numbers is exact in
float64, so squaring costs nothing that float32 input had: σ is within 1e-12 of a float64 SVD's at a fraction
of its time (float32 arithmetic would lose half the digits of the small ones). Every spectrum carries a
certificate. All functions here must be traced with 64-bit types on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from jaxdelta import lapack
from jaxdelta.types import AnyArray

METHODS = ("gram", "full")
CERTIFIED = 1e-10  # Certificates measure 1e-15 .. 1e-13; a failed solver leaves 1e-2 or NaN.

_SIGN_FLOOR = 1e-3
_GRAM_BLOCK = 256  # rows; products of smaller blocks are too slow to save anything


class Solved(NamedTuple):
    """The smaller of x xᵀ and xᵀx, its eigenvalues, ascending, and the last of its eigenvectors."""

    square: Float64[AnyArray, "r r"]
    energies: Float64[AnyArray, " r"]
    vectors: Float64[AnyArray, "r v"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """All singular values of δ, descending, its top right singular vectors, and how far to trust them.

    `defect` is the largest of: ‖δᵀδv - σ²v‖/σ_1² over the kept v; ‖VVᵀ - I‖; |Σσ² - ‖δ‖_F²|/‖δ‖_F².
    """

    singular_values: Float64[AnyArray, "*layers r"]
    directions: Float64[AnyArray, "*layers k d"]
    defect: Float64[AnyArray, "*layers"]


def update_spectrum(delta: Float[Array, "n d"], k: int, method: str = "gram") -> Spectrum:
    """Singular values and top-k right singular vectors of δ = U diag(σ) Vᵀ.

    `gram`: eigenvalues of δδᵀ (n ≤ d) or δᵀδ (n > d) are σ²; where n ≤ d, V_k = qr(δᵀU_k). `full`: an SVD.
    A direction's sign is the one with <v, Σ_i δ_i> > 0, or, where that is too small to be stable, the one
    that makes its largest entry positive. A zero δ has zero directions.
    """
    return decompose(delta, k, method)[0]


def decompose(
    delta: Float[Array, "n d"], k: int, method: str = "gram", solved: Solved | None = None
) -> tuple[Spectrum, Float64[Array, "n v"]]:
    """`update_spectrum`, and the tokens' coordinates δV = U diag(σ) along the right singular vectors.

    The coordinates' signs are not the directions'. They are along all r of them; with `solved`, what
    `solve` found of δ, along those of which the vectors are there.
    """
    x = delta.astype(jnp.float64)
    if method == "full":
        values, vectors, coordinates = _by_svd(x, k)
    else:
        values, vectors, coordinates = _by_gram(x, k, solved or solve(x, k))
    directions = orient(vectors, values[:k], x.sum(axis=0), x.shape[0])
    return Spectrum(values, directions, _defect(x, values, directions)), coordinates


def solve(x: Float64[AnyArray, "n d"], k: int) -> Solved:
    """All eigenvalues of the smaller of x xᵀ and xᵀx, and at least the last k of its vectors.

    Of an array of NumPy's, k: on a CPU, where LAPACK takes less time than XLA with the product, and with k
    vectors than with all. Where it is not finite, from which some solvers never return, of zero.
    """
    if not isinstance(x, np.ndarray):
        traced = _short_gram(x)
        return Solved(traced, *lapack.eigh(traced))
    square = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    if not np.isfinite(square.sum()):
        square[:] = 0
    found = lapack.eigh(square) if k == len(square) else lapack.largest(square, k)
    return Solved(square, *found)


def token_products(
    delta: Float[Array, "n d"], h: Float[Array, "n d"]
) -> tuple[Float64[Array, " n"], Float64[Array, " n"], Float64[Array, " n"]]:
    """Each token's <δ_i, δ_i>, <h_i, h_i> and <δ_i, h_i>: all that `token_statistics` need."""
    delta, h = delta.astype(jnp.float64), h.astype(jnp.float64)
    first, second, third = row_sums([delta * delta, h * h, delta * h])
    return first, second, third


def row_sums(matrices: Sequence[Float64[Array, "n d"]]) -> list[Float64[Array, " n"]]:
    """The sum of each row, of all of them in one pass: one after the other takes XLA on a CPU far longer."""
    zeros = (np.float64(0),) * len(matrices)
    return list(jax.lax.reduce(tuple(matrices), zeros, _add_each, dimensions=(1,)))


def _add_each(x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(jnp.add, x, y))


def token_statistics(
    products: tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]],
    groups: Int[np.ndarray, " n"],
    weights: Float64[np.ndarray, "draws G"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """The reference's statistics of tokens with these `token_products`, each counted as often as its group.

    frob: √Σ w_i‖δ_i‖². Means, and population deviations, of token_norm ‖δ_i‖; h_norm ‖h_i‖; rel_step
    ‖δ_i‖/max(‖h_i‖, 1e-8); cos_delta_h c_i = <δ_i, h_i>/max(‖δ_i‖‖h_i‖, 1e-8); parallel_frac |c_i|. On the
    host: three numbers a token are nothing, and compiling this took longer than all other figures.
    """
    delta_delta, h_h, delta_h = products
    delta_norm, h_norm = np.sqrt(delta_delta), np.sqrt(h_h)
    step = delta_norm / np.maximum(h_norm, 1e-8)
    cosine = delta_h / np.maximum(delta_norm * h_norm, 1e-8)

    def sums(figure: np.ndarray | None = None) -> Any:
        return weights @ np.bincount(groups, figure, weights.shape[1])

    total = sums()

    def mean(figure: np.ndarray) -> Any:
        return sums(figure) / total

    def deviation(figure: np.ndarray) -> Any:
        middle = figure.mean()  # near the mean, so that nothing cancels
        return np.sqrt(np.maximum(mean(np.square(figure - middle)) - np.square(mean(figure - middle)), 0))

    return {
        "frob": np.sqrt(sums(delta_delta)),
        "token_norm_mean": mean(delta_norm),
        "token_norm_std": deviation(delta_norm),
        "h_norm_mean": mean(h_norm),
        "rel_step_mean": mean(step),
        "rel_step_std": deviation(step),
        "parallel_frac": mean(np.abs(cosine)),
        "cos_delta_h_mean": mean(cosine),
    }


def energy_shares(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets r"]:
    """p_i = σ_i²/Σσ², the share of ‖δ‖_F² along each direction; zero for a zero spectrum."""
    energy = np.square(np.asarray(singular_values, np.float64))
    return _shares(energy)


def effective_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """exp(-Σ p ln p) over p > 1e-12, p = σ²/Σσ²: the matrix-based entropy rank; 0 for a zero spectrum.

    Giraldo et al. 2014; Skean et al. 2025 (arXiv 2502.02013). Not Roy & Vetterli's, whose p is σ/Σσ.
    """
    return _perplexity(energy_shares(singular_values))


def roy_vetterli_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """exp(-Σ p ln p), p = σ/Σσ: Roy & Vetterli's effective rank (EUSIPCO 2007; RankMe, arXiv 2210.02885).

    Over the σ that `numerical_rank` counts: a thousand that are rounding would move the fourth digit.
    """
    values = np.asarray(singular_values, np.float64)
    return _perplexity(_shares(np.where(_resolved(values), values, 0)), floor=0.0)


def participation_ratio(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """(Σσ²)²/Σσ⁴ (Gao et al. 2017); 0 for a zero spectrum."""
    return _inverse(np.square(energy_shares(singular_values)).sum(axis=-1))


def stable_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """‖δ‖_F²/‖δ‖_2² (Rudelson & Vershynin 2007); 0 for a zero spectrum."""
    return _inverse(energy_shares(singular_values).max(axis=-1))


def _shares(parts: Float64[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets r"]:
    return parts / np.maximum(parts.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def _perplexity(p: Float64[np.ndarray, "*sets r"], floor: float = 1e-12) -> Any:
    """exp of the entropy of all p above the floor; 0 where all are 0."""
    counted = np.where(p > floor, p, 1)
    return np.where(p.any(axis=-1), np.exp(-np.sum(counted * np.log(counted), axis=-1)), 0.0)


def _inverse(x: Any) -> Any:
    return np.where(x > 0, 1 / np.where(x > 0, x, 1), 0.0)


def numerical_rank(singular_values: Float[np.ndarray, " r"]) -> int:
    """How many singular values stand above float32's resolution, σ > ε σ_1."""
    return int(np.sum(_resolved(np.asarray(singular_values))))


def _resolved(singular_values: Float[np.ndarray, "*sets r"]) -> Bool[np.ndarray, "*sets r"]:
    return singular_values > np.finfo(np.float32).eps * singular_values.max(axis=-1, keepdims=True)


def host_decompose(delta: Float[np.ndarray, "n d"], k: int) -> tuple[Spectrum, Float64[Array, "n r"]]:
    """`decompose` by NumPy's float64 SVD: the fallback for a spectrum whose certificate fails."""
    x = np.asarray(delta, np.float64)
    left, values, vectors = map(jnp.asarray, np.linalg.svd(x, full_matrices=False))
    directions = orient(vectors[:k], values[:k], jnp.asarray(x).sum(axis=0), len(x))
    return Spectrum(values, directions, _defect(jnp.asarray(x), values, directions)), left * values


Decomposition = tuple[Float64[Array, " r"], Float64[Array, "k d"], Float64[Array, "n v"]]


def _short_gram(x: Float64[Array, "n d"]) -> Float64[Array, "r r"]:
    # The transpose is materialised: XLA on CPU multiplies A Aᵀ twice as fast as AᵀA.
    return gram(x if x.shape[0] <= x.shape[1] else jax.lax.optimization_barrier(x.T))


def _by_gram(x: Float64[Array, "n d"], k: int, solved: Solved) -> Decomposition:
    vectors = jnp.asarray(solved.vectors)[:, ::-1]
    values = jnp.sqrt(jnp.maximum(jnp.asarray(solved.energies)[::-1], 0))
    top = vectors[:, :k]
    if x.shape[0] > x.shape[1]:
        return values, top.T, product(x, vectors)
    return values, lapack.orthonormal(product(x.T, top)).T, vectors * values[: vectors.shape[1]]


def _by_svd(x: Float64[Array, "n d"], k: int) -> Decomposition:
    left, values, vectors = lapack.svd(x)
    return values, vectors[:k], left * values


def orient(
    directions: Float64[Array, "k d"], values: Float64[Array, " k"], total: Float64[Array, " d"], n: Any
) -> Float64[Array, "k d"]:
    """The directions with the signs of `update_spectrum`, `total` being Σ_i δ_i of n tokens."""
    along = directions @ total
    largest = jnp.take_along_axis(directions, jnp.abs(directions).argmax(axis=1)[:, None], axis=1)[:, 0]
    stable = jnp.abs(along) > _SIGN_FLOOR * values * jnp.sqrt(jnp.asarray(n, jnp.float64))
    signs = jnp.where(jnp.where(stable, along, largest) < 0, -1.0, 1.0)
    return jnp.where(values[0] > 0, signs[:, None] * directions, 0)


def _defect(
    x: Float64[Array, "n d"], values: Float64[Array, " r"], directions: Float64[Array, "k d"]
) -> Float64[Array, ""]:
    return defect(product(product(directions, x.T), x), values, directions, jnp.sum(jnp.square(x)))


def defect(
    image: Float64[Array, "k d"],
    values: Float64[Array, " r"],
    directions: Float64[Array, "k d"],
    energy: Float64[Array, ""],
) -> Float64[Array, ""]:
    """The certificate of a Spectrum: `image` is δᵀδ of its directions, `energy` ‖δ‖_F²."""
    k, tiny = len(directions), np.finfo(np.float64).tiny
    missed = image - jnp.square(values[:k])[:, None] * directions
    residual = jnp.linalg.norm(missed, axis=1).max() / jnp.maximum(values[0] ** 2, tiny)
    skew = product(directions, directions.T) - jnp.eye(k, dtype=directions.dtype)
    orthonormal = jnp.where(values[0] > 0, jnp.abs(skew).max(), 0)
    trace = jnp.abs(jnp.sum(jnp.square(values)) - energy) / jnp.maximum(energy, tiny)
    return jnp.maximum(jnp.maximum(residual, orthonormal), trace)


def gram(x: Float[Array, "m d"]) -> Float[Array, "m m"]:
    """x xᵀ, at little more than half the work of a product: what lies above the diagonal is mirrored."""
    m = len(x)
    if m <= _GRAM_BLOCK:
        return product(x, x.T)
    top, bottom = x[: m // 2], x[m // 2 :]
    corner = product(bottom, top.T)
    return jnp.block([[gram(top), corner.T], [corner, gram(bottom)]])


def product(x: AnyArray, y: AnyArray) -> Any:
    """x y at full precision, which accelerators give only when asked."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return x @ y
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
