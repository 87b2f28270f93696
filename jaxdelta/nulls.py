"""What overlaps are by chance: the same figures of random directions.

Axes: N layers, P phases, m draws of each figure, k directions a layer, d hidden size, Q rows of a pool.

Directions are drawn uniformly, or, since any two anisotropic layers overlap, from the layers' own covariance:
a standard normal row times F is a draw from FᵀF, and a sum of the layers' draws is one from their sum. All
figures follow from the inner products of a pool of such draws; nothing of size d is kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Array, Bool, Float, Float32, Float64

from jaxdelta.spectrum import gram, product
from jaxdelta.subspaces import SHARED_RANK
from jaxdelta.types import AnyArray

_POOL = 512  # draws a phase's replicates are picked from, at least
_RIDGE = 1e-10  # share of a draw's energy below which it adds no direction to a frame
_AT_ONCE = 2**22  # numbers in the Gram matrices of the replicates that are solved together


@dataclasses.dataclass(frozen=True)
class PhaseNulls:
    """m draws of a phase's figures, had its N_p layers nothing in common but the covariance drawn from.

    Each layer gets k orthonormalised random directions, v the first of them. `intra`: mean |cos| of v over
    all pairs of layers. `capture`: mean of ‖B v‖² over the layers, B the top right singular vectors (at most
    8) of all their directions. `leave_one_out`: ‖B v‖² of one layer, B of the others' directions. Rows of
    phases of fewer than two layers are NaN: nothing is compared there.
    """

    intra: Float64[np.ndarray, "P m"]
    capture: Float64[np.ndarray, "P m"]
    leave_one_out: Float64[np.ndarray, "P m"]


def adjacent_null(
    factors: Sequence[Float32[AnyArray, "rows d"]], draws: int, seed: int
) -> Float64[np.ndarray, "pairs m"]:
    """|cos| of `draws` pairs of random directions for each two adjacent layers, from their pooled covariance.

    That of layers L and L+1 is F_LᵀF_L/‖F_L‖² + F_{L+1}ᵀF_{L+1}/‖F_{L+1}‖². A zero layer adds nothing to it;
    two of them have no directions, and |cos| 0.
    """
    null = np.empty((max(len(factors) - 1, 0), draws))
    previous = None
    for layer, factor in enumerate(factors):
        current = _add_draws(_no_draws(2 * draws, factor), factor, (seed, layer))
        if previous is not None:
            null[layer - 1] = _pair_cosines(previous, current)
        previous = current
    return null


def phase_nulls(
    factors: Sequence[Float32[AnyArray, "rows d"]],
    members: Bool[np.ndarray, "P N"],
    k: int,
    draws: int,
    seed: int,
) -> PhaseNulls:
    """PhaseNulls of random directions from the pooled covariance Σ_L F_LᵀF_L/‖F_L‖² of the phase's layers."""

    def cosines(inside: np.ndarray) -> Array:
        layers = np.flatnonzero(inside).tolist()
        pool = _no_draws(_pool_size(members, k), factors[layers[0]])
        for layer in layers:
            pool = _add_draws(pool, factors[layer], (seed, layer))
        return _cosines(pool)

    return _phase_nulls(cosines, members, k, draws, seed)


def isotropic_phase_nulls(
    members: Bool[np.ndarray, "P N"], k: int, d: int, draws: int, seed: int
) -> PhaseNulls:
    """PhaseNulls of directions uniform on the sphere in d dimensions."""
    rng = np.random.default_rng((seed, len(members)))
    cosines = _cosines(rng.standard_normal((_pool_size(members, k), d), np.float32))
    return _phase_nulls(lambda _: cosines, members, k, draws, seed)


def _phase_nulls(
    cosines: Callable[[np.ndarray], AnyArray],
    members: Bool[np.ndarray, "P N"],
    k: int,
    draws: int,
    seed: int,
) -> PhaseNulls:
    """Replicates from the phases' pools, given the `cosines` of each. On the host: nothing to compile."""
    found = np.full((3, len(members), draws), np.nan)
    compared = np.flatnonzero(members.sum(axis=1) >= 2)
    # A worker a phase; where several threads call a BLAS of several threads, it takes 20 times as long.
    with threadpoolctl.threadpool_limits(1, "blas"), ThreadPoolExecutor() as workers:
        running = []
        for phase in compared:
            pool, size = np.asarray(cosines(members[phase])), k * int(members[phase].sum())
            running.append(workers.submit(_figures, pool, size, k, draws, (seed, int(phase))))
        for phase, figures in zip(compared, running, strict=True):
            found[:, phase] = figures.result()
    return PhaseNulls(*found)


def _figures(
    pool: Float64[np.ndarray, "Q Q"], size: int, k: int, draws: int, seed: tuple[int, ...]
) -> Float64[np.ndarray, "3 m"]:
    """The figures of replicates of `size` rows picked from the pool, each row once."""
    rows = np.tile(np.arange(len(pool)), (draws, 1))
    rows = np.random.default_rng(seed).permuted(rows, axis=1)[:, :size]
    parts = np.array_split(rows, min(-(-draws * size**2 // _AT_ONCE), draws))
    return np.concatenate([_replicates(pool[p[:, :, None], p[:, None, :]], k) for p in parts], axis=1)


def _replicates(products: Float64[np.ndarray, "m M M"], k: int) -> Float64[np.ndarray, "3 m"]:
    """Intra, capture and leave_one_out of layers of k unit vectors each, from their inner products.

    A layer's vectors X become orthonormal as C X, C⁻¹ the Cholesky factor of XXᵀ; the ridge leaves vectors
    that depend on those before them near zero.
    """
    m, size, _ = products.shape
    blocks = np.stack([products[:, i : i + k, i : i + k] for i in range(0, size, k)], axis=1)
    change = np.linalg.inv(np.linalg.cholesky(blocks + _RIDGE * np.eye(k)))

    def changed(x: np.ndarray) -> np.ndarray:
        return (change @ x.reshape(m, -1, k, size)).reshape(m, size, size)

    stack = changed(changed(products).swapaxes(1, 2))
    above = np.triu_indices(size // k, 1)
    intra = np.abs(stack[:, ::k, ::k])[:, *above].mean(axis=1)
    capture = _capture(stack, stack[:, :, ::k]).mean(axis=1)
    left_out = _capture(stack[:, :-k, :-k], stack[:, :-k, -k : size - k + 1])[:, 0]
    return np.stack([intra, capture, left_out])


def _capture(
    products: Float64[np.ndarray, "m M M"], along: Float64[np.ndarray, "m M v"]
) -> Float64[np.ndarray, "m v"]:
    """‖B v‖², B v = diag(λ)^-1/2 Uᵀ S v, of the v whose S v is `along`; S Sᵀ = U diag(λ) Uᵀ = `products`."""
    energies, vectors = np.linalg.eigh(products)
    energies, vectors = energies[:, -SHARED_RANK:], vectors[:, :, -SHARED_RANK:]
    present = energies > 1e-8 * energies[:, -1:]
    weights = present / np.where(present, energies, 1)
    return np.sum(weights[:, :, None] * np.square(vectors.swapaxes(1, 2) @ along), axis=1)


def _pool_size(members: np.ndarray, k: int) -> int:
    """One for all phases, so that their pools share a compiled function."""
    return max(_POOL, 4 * k * int(members.sum(axis=1).max(initial=0)))


def _no_draws(rows: int, factor: Float32[AnyArray, "rows d"]) -> Float32[Array, "Q d"]:
    return jnp.zeros((rows, factor.shape[1]), jnp.float32)


def _add_draws(
    pool: Float32[Array, "Q d"], factor: Float32[AnyArray, "rows d"], seed: tuple[int, int]
) -> Float32[Array, "Q d"]:
    """The pool with independent draws from FᵀF/‖F‖² added to its rows."""
    normal = np.random.default_rng(seed).standard_normal((len(pool), len(factor)), np.float32)
    return _add_mixed(pool, normal, factor)


@jax.jit
def _add_mixed(
    pool: Float32[Array, "Q d"], normal: Float32[AnyArray, "Q rows"], factor: Float32[AnyArray, "rows d"]
) -> Float32[Array, "Q d"]:
    norm = jnp.linalg.norm(factor)
    return pool + product(normal, factor) / jnp.where(norm > 0, norm, 1)


@jax.jit
def _pair_cosines(x: Float32[Array, "Q d"], y: Float32[Array, "Q d"]) -> Float32[Array, " m"]:
    """|cos| between the first and the second half of the rows of x + y."""
    first, second = jnp.split(_unit(x + y), 2)
    return jnp.minimum(jnp.abs(jnp.sum(first * second, axis=1)), 1)


def _cosines(pool: Float32[AnyArray, "Q d"]) -> Float64[Array, "Q Q"]:
    with jax.enable_x64(True):
        return jax.block_until_ready(_unit_gram(pool))


@jax.jit
def _unit_gram(pool: Float32[AnyArray, "Q d"]) -> Float64[Array, "Q Q"]:
    return gram(_unit(jnp.asarray(pool, jnp.float64)))


def _unit(x: Float[Array, "Q d"]) -> Float[Array, "Q d"]:
    """Rows of length one; zero rows stay zero."""
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)
