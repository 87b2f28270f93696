"""Bootstrap of the overlaps: their variation under other weights of the documents.

Axes: N layers, G documents, B draws, b draws of a chunk, k directions per layer, c ≥ k of its basis, d hidden
size, P phases; a phase of n layers stacks m = n·k directions.

With M_g = Σ δ_i δ_iᵀ over document g's tokens, a draw's moment is M_w = Σ_g w_g M_g. Its k leading directions
come from the full text's leading V (c, d) by a Rayleigh-Ritz step on their span, V M_w Vᵀ = Q θ Qᵀ, and one
power step, Qᵀ V M_w. Within the span that is exact. A component of direction i along an axis j > c outside
the span is too small by the factor 1 - λ_j/λ_i. With c = k that matters for the k-th direction, which rarely
has a gap after it, and captures seem too certain: hence c = 3k/2. Of a document only V M_g (c, d) is needed.

Products over d are in float32, since draws only estimate a spread. NumPy on the host, with one thread per
core: compiling would take longer.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.statistics.across_layers.overlap import phase_means, singular_values
from jaxdelta.statistics.across_layers.subspaces import (
    SHARED_RANK,
    Shared,
    inner_products,
    orthonormalised,
    shared_subspaces,
    unit,
)
from jaxdelta.statistics.per_layer.ranks import effective_rank

_CHUNK_BYTES = 16 << 20  # largest array of a phase's directions: fresh pages of larger ones cost time
_CHOSEN_FROM = 10  # dimensions among which the 8 of a draw's shared subspace are chosen


@dataclasses.dataclass(frozen=True)
class OverlapBootstrap:
    """The fields of `Overlaps` in each of B draws; v1_cos is |<v_b, v>|, adjacent |<v_L, v_L+1>|.

    Captures are NaN for layers outside the phase.
    """

    v1_cos: Float64[np.ndarray, "N B"]
    adjacent: Float64[np.ndarray, "N-1 B"]
    intra: Float64[np.ndarray, "P B"]
    cross: Float64[np.ndarray, "P B"]
    capture: Float64[np.ndarray, "P N B"]
    leave_one_out: Float64[np.ndarray, "P N B"]
    stacked_rank: Float64[np.ndarray, "P B"]


@one_blas_thread()
def bootstrap_overlaps(
    coupling: Float32[np.ndarray, "N G c d"],
    basis: Float[np.ndarray, "N c d"],
    k: int,
    weights: Float[np.ndarray, "B G"],
    members: Bool[np.ndarray, "P N"],
) -> OverlapBootstrap:
    """The overlaps of the layers' directions under each draw's weights of the documents.

    Args:
        coupling: V_L M_g of each layer and document.
        basis: V_L of the full text, orthonormal within each layer.
        k: number of directions compared.
        weights: number of times that each draw has each document.
        members: mask of the layers of each phase; a layer has one phase.
    """
    layers, documents, c, d = coupling.shape
    transposed = np.swapaxes(basis, 1, 2).astype(np.float32)
    moments = coupling.reshape(layers, documents * c, d) @ transposed
    moments = moments.reshape(layers, documents, c * c).astype(np.float64)
    first = transposed[:, :, 0]
    phases = shared_subspaces(inner_products(basis[:, :k]), members, _CHOSEN_FROM)

    def draws(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
        ritz = _ritz((chunk @ moments).reshape(layers, -1, c, c), k)
        return _draws(coupling, chunk.astype(np.float32), ritz, first, members, phases)

    threads, size = os.cpu_count() or 1, len(weights) * int(members.sum(axis=1).max()) * k * d * 4
    chunks = min(max(threads, -(-size // _CHUNK_BYTES)), len(weights))
    with ThreadPoolExecutor(threads, "draws") as pool:
        parts = list(pool.map(draws, np.array_split(weights, chunks)))
    return OverlapBootstrap(*(np.moveaxis(np.concatenate(part), 0, -1) for part in zip(*parts, strict=True)))


Ritz = tuple[Float64[np.ndarray, "N b k c"], Float32[np.ndarray, "N b k c"]]


def _ritz(moments: Float64[np.ndarray, "N b c c"], k: int) -> Ritz:
    """The first k rows of Qᵀ, V M_w Vᵀ = Q θ Qᵀ with θ descending, and of θ⁻¹Qᵀ, zero for θ ≈ 0.

    The rows of θ⁻¹Qᵀ V M_w have about unit length, so that float32 suffices for any θ.
    """
    values, vectors = np.linalg.eigh((moments + moments.swapaxes(-1, -2)) / 2)
    present = values > 1e-12 * np.maximum(values[..., -1:], 0)
    scales = np.where(present, 1 / np.where(present, values, 1), 0)[..., ::-1][..., :k]
    rows = vectors[..., ::-1].swapaxes(-1, -2)[..., :k, :]
    return rows, (rows * scales[..., None]).astype(np.float32)


def _draws(
    coupling: Float32[np.ndarray, "N G c d"],
    weights: Float32[np.ndarray, "b G"],
    ritz: Ritz,
    first: Float32[np.ndarray, "N d"],
    members: Bool[np.ndarray, "P N"],
    phases: list[Shared],
) -> tuple[np.ndarray, ...]:
    """A chunk's OverlapBootstrap, with leading axis b; `first` are the full text's v."""
    draws, (vectors, rotation) = len(weights), ritz
    k = rotation.shape[2]
    v = np.empty((draws, *first.shape), np.float32)
    captures = np.full((2, draws, *members.shape), np.nan)
    ranks = np.empty((draws, len(phases)))
    for p, phase in enumerate(phases):
        rows = _directions(coupling, phase.layers, weights, rotation)
        v[:, phase.layers] = unit(rows[:, ::k])
        # Each is its Ritz vector plus a vector orthogonal to V, so they are independent.
        block = orthonormalised((rows @ rows.swapaxes(1, 2)).astype(np.float64), k)
        captures[:, :, p, phase.layers] = _captures(block, _starts(vectors, phase))
        ranks[:, p] = effective_rank(singular_values(block[:, ::k, ::k]))
    cosines = np.minimum(np.abs(v @ v.swapaxes(1, 2)), 1).astype(np.float64)
    return (
        np.minimum(np.abs(np.sum(v * first, axis=-1)), 1).astype(np.float64),
        np.diagonal(cosines, 1, 1, 2),
        *phase_means(cosines, members),
        *captures,
        ranks,
    )


def _directions(
    coupling: Float32[np.ndarray, "N G c d"],
    layers: Int[np.ndarray, " n"],
    weights: Float32[np.ndarray, "b G"],
    rotation: Float32[np.ndarray, "N b k c"],
) -> Float32[np.ndarray, "b m d"]:
    """The stacked rows of (rotation V M_w) of the layers."""
    _, documents, c, d = coupling.shape
    rows = np.empty((len(weights), len(layers), rotation.shape[2], d), np.float32)
    for index, layer in enumerate(layers):
        moved = weights @ coupling[layer].reshape(documents, c * d)
        np.matmul(rotation[layer], moved.reshape(-1, c, d), out=rows[:, index])
    return rows.reshape(len(weights), -1, d)


def _starts(ritz: Float64[np.ndarray, "N b k c"], phase: Shared) -> Float64[np.ndarray, "b m bases r"]:
    """The full text's subspaces, whole and without each layer, as coefficients of a draw's directions QᵀV."""
    k = ritz.shape[2]
    full = np.concatenate([phase.whole[None], phase.without]).swapaxes(0, 1)
    turned = ritz[phase.layers, :, :, :k] @ full.reshape(len(phase.layers), 1, k, -1)
    return turned.swapaxes(0, 1).reshape(-1, *full.shape)


def _captures(
    block: Float64[np.ndarray, "b m m"], basis: Float64[np.ndarray, "b m bases r"]
) -> Float64[np.ndarray, "2 b n"]:
    """`capture` and `leave_one_out` of a phase's layers; a power step from `basis` gives its subspaces."""
    draws, m, bases, r = basis.shape
    n = bases - 1
    own = np.repeat(np.eye(n, dtype=bool), m // n, axis=0)
    inside = np.insert(~own, 0, True, axis=1)[..., None]

    def step(rows: np.ndarray) -> np.ndarray:
        return inside * (block @ rows.reshape(draws, m, bases * r)).reshape(rows.shape)

    basis = step(basis)
    image, basis = step(basis).transpose(0, 2, 1, 3), basis.transpose(0, 2, 3, 1)
    basis = _leading(basis @ image, image.swapaxes(-1, -2) @ image) @ basis
    along = block[:, :, :: m // n]
    capture = np.square(basis[:, 0] @ along).sum(-2)
    alone = np.square(basis[:, 1:] @ along.swapaxes(1, 2)[..., None]).sum((-2, -1))
    return np.minimum([capture, alone if n > 1 else np.full_like(alone, np.nan)], 1.0)


def _leading(
    norms: Float64[np.ndarray, "b bases s s"], images: Float64[np.ndarray, "b bases s s"]
) -> Float64[np.ndarray, "b bases r s"]:
    """The leading (at most 8) combinations of rows of A whose product with a stack S is orthonormal.

    A Rayleigh-Ritz step with SᵀS on the span of A S, from `norms` A (SSᵀ) Aᵀ and `images` A (SSᵀ)² Aᵀ. Rows
    that depend on others become nearly zero.
    """
    largest = np.diagonal(norms, 0, -2, -1).max(-1)
    ridge = np.where(largest > 0, 1e-10 * largest, 1)[..., None, None] * np.eye(norms.shape[-1])
    whitening = np.linalg.inv(np.linalg.cholesky(norms + ridge))
    chosen = np.linalg.eigh(whitening @ images @ whitening.swapaxes(-1, -2))[1][..., -SHARED_RANK:]
    return chosen.swapaxes(-1, -2) @ whitening
