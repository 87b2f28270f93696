"""Shared subspaces of a phase: leading subspaces of its layers' stacked directions, and without each layer.

Axes: N layers, k directions per layer, d hidden size, P phases; a phase of n layers stacks m = n·k
directions; b stacks.

A basis of the stack S (m, d) is kept as its coefficients A (m, r): B = AᵀS. Then ‖B v‖² of a stacked v needs
only the inner products SSᵀ, and no array of size d. NumPy on the host: compiling would take longer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from jaxdelta.spectra.linalg import one_blas_thread

SHARED_RANK = 8  # dimensions of a phase's shared subspace, as in the reference
_RIDGE = 1e-10  # A unit vector with less energy outside the span of its predecessors adds no direction.


class Shared(NamedTuple):
    """A phase's layers, their rows among all N·k directions, and coefficients of its leading subspaces.

    `whole` stacks all its layers, `without[i]` all but the i-th, whose rows are zero. Columns beyond the
    dimension of a stack are zero.
    """

    layers: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, " m"]
    whole: Float64[np.ndarray, "m r"]
    without: Float64[np.ndarray, "n m r"]


def inner_products(directions: Float[np.ndarray, "N k d"]) -> Float64[np.ndarray, "M M"]:
    """Inner products of all M = N·k directions, in float64."""
    rows = directions.astype(np.float64).reshape(-1, directions.shape[-1])
    return rows @ rows.T


def unit(x: Float[np.ndarray, "*sets d"]) -> Float[np.ndarray, "*sets d"]:
    """Rows scaled to length one; zero rows stay zero."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def orthonormalised(
    products: Float64[np.ndarray, "b m m"], k: int, layers: int | None = None
) -> Float64[np.ndarray, "b m m"]:
    """The inner products of vectors after each layer's k have been made orthonormal.

    Gram-Schmidt of a layer's vectors X is L⁻¹X, XXᵀ = L Lᵀ (Cholesky). Vectors that depend on their
    predecessors become nearly zero.

    Args:
        products: inner products of the vectors before.
        k: number of vectors per layer.
        layers: number of layers, by default all; vectors after theirs are unchanged.
    """
    draws, m, _ = products.shape
    whole = m if layers is None else layers * k
    own = np.stack([products[:, i : i + k, i : i + k] for i in range(0, whole, k)], axis=1)
    change = np.linalg.inv(np.linalg.cholesky(own + _RIDGE * np.eye(k)))

    def changed(x: np.ndarray) -> np.ndarray:
        turned = (change @ x[:, :whole].reshape(draws, -1, k, m)).reshape(draws, whole, m)
        return np.concatenate([turned, x[:, whole:]], axis=1)

    return changed(changed(products).swapaxes(1, 2))


def shared_subspaces(
    products: Float64[np.ndarray, "M M"], members: Bool[np.ndarray, "P N"], most: int = SHARED_RANK
) -> list[Shared]:
    """Every phase's leading subspaces, at most `most` dimensions each."""
    k = len(products) // members.shape[1]
    return [_shared(products, np.flatnonzero(inside), k, most) for inside in members]


def _shared(products: Float64[np.ndarray, "M M"], layers: Int[np.ndarray, " n"], k: int, most: int) -> Shared:
    n, m = len(layers), len(layers) * k
    rows = (layers[:, None] * k + np.arange(k)).ravel()
    block = products[np.ix_(rows, rows)]
    whole = _leading(block, most)
    without = np.zeros((n, *whole.shape))
    for i in range(n):
        others = np.delete(np.arange(m), slice(i * k, (i + 1) * k))
        basis = _leading(block[np.ix_(others, others)], most)
        without[i, others, : basis.shape[1]] = basis
    return Shared(layers, rows, whole, without)


def _leading(block: Float64[np.ndarray, "m m"], most: int) -> Float64[np.ndarray, "m r"]:
    """U diag(λ)^-1/2 of the leading λ of SSᵀ = U diag(λ) Uᵀ: coefficients of the top right singular vectors.

    A λ below 1e-12 of the first is rounding, and its column is zero.
    """
    energies, vectors = np.linalg.eigh(block)
    energies, vectors = energies[-most:], vectors[:, -most:]
    present = energies > 1e-12 * energies[-1:]
    return vectors * np.where(present, 1 / np.sqrt(np.where(present, energies, 1)), 0)


@one_blas_thread()
def alignment_index(
    directions: Float[np.ndarray, "N k d"],
    members: Bool[np.ndarray, "P N"],
    factors: Sequence[Float32[np.ndarray, "R d"]],
    singular_values: Float[np.ndarray, "N s"],
) -> Float64[np.ndarray, "P N"]:
    """Energy of a layer's update in the subspace of the phase's other layers, over the most in r dimensions.

    tr(B C Bᵀ) / Σ_{i≤r} λ_i(C) with C = FᵀF, B (r, d) the leading subspace, r ≤ 8, of the phase without the
    layer, and λ = σ² (Elsayed et al. 2016). NaN for a layer that is zero, outside the phase, alone in it, or
    among zero layers only.

    Args:
        directions: orthonormal within each layer.
        members: mask of the layers of each phase.
        factors: F of each layer: its update's rows, or others with the same FᵀF.
        singular_values: of each F, descending.
    """
    index = np.full(members.shape, np.nan)
    energies = np.square(np.asarray(singular_values, np.float64))
    stack = directions.astype(np.float64).reshape(-1, directions.shape[-1])
    for p, phase in enumerate(shared_subspaces(inner_products(directions), members)):
        for layer, coefficients in zip(phase.layers, phase.without, strict=True):
            basis = coefficients.T @ stack[phase.rows]
            held = np.square(factors[layer].astype(np.float64) @ basis.T).sum()
            most = energies[layer, : np.count_nonzero(coefficients.any(axis=0))].sum()
            index[p, layer] = held / most if most > 0 else np.nan
    return index
