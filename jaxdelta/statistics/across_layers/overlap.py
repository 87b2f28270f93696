"""Overlaps of the layers' directions: pairwise cosines and angles, means over phases, shared subspaces.

All are computed from the inner products of all M = N·k directions. Axes: N layers, k directions per layer,
d hidden size, P phases.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.statistics.across_layers.subspaces import Shared, inner_products, shared_subspaces
from jaxdelta.statistics.per_layer.ranks import effective_rank, energy_shares

HELD = 0.9  # share of the energy in `dimensions_90` dimensions


@dataclasses.dataclass(frozen=True)
class Overlaps:
    """Overlaps of layers, see `overlaps`; the signs of cosines are those of the directions and arbitrary."""

    top1_cos: Float64[np.ndarray, "N N"]
    intra_cos_mean: Float64[np.ndarray, " P"]
    cross_cos_mean: Float64[np.ndarray, " P"]
    capture: Float64[np.ndarray, "P N"]
    leave_one_out: Float64[np.ndarray, "P N"]
    stacked_rank: Float64[np.ndarray, " P"]
    dimensions_90: Int[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True)
class PrincipalAngles:
    """Principal angles θ between the spans of two layers' directions, for all pairs of layers.

    `cosines` are cos θ, descending; `projection_distance` √Σ sin²θ; `grassmann_distance` √Σ θ². A cosine near
    1 has half of θ's digits: angles below 1e-8, such as a layer's with itself, are rounding. (Björck & Golub
    1973; Edelman, Arias, Smith 1998.)
    """

    cosines: Float64[np.ndarray, "N N k"]
    projection_distance: Float64[np.ndarray, "N N"]
    grassmann_distance: Float64[np.ndarray, "N N"]


@one_blas_thread()
def overlaps(directions: Float[np.ndarray, "N k d"], members: Bool[np.ndarray, "P N"]) -> Overlaps:
    """All overlaps of the layers' directions, in float64.

    top1_cos = <v_L, v_M>, v_L the first direction of layer L. Per phase:

    intra_cos_mean, cross_cos_mean: mean |cos| over the pairs within (1 for a single layer) and between its
    layers and all others (0 if there are none). capture_L = ‖B v_L‖², B the top right singular vectors (at
    most 8) of the stacked directions of its layers. B is fitted to these layers, more closely the fewer they
    are, so leave_one_out_L uses the phase's other layers: NaN if there are none, capture_L for a layer
    outside the phase. stacked_rank: effective rank of its stacked v_L. dimensions_90: the smallest number of
    dimensions with 90 % of their energy.

    Args:
        directions: orthonormal within each layer.
        members: mask of the layers of each phase.
    """
    k = directions.shape[1]
    products = inner_products(directions)
    cosines = np.clip(products[::k, ::k], -1.0, 1.0)
    captures = [_captures(products, k, phase) for phase in shared_subspaces(products, members)]
    spectra = [singular_values(cosines[np.ix_(inside, inside)]) for inside in members]
    return Overlaps(
        cosines,
        *phase_means(np.abs(cosines), members),
        capture=np.array([capture for capture, _ in captures]),
        leave_one_out=np.array([alone for _, alone in captures]),
        stacked_rank=np.array([effective_rank(values) for values in spectra]),
        dimensions_90=np.array([_dimensions(values) for values in spectra]),
    )


@one_blas_thread()
def principal_angles(directions: Float[np.ndarray, "N k d"]) -> PrincipalAngles:
    """The angles between every two layers' spans, from the singular values of U_i U_jᵀ.

    U_i are layer i's directions, orthonormal; a zero direction is orthogonal to all others.
    """
    layers, k, _ = directions.shape
    blocks = inner_products(directions).reshape(layers, k, layers, k).swapaxes(1, 2)
    i, j = np.triu_indices(layers)
    cosines = np.empty((layers, layers, k))
    cosines[i, j] = np.clip(np.linalg.svd(blocks[i, j], compute_uv=False), 0.0, 1.0)
    cosines[j, i] = cosines[i, j]
    sines = np.sqrt(np.sum(1 - np.square(cosines), axis=-1))
    return PrincipalAngles(cosines, sines, np.linalg.norm(np.arccos(cosines), axis=-1))


def phase_means(
    overlap: Float64[np.ndarray, "*draws N N"], members: Bool[np.ndarray, "P N"]
) -> tuple[Float64[np.ndarray, "*draws P"], Float64[np.ndarray, "*draws P"]]:
    """Mean |cos| over the pairs within each phase, and between the phase and the rest."""
    pairs = ~np.eye(members.shape[1], dtype=bool)

    def mean(chosen: np.ndarray, of_none: float) -> np.ndarray:
        if not chosen.any():
            return np.full(overlap.shape[:-2], of_none)
        return np.asarray(overlap[..., chosen].mean(-1))

    intra = [mean(np.outer(inside, inside) & pairs, 1.0) for inside in members]
    cross = [mean(np.outer(inside, ~inside), 0.0) for inside in members]
    return np.stack(intra, -1), np.stack(cross, -1)


def _captures(
    products: Float64[np.ndarray, "M M"], k: int, phase: Shared
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """‖B v‖² of each layer's v; the same, for the phase's layers with B of its other layers."""
    along = products[phase.rows][:, ::k]
    capture = np.square(phase.whole.T @ along).sum(0)
    alone = capture.copy()
    own = np.einsum("nmr,mn->nr", phase.without, along[:, phase.layers])
    alone[phase.layers] = np.square(own).sum(1) if len(phase.layers) > 1 else np.nan
    return capture, alone


def singular_values(products: Float64[np.ndarray, "*draws n n"]) -> Float64[np.ndarray, "*draws n"]:
    """Singular values, descending, of stacked vectors with these inner products."""
    return np.sqrt(np.maximum(np.linalg.eigvalsh(products)[..., ::-1], 0))


def _dimensions(singular_values: Float64[np.ndarray, " n"]) -> int:
    held = np.cumsum(energy_shares(singular_values))
    return int(np.sum(held < HELD - 1e-12)) + 1 if held[-1] else 0
