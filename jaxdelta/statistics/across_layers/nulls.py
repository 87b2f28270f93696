"""Null distributions of overlaps: the same statistics of random directions.

Axes: N layers, P phases, m draws of each statistic, k directions per layer, d hidden size, Q rows of a pool.

Directions are uniform or, since any two anisotropic layers overlap, have the layers' own covariance: a
standard normal row times F is a draw from FᵀF, and a sum of the layers' draws is one from the sum of their
covariances. All statistics follow from the inner products of a pool of such draws. NumPy on the host, with
one thread per core, so nothing compiles.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.statistics.across_layers.subspaces import SHARED_RANK, inner_products, orthonormalised, unit

_POOL = 384  # smallest number of draws from which a phase's replicates are picked
_EACH = 8  # captures per replicate's B: they vary with the captured direction far more than with B
_ISOTROPIC_DRAWS = 4  # draws of which the mean is returned
_AT_ONCE = 2**22  # numbers in the Gram matrices of the replicates solved together


@dataclasses.dataclass(frozen=True)
class PhaseNulls:
    """m draws of a phase's statistics if its layers have only their covariance in common.

    Each layer gets k orthonormalised random directions, v the first of them. `intra`: mean |cos| of v over
    all pairs of layers. `capture`: ‖B v‖² of one layer, B the top right singular vectors (at most 8) of all
    their directions. `leave_one_out`: the same with B of the other layers' directions. Rows of phases of
    fewer than two layers are NaN.
    """

    intra: Float64[np.ndarray, "P m"]
    capture: Float64[np.ndarray, "P m"]
    leave_one_out: Float64[np.ndarray, "P m"]


@one_blas_thread()
def layer_draws(
    factors: Sequence[Float32[np.ndarray, "_ d"]],
    members: Bool[np.ndarray, "P N"],
    k: int,
    draws: int,
    seed: int,
) -> list[Float32[np.ndarray, "Q d"]]:
    """Independent draws from each layer's FᵀF/‖F‖², as many as its nulls need; zeros for F = 0."""
    rows = max(2 * draws, _pool_size(members, k))

    def drawn(layer: int, factor: np.ndarray) -> np.ndarray:
        normal = np.random.default_rng((seed, layer)).standard_normal((rows, len(factor)), np.float32)
        return normal @ (factor / (np.linalg.norm(factor) or np.float32(1)))

    return _in_parallel(drawn, enumerate(factors))


@one_blas_thread()
def adjacent_null(layers: Sequence[Float32[np.ndarray, "Q d"]], draws: int) -> Float64[np.ndarray, "pairs m"]:
    """|cos| of `draws` pairs of random directions for each two adjacent layers, from their pooled covariance.

    For layers L and L+1 that is F_LᵀF_L/‖F_L‖² + F_{L+1}ᵀF_{L+1}/‖F_{L+1}‖². A zero layer adds nothing; two
    zero layers give |cos| 0. `layers` are `layer_draws`, at least twice as many as `draws`.
    """

    def cosines(*pair: np.ndarray) -> np.ndarray:
        first, second = np.split(unit(np.sum([part[: 2 * draws] for part in pair], axis=0)), 2)
        return np.minimum(np.abs(np.sum(first * second, axis=1)), 1)

    pairs = _in_parallel(cosines, itertools.pairwise(layers))
    return np.reshape(pairs, (-1, draws)).astype(np.float64)


@one_blas_thread()
def phase_nulls(
    layers: Sequence[Float32[np.ndarray, "Q d"]],
    members: Bool[np.ndarray, "P N"],
    k: int,
    draws: int,
    seed: int,
) -> PhaseNulls:
    """PhaseNulls of random directions from the pooled covariance Σ_L F_LᵀF_L/‖F_L‖² of the phase's layers.

    `layers` are `layer_draws`.
    """
    nulls = np.full((3, len(members), draws), np.nan)
    compared, size = np.flatnonzero(members.sum(axis=1) >= 2), _pool_size(members, k)

    def of_phase(phase: int) -> np.ndarray:
        inside = np.flatnonzero(members[phase]).tolist()
        rows = unit(np.sum([layers[layer][:size] for layer in inside], axis=0).astype(np.float64))
        return _replicates(rows @ rows.T, len(inside), k, draws, (seed, phase))

    for phase, drawn in zip(compared, _in_parallel(of_phase, compared[:, None].tolist()), strict=True):
        nulls[:, phase] = drawn
    return PhaseNulls(*nulls)


@one_blas_thread()
def isotropic_means(
    members: Bool[np.ndarray, "P N"], k: int, d: int, seed: int
) -> dict[str, Float64[np.ndarray, " P"]]:
    """Mean `capture` and `leave_one_out` of directions uniform on the sphere in d dimensions.

    If B (r, d) is independent of v, the mean is r/d. Otherwise v is like every other of the m stacked
    directions S, so capture is Σ_{i≤8} λ_i/m, SSᵀ = U diag(λ) Uᵀ. It hardly varies, so a few draws suffice.
    """
    rng, means = np.random.default_rng((seed, len(members))), np.full((2, len(members)), np.nan)
    for p, layers in enumerate(members.sum(axis=1)):
        if layers < 2:
            continue
        drawn = (rng.standard_normal((layers, k, d), np.float32) for _ in range(_ISOTROPIC_DRAWS))
        stack = orthonormalised(np.stack([inner_products(rows) for rows in drawn]) / d, k)
        held = np.linalg.eigvalsh(stack)[:, -SHARED_RANK:].sum(axis=1)
        means[:, p] = held.mean() / (layers * k), min(SHARED_RANK, k * (layers - 1), d) / d
    return dict(zip(("capture", "leave_one_out"), means, strict=True))


def _in_parallel(work: Callable[..., np.ndarray], each: Iterable[Iterable[Any]]) -> list[np.ndarray]:
    """Results of one task per thread; BLAS must be on one thread, or it takes 20 times as long."""
    with ThreadPoolExecutor(os.cpu_count(), "nulls") as pool:
        return [done.result() for done in [pool.submit(work, *arguments) for arguments in each]]


def _replicates(
    pool: Float64[np.ndarray, "Q Q"], layers: int, k: int, draws: int, seed: tuple[int, ...]
) -> Float64[np.ndarray, "3 m"]:
    """The statistics of replicates of a phase, whose rows are picked from the pool without replacement."""
    each = min(_EACH, layers)
    size, stacks = k * layers + each, -(-draws // each)
    rows = np.tile(np.arange(len(pool)), (draws, 1))
    rows = np.random.default_rng(seed).permuted(rows, axis=1)[:, :size]
    above = np.triu_indices(layers, 1)
    intra = np.abs(pool[rows[:, above[0]], rows[:, above[1]]]).mean(axis=1)
    parts = np.array_split(rows[:stacks], min(-(-stacks * size**2 // _AT_ONCE), stacks))
    captures = [_captures(pool[p[:, :, None], p[:, None, :]], layers, k) for p in parts]
    return np.stack([intra, *np.concatenate(captures, axis=1).reshape(2, -1)[:, :draws]])


def _captures(products: Float64[np.ndarray, "b M M"], layers: int, k: int) -> Float64[np.ndarray, "2 b e"]:
    """`capture` and `leave_one_out` of layers of k unit vectors each, from the inner products of these and e
    more, each of which is the v of a left-out layer in place of the last one."""
    size, stack = layers * k, orthonormalised(products, k, layers)
    each = products.shape[1] - size
    inside = stack[:, :size, :size]
    capture = _capture(inside, inside[:, :, : each * k : k])
    left_out = _capture(stack[:, : size - k, : size - k], stack[:, : size - k, size:])
    return np.stack([capture, left_out])


def _capture(
    products: Float64[np.ndarray, "m M M"], along: Float64[np.ndarray, "m M v"]
) -> Float64[np.ndarray, "m v"]:
    """‖B v‖², B v = diag(λ)^-1/2 Uᵀ S v, from S v = `along` and S Sᵀ = U diag(λ) Uᵀ = `products`."""
    energies, vectors = np.linalg.eigh(products)
    energies, vectors = energies[:, -SHARED_RANK:], vectors[:, :, -SHARED_RANK:]
    present = energies > 1e-8 * energies[:, -1:]
    weights = present / np.where(present, energies, 1)
    return np.sum(weights[:, :, None] * np.square(vectors.swapaxes(1, 2) @ along), axis=1)


def _pool_size(members: np.ndarray, k: int) -> int:
    return max(_POOL, 4 * k * int(members.sum(axis=1).max(initial=0)))


def isotropic_cos_mean(d: int) -> float:
    """E|cos| of two random directions in d dimensions, Γ(d/2)/(√π Γ((d+1)/2)) ≈ √(2/(πd)).

    Cai, Fan & Jiang, JMLR 2013.
    """
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def isotropic_p_value(cosines: Float[np.ndarray, "*shape"], d: int) -> Float64[np.ndarray, "*shape"]:
    """P(|cos| ≥ c) of two random directions in d dimensions: cos² ~ Beta(1/2, (d-1)/2).

    Cai, Fan & Jiang, JMLR 2013.
    """
    import scipy.special  # here: importing it takes 0.4 s

    squares = np.minimum(np.square(np.asarray(cosines, np.float64)), 1)
    return scipy.special.betaincc(0.5, (d - 1) / 2, squares) if d > 1 else np.ones_like(squares)
