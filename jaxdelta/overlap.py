"""How the layers' directions relate: pairwise cosines, phases, shared subspaces.

Axes: N layers, k directions a layer, d hidden size, P phases. All from one matrix: the inner products of
all N·k directions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from jaxdelta.spectrum import gram, product
from jaxdelta.types import AnyArray

SHARED_RANK = 8  # dimensions of a phase's shared subspace, as in the reference


@dataclasses.dataclass(frozen=True)
class Overlaps:
    """Relations between layers; signs of cosines follow the directions' and mean nothing by themselves."""

    top1_cos: Float64[AnyArray, "N N"]
    intra_cos_mean: Float64[AnyArray, " P"]
    cross_cos_mean: Float64[AnyArray, " P"]
    capture: Float64[AnyArray, "P N"]


def overlaps(directions: Float[AnyArray, "N k d"], members: Bool[np.ndarray, "P N"]) -> Overlaps:
    """All overlaps of the layers' directions, in float64 on the device.

    top1_cos = <v_L, v_M>. Per phase: mean |cos| over the pairs within (1 for a single layer) and between
    its layers and all others (0 where there are none); capture_L = ‖B v_L‖², B the top right singular
    vectors (at most 8) of the stacked directions of the phase's layers, B included in what it captures.

    Args:
        directions: orthonormal within each layer.
        members: which layers belong to which phase.
    """
    with jax.enable_x64(True):
        found = _overlaps(jnp.asarray(directions, jnp.float64), jnp.asarray(members))
        cosines, capture = map(np.asarray, jax.block_until_ready(found))
    return Overlaps(cosines, *_phase_means(np.abs(cosines), members), capture)


def compile_overlaps(shape: tuple[int, int, int], phases: int) -> None:
    """Compiles `overlaps` for directions of a shape (N, k, d), before they are there."""
    with jax.enable_x64(True):
        abstract = jax.ShapeDtypeStruct
        _overlaps.lower(abstract(shape, jnp.float64), abstract((phases, shape[0]), jnp.bool_)).compile()


@jax.jit
def _overlaps(
    directions: Float64[Array, "N k d"], members: Bool[Array, "P N"]
) -> tuple[Float64[Array, "N N"], Float64[Array, "P N"]]:
    layers, k, d = directions.shape
    stack = directions.reshape(layers * k, d)
    products = gram(stack)
    # lax.map, not vmap: batched eigh on a CPU calls a threaded OpenBLAS from several threads (jax 39292).
    capture = jax.lax.map(lambda inside: _capture(products, jnp.repeat(inside, k))[::k], members)
    return jnp.clip(products[::k, ::k], -1.0, 1.0), capture


def _phase_means(
    overlap: Float64[np.ndarray, "N N"], members: Bool[np.ndarray, "P N"]
) -> tuple[Float64[np.ndarray, " P"], Float64[np.ndarray, " P"]]:
    """Mean |cos| over the pairs inside each phase, and between it and the rest."""
    pairs = ~np.eye(len(overlap), dtype=bool)

    def mean(chosen: np.ndarray, of_none: float) -> float:
        return float(overlap[chosen].mean()) if chosen.any() else of_none

    intra = [mean(np.outer(inside, inside) & pairs, 1.0) for inside in members]
    cross = [mean(np.outer(inside, ~inside), 0.0) for inside in members]
    return np.array(intra), np.array(cross)


def _capture(products: Float64[Array, "M M"], inside: Bool[Array, " M"]) -> Float64[Array, " M"]:
    """‖B v‖² of every stacked direction, where S = U diag(√λ) Bᵀ is the stack with only `inside` rows kept.

    B v = diag(λ)^-1/2 Uᵀ S v, and S v is a column of the Gram matrix: nothing of size d is needed.
    """
    among = jnp.where(inside[:, None] & inside[None, :], products, 0)
    vectors, energies = jax.lax.linalg.eigh(among, symmetrize_input=False)
    energies, vectors = energies[-SHARED_RANK:], vectors[:, -SHARED_RANK:]
    along = product(vectors.T, jnp.where(inside[:, None], products, 0))
    present = energies > 1e-12 * energies[-1]
    weights = jnp.where(present, 1 / jnp.where(present, energies, 1), 0)
    return jnp.sum(weights[:, None] * jnp.square(along), axis=0)
