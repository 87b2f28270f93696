"""One layer's figures: the spectrum of its update δ (n, d) and the statistics of its tokens, in float64.

Axes: n tokens, d hidden size, r = min(n, d) singular values, k kept directions.

The spectrum comes from the Gram matrix of δ's short side. A product of two float32 numbers is exact in
float64, so squaring costs nothing that float32 input had: σ is within 1e-12 of a float64 SVD's at a fraction
of its time (float32 arithmetic would lose half the digits of the small ones). Every spectrum carries a
certificate. All functions here must be traced with 64-bit types on.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from jaxdelta.types import AnyArray

METHODS = ("gram", "full")
CERTIFIED = 1e-10  # Certificates measure 1e-15 .. 1e-13; a failed solver leaves 1e-2 or NaN.

_SIGN_FLOOR = 1e-3
_GRAM_BLOCK = 256  # rows; products of smaller blocks are too slow to save anything


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
    delta: Float[Array, "n d"], k: int, method: str = "gram"
) -> tuple[Spectrum, Float64[Array, "n r"]]:
    """`update_spectrum`, and the tokens' coordinates δV = U diag(σ) along all right singular vectors.

    The coordinates' signs are not the directions'.
    """
    x = delta.astype(jnp.float64)
    values, vectors, coordinates = (_by_gram if method == "gram" else _by_svd)(x, k)
    directions = _orient(vectors, values[:k], x)
    return Spectrum(values, directions, _defect(x, values, directions)), coordinates


def token_products(
    delta: Float[Array, "n d"], h: Float[Array, "n d"]
) -> tuple[Float64[Array, " n"], Float64[Array, " n"], Float64[Array, " n"]]:
    """Each token's <δ_i, δ_i>, <h_i, h_i> and <δ_i, h_i>: all that `token_statistics` need."""
    delta, h = delta.astype(jnp.float64), h.astype(jnp.float64)
    return jnp.sum(delta * delta, axis=-1), jnp.sum(h * h, axis=-1), jnp.sum(delta * h, axis=-1)


def token_statistics(
    products: tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]],
    weights: Float64[np.ndarray, "draws n"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """The reference's statistics of tokens with these `token_products`, each token counted w_i times.

    frob: √Σ w_i‖δ_i‖². Means, and population deviations, of token_norm ‖δ_i‖; h_norm ‖h_i‖; rel_step
    ‖δ_i‖/max(‖h_i‖, 1e-8); cos_delta_h c_i = <δ_i, h_i>/max(‖δ_i‖‖h_i‖, 1e-8); parallel_frac |c_i|. On the
    host: three numbers a token are nothing, and compiling this took longer than all other figures.
    """
    delta_delta, h_h, delta_h = products
    delta_norm, h_norm = np.sqrt(delta_delta), np.sqrt(h_h)
    step = delta_norm / np.maximum(h_norm, 1e-8)
    cosine = delta_h / np.maximum(delta_norm * h_norm, 1e-8)
    spread = np.stack([delta_norm - delta_norm.mean(), step - step.mean()])  # small: so nothing cancels
    figures = np.stack([delta_norm, h_norm, step, np.abs(cosine), cosine, *spread, *np.square(spread)])
    *means, norm, rel, norm_square, rel_square = figures @ weights.T / weights.sum(axis=-1)
    token_norm, state_norm, rel_step, parallel, cos = means
    return {
        "frob": np.sqrt(weights @ delta_delta),
        "token_norm_mean": token_norm,
        "token_norm_std": np.sqrt(np.maximum(norm_square - np.square(norm), 0)),
        "h_norm_mean": state_norm,
        "rel_step_mean": rel_step,
        "rel_step_std": np.sqrt(np.maximum(rel_square - np.square(rel), 0)),
        "parallel_frac": parallel,
        "cos_delta_h_mean": cos,
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
    directions = _orient(vectors[:k], values[:k], jnp.asarray(x))
    return Spectrum(values, directions, _defect(jnp.asarray(x), values, directions)), left * values


Decomposition = tuple[Float64[Array, " r"], Float64[Array, "k d"], Float64[Array, "n r"]]


def _by_gram(x: Float64[Array, "n d"], k: int) -> Decomposition:
    n, d = x.shape
    # The transpose is materialised: XLA on CPU multiplies A Aᵀ twice as fast as AᵀA.
    y = x if n <= d else jax.lax.optimization_barrier(x.T)
    vectors, energies = jax.lax.linalg.eigh(gram(y), symmetrize_input=False)
    vectors, values = vectors[:, ::-1], jnp.sqrt(jnp.maximum(energies[::-1], 0))
    top = vectors[:, :k]
    if n > d:
        return values, top.T, product(x, vectors)
    return values, jnp.linalg.qr(product(y.T, top))[0].T, vectors * values


def _by_svd(x: Float64[Array, "n d"], k: int) -> Decomposition:
    left, values, vectors = jnp.linalg.svd(x, full_matrices=False)
    return values, vectors[:k], left * values


def _orient(
    directions: Float64[Array, "k d"], values: Float64[Array, " k"], x: Float64[Array, "n d"]
) -> Float64[Array, "k d"]:
    along = directions @ x.sum(axis=0)
    largest = jnp.take_along_axis(directions, jnp.abs(directions).argmax(axis=1)[:, None], axis=1)[:, 0]
    stable = jnp.abs(along) > _SIGN_FLOOR * values * np.sqrt(x.shape[0])
    signs = jnp.where(jnp.where(stable, along, largest) < 0, -1.0, 1.0)
    return jnp.where(values[0] > 0, signs[:, None] * directions, 0)


def _defect(
    x: Float64[Array, "n d"], values: Float64[Array, " r"], directions: Float64[Array, "k d"]
) -> Float64[Array, ""]:
    k = directions.shape[0]
    tiny = np.finfo(np.float64).tiny
    image = product(product(directions, x.T), x) - jnp.square(values[:k])[:, None] * directions
    residual = jnp.linalg.norm(image, axis=1).max() / jnp.maximum(values[0] ** 2, tiny)
    skew = product(directions, directions.T) - jnp.eye(k, dtype=x.dtype)
    orthonormal = jnp.where(values[0] > 0, jnp.abs(skew).max(), 0)
    energy = jnp.sum(jnp.square(x))
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


def product(x: AnyArray, y: AnyArray) -> Array:
    """x y at full precision, which accelerators give only when asked."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
