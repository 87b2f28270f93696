"""One layer's figures: the spectrum of its update δ (n, d) and the statistics of its tokens, in float64.

Axes: n tokens, d hidden size, r = min(n, d) singular values, k kept directions.

The spectrum comes from the Gram matrix of δ's short side. A product of two float32 numbers is exact in
float64, so squaring costs nothing that float32 input had: σ is within 1e-12 of a float64 SVD's at a fraction
of its time (float32 arithmetic would lose half the digits of the small ones). Every spectrum carries a
certificate. All functions here must be traced with 64-bit types on.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

METHODS = ("gram", "full")
CERTIFIED = 1e-10  # Certificates measure 1e-15 .. 1e-13; a failed solver leaves 1e-2 or NaN.

_SIGN_FLOOR = 1e-3

AnyArray = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """All singular values of δ, descending, its top right singular vectors, and how far to trust them.

    `defect` is the largest of: ‖δᵀδv - σ²v‖/σ_1² over the kept v; ‖VVᵀ - I‖; |Σσ² - ‖δ‖_F²|/‖δ‖_F².
    """

    singular_values: Float64[AnyArray, "*layers r"]
    directions: Float64[AnyArray, "*layers k d"]
    defect: Float64[AnyArray, "*layers"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Means and population deviations over tokens of the reference's per-token figures.

    With δ_i the update of token i and h_i the state it is added to: token_norm ‖δ_i‖; h_norm ‖h_i‖;
    rel_step ‖δ_i‖/max(‖h_i‖, 1e-8); cos_delta_h c_i = <δ_i, h_i>/max(‖δ_i‖‖h_i‖, 1e-8); parallel_frac |c_i|.
    """

    frob: Float64[AnyArray, "*layers"]
    token_norm_mean: Float64[AnyArray, "*layers"]
    token_norm_std: Float64[AnyArray, "*layers"]
    h_norm_mean: Float64[AnyArray, "*layers"]
    rel_step_mean: Float64[AnyArray, "*layers"]
    rel_step_std: Float64[AnyArray, "*layers"]
    parallel_frac: Float64[AnyArray, "*layers"]
    cos_delta_h_mean: Float64[AnyArray, "*layers"]


def update_spectrum(delta: Float[Array, "n d"], k: int, method: str = "gram") -> Spectrum:
    """Singular values and top-k right singular vectors of δ = U diag(σ) Vᵀ.

    `gram`: eigenvalues of δδᵀ (n ≤ d) or δᵀδ (n > d) are σ²; where n ≤ d, V_k = qr(δᵀU_k). `full`: an SVD.
    A direction's sign is the one with <v, Σ_i δ_i> > 0, or, where that is too small to be stable, the one
    that makes its largest entry positive. A zero δ has zero directions.
    """
    x = delta.astype(jnp.float64)
    values, vectors = (_by_gram if method == "gram" else _by_svd)(x, k)
    directions = _orient(vectors, values[:k], x)
    return Spectrum(values, directions, _defect(x, values, directions))


def token_statistics(delta: Float[Array, "n d"], h: Float[Array, "n d"]) -> TokenStatistics:
    """The reference's statistics of δ beside the states h it is added to; see TokenStatistics."""
    delta, h = delta.astype(jnp.float64), h.astype(jnp.float64)
    delta_norm, h_norm = jnp.linalg.norm(delta, axis=-1), jnp.linalg.norm(h, axis=-1)
    step = delta_norm / jnp.maximum(h_norm, 1e-8)
    cosine = jnp.sum(delta * h, axis=-1) / jnp.maximum(delta_norm * h_norm, 1e-8)
    per_token = jnp.stack([delta_norm, h_norm, step, jnp.abs(cosine), cosine])
    mean, std = per_token.mean(axis=-1), per_token.std(axis=-1)
    return TokenStatistics(
        frob=jnp.linalg.norm(delta_norm),
        token_norm_mean=mean[0],
        token_norm_std=std[0],
        h_norm_mean=mean[1],
        rel_step_mean=mean[2],
        rel_step_std=std[2],
        parallel_frac=mean[3],
        cos_delta_h_mean=mean[4],
    )


def energy_shares(singular_values: Float[np.ndarray, " r"]) -> Float64[np.ndarray, " r"]:
    """p_i = σ_i²/Σσ², the share of ‖δ‖_F² along each direction; zero for a zero spectrum."""
    energy = np.square(np.asarray(singular_values, np.float64))
    return energy / max(energy.sum(), np.finfo(np.float64).tiny)


def effective_rank(singular_values: Float[np.ndarray, " r"]) -> float:
    """exp(-Σ p ln p) over p > 1e-12, p = σ²/Σσ²: the matrix-based entropy rank; 0 for a zero spectrum.

    Giraldo et al. 2014; Skean et al. 2025 (arXiv 2502.02013). Not Roy & Vetterli's, whose p is σ/Σσ.
    """
    p = energy_shares(singular_values)
    p = p[p > 1e-12]
    return float(np.exp(-np.sum(p * np.log(p)))) if p.size else 0.0


def numerical_rank(singular_values: Float[np.ndarray, " r"]) -> int:
    """How many singular values stand above float32's resolution, σ > ε σ_1."""
    values = np.asarray(singular_values)
    return int(np.sum(values > np.finfo(np.float32).eps * values[0]))


def host_spectrum(delta: Float[np.ndarray, "n d"], k: int) -> Spectrum:
    """`update_spectrum` by NumPy's float64 SVD: the fallback for a spectrum whose certificate fails."""
    x = np.asarray(delta, np.float64)
    _, values, vectors = map(jnp.asarray, np.linalg.svd(x, full_matrices=False))
    directions = _orient(vectors[:k], values[:k], jnp.asarray(x))
    return Spectrum(values, directions, _defect(jnp.asarray(x), values, directions))


def _by_gram(x: Float64[Array, "n d"], k: int) -> tuple[Float64[Array, " r"], Float64[Array, "k d"]]:
    n, d = x.shape
    # The transpose is materialised: XLA on CPU multiplies A Aᵀ twice as fast as AᵀA.
    y = x if n <= d else jax.lax.optimization_barrier(x.T)
    energies, vectors = jnp.linalg.eigh(product(y, y.T))
    values = jnp.sqrt(jnp.maximum(energies[::-1], 0))
    top = vectors[:, ::-1][:, :k]
    return values, (jnp.linalg.qr(product(y.T, top))[0] if n <= d else top).T


def _by_svd(x: Float64[Array, "n d"], k: int) -> tuple[Float64[Array, " r"], Float64[Array, "k d"]]:
    _, values, vectors = jnp.linalg.svd(x, full_matrices=False)
    return values, vectors[:k]


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
    gram = product(directions, directions.T)
    orthonormal = jnp.where(values[0] > 0, jnp.abs(gram - jnp.eye(k, dtype=gram.dtype)).max(), 0)
    energy = jnp.sum(jnp.square(x))
    trace = jnp.abs(jnp.sum(jnp.square(values)) - energy) / jnp.maximum(energy, tiny)
    return jnp.maximum(jnp.maximum(residual, orthonormal), trace)


def product(x: Array, y: Array) -> Array:
    """x y at full precision, which accelerators give only when asked."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
