"""The overlaps under other weights of the documents: how far they would move with another text.

Axes: N layers, G documents, B draws, k directions a layer, c ≥ k of its basis, d hidden size, P phases; a
chunk is b draws.

With M_g = Σ δ_i δ_iᵀ over document g's tokens, a draw's moment is M_w = Σ_g w_g M_g. Its k leading directions
come from the full text's leading V (c, d) by a Rayleigh-Ritz step on their span, V M_w Vᵀ = Q θ Qᵀ, and one
power step, Qᵀ V M_w. Within the span that is exact; what a direction i gains from outside of it, from an axis
j > c, is understated by the share λ_j/λ_i. With c = k that is much for the k-th direction, which rarely has
a gap after it, and captures seem too certain: hence c = 2k. Only V M_g (c, d) is needed of a document.

Products over d run on the device in float32, draws being estimates of a spread; small algebra on the host.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from jaxdelta.overlap import phase_means, singular_values
from jaxdelta.spectrum import effective_rank, product
from jaxdelta.subspaces import SHARED_RANK, Shared, inner_products, one_blas_thread, shared_subspaces
from jaxdelta.types import AnyArray

_CHUNK_BYTES = 64 << 20
_SPARE = 2  # times a shared subspace's dimensions, among which a draw's subspace is chosen


@dataclasses.dataclass(frozen=True)
class OverlapDraws:
    """What `Overlaps` holds, in each of B draws; v1_cos is |<v_b, v>|, adjacent |<v_L, v_L+1>|."""

    v1_cos: Float64[np.ndarray, "N B"]
    adjacent: Float64[np.ndarray, "N-1 B"]
    intra: Float64[np.ndarray, "P B"]
    cross: Float64[np.ndarray, "P B"]
    capture: Float64[np.ndarray, "P N B"]
    leave_one_out: Float64[np.ndarray, "P N B"]
    stacked_rank: Float64[np.ndarray, "P B"]


@one_blas_thread
def resampled_overlaps(
    coupling: Float32[AnyArray, "N G c d"],
    basis: Float[AnyArray, "N c d"],
    k: int,
    weights: Float[np.ndarray, "B G"],
    members: Bool[np.ndarray, "P N"],
) -> OverlapDraws:
    """The overlaps of the layers' directions under each draw's weights of the documents.

    Args:
        coupling: V_L M_g of every layer and document.
        basis: V_L, the full text's, orthonormal within each layer.
        k: how many of a draw's directions are compared, as the full text's first k are.
        weights: how often each draw has each document.
        members: which layers belong to which phase.
    """
    layers, documents, c, d = coupling.shape
    coupling = jnp.asarray(coupling)
    moments = np.asarray(_moments(coupling, jnp.asarray(basis, jnp.float32)), np.float64)
    phases = shared_subspaces(inner_products(basis[:, :k]), members, _SPARE * SHARED_RANK)
    size = _chunk(len(weights), layers, c, d)
    padded = np.ones((-(-len(weights) // size) * size, documents), np.float32)
    padded[: len(weights)] = weights

    def draws(start: int) -> tuple[np.ndarray, ...]:
        chunk = padded[start : start + size]
        ritz, scales = _ritz(np.tensordot(chunk.astype(np.float64), moments, 1), k)
        scaled = jnp.asarray(ritz * scales[..., None], jnp.float32)
        inner = np.asarray(_inner(coupling, jnp.asarray(chunk), scaled))
        return _draws(inner, ritz, members, phases)

    # Two chunks at once: one's small algebra on the host beside the other's products on the device.
    with ThreadPoolExecutor(2, "draws") as pool:
        parts = list(pool.map(draws, range(0, len(padded), size)))
    values = (np.moveaxis(np.concatenate(part)[: len(weights)], 0, -1) for part in zip(*parts, strict=True))
    return OverlapDraws(*values)


def _chunk(draws: int, layers: int, c: int, d: int) -> int:
    """Draws at once: new directions twice, their inner products in float32 and twice in float64."""
    each = layers * c * (8 * d + 20 * layers * c)
    count = -(-draws * each // _CHUNK_BYTES)
    return -(-draws // count)


@jax.jit
def _moments(
    coupling: Float32[Array, "N G c d"], basis: Float32[Array, "N c d"]
) -> Float32[Array, "G N c c"]:
    """V M_g Vᵀ of every document and layer."""
    return jnp.swapaxes(product(coupling, jnp.swapaxes(basis, 1, 2)[:, None]), 0, 1)


@jax.jit
def _inner(
    coupling: Float32[Array, "N G c d"], weights: Float32[Array, "b G"], rotation: Float32[Array, "b N k c"]
) -> Float32[Array, "b M M"]:
    """Inner products of all rows of (rotation V M_w), not orthonormal yet."""
    moved = jnp.einsum("bg,Ngcd->bNcd", weights, coupling, precision=jax.lax.Precision.HIGHEST)

    def products(draw: tuple[Array, Array]) -> Array:
        rows = product(*draw).reshape(-1, coupling.shape[-1])
        return product(rows, rows.T)

    # One draw at a time: on a CPU XLA multiplies batches of matrices on one core and slowly.
    return jax.lax.map(products, (rotation, moved))


def _ritz(
    moments: Float64[np.ndarray, "b N c c"], k: int
) -> tuple[Float64[np.ndarray, "b N k c"], Float64[np.ndarray, "b N k"]]:
    """The first k of Qᵀ and θ⁻¹, V M_w Vᵀ = Q θ Qᵀ, descending; θ⁻¹ is zero for what a draw does not have.

    The rows of θ⁻¹Qᵀ V M_w are about of unit length, so that float32 serves small θ as well as large ones.
    """
    values, vectors = np.linalg.eigh((moments + moments.swapaxes(-1, -2)) / 2)
    present = values > 1e-12 * np.maximum(values[..., -1:], 0)
    scales = np.where(present, 1 / np.where(present, values, 1), 0)
    return vectors[..., ::-1].swapaxes(-1, -2)[..., :k, :], scales[..., ::-1][..., :k]


def _draws(
    inner: Float32[np.ndarray, "b M M"],
    ritz: Float64[np.ndarray, "b N k c"],
    members: Bool[np.ndarray, "P N"],
    phases: list[Shared],
) -> tuple[np.ndarray, ...]:
    """A chunk's OverlapDraws, draws first."""
    k = ritz.shape[2]
    firsts = inner[:, ::k, ::k]
    squares = np.diagonal(firsts, 0, 1, 2).astype(np.float64)
    inverse = np.where(squares > 0, 1 / np.sqrt(np.where(squares > 0, squares, 1)), 0)  # lengths
    products = firsts * inverse[:, :, None] * inverse[:, None, :]
    cosines = np.minimum(np.abs(products), 1.0)
    captures = [
        _captures(*_orthonormal(inner, inverse, phase), _starts(ritz, phase), phase.layers)
        for phase in phases
    ]
    ranks = [_ranks(products[:, phase.layers[:, None], phase.layers]) for phase in phases]
    return (
        np.minimum(np.abs(ritz[..., 0, 0]) * inverse, 1.0),  # <θ⁻¹ qᵀ V M_w, v> is q's first entry
        np.diagonal(cosines, 1, 1, 2),
        *phase_means(cosines, members),
        np.stack([capture for capture, _ in captures], 1),
        np.stack([alone for _, alone in captures], 1),
        np.stack(ranks, 1),
    )


def _orthonormal(
    inner: Float32[np.ndarray, "b M M"], inverse: Float64[np.ndarray, "b N"], phase: Shared
) -> tuple[Float64[np.ndarray, "b m m"], Float64[np.ndarray, "b m N"]]:
    """A phase's inner products, with each other and with all v, of rows made orthonormal within each layer.

    Gram-Schmidt in the rows' order is L⁻¹ on a layer's rows, whose inner products are L Lᵀ. A row is its
    Ritz vector plus something at a right angle to all of V: L Lᵀ = I + E Eᵀ, which a Cholesky factorisation
    survives. A row that is zero remains so.
    """
    draws, n, m = len(inner), len(phase.layers), len(phase.rows)
    k = m // n
    rows = inner[:, phase.rows]
    among, firsts = rows[:, :, phase.rows], rows[:, :, ::k] * inverse[:, None]
    split = among.reshape(draws, n, k, n, k)
    own = np.moveaxis(split[:, np.arange(n), :, np.arange(n)], 0, 1).astype(np.float64)
    absent = np.diagonal(own, 0, -2, -1) == 0
    lower = np.linalg.inv(np.linalg.cholesky(own + absent[..., None] * np.eye(k)))

    def left(rows: np.ndarray) -> np.ndarray:
        return (lower @ rows.reshape(draws, n, k, -1)).reshape(rows.shape)

    return left(left(among).swapaxes(1, 2)), left(firsts)


def _starts(ritz: Float64[np.ndarray, "b N k c"], phase: Shared) -> Float64[np.ndarray, "b m bases r"]:
    """The full text's subspaces, whole and without each layer, as coefficients of a draw's directions.

    A draw's directions are near QᵀV, so what multiplied V is multiplied by Qᵀ.
    """
    k = ritz.shape[2]
    full = np.concatenate([phase.whole[None], phase.without]).swapaxes(0, 1)
    turned = ritz[:, phase.layers, :, :k] @ full.reshape(len(phase.layers), k, -1)
    return turned.reshape(len(ritz), *full.shape)


def _captures(
    block: Float64[np.ndarray, "b m m"],
    along: Float64[np.ndarray, "b m N"],
    found: Float64[np.ndarray, "b m bases r"],
    layers: Int[np.ndarray, " n"],
) -> tuple[Float64[np.ndarray, "b N"], Float64[np.ndarray, "b N"]]:
    """`capture` and `leave_one_out` of a phase, its subspaces found by a power step from the full text's."""
    draws, m, bases, r = found.shape
    n = len(layers)
    own = np.repeat(np.eye(n, dtype=bool), m // n, axis=0)
    inside = np.insert(~own, 0, True, axis=1)[..., None]

    def step(rows: np.ndarray) -> np.ndarray:
        return (block @ rows.reshape(draws, m, bases * r)).reshape(rows.shape)

    found = inside * step(found)
    image, found = (inside * step(found)).transpose(0, 2, 1, 3), found.transpose(0, 2, 3, 1)
    leading = _leading(found @ image, image.swapaxes(-1, -2) @ image)
    found = leading @ found
    capture = np.square(found[:, 0] @ along).sum(-2)
    alone = capture.copy()
    firsts = found[:, 1:] @ along[:, :, layers].swapaxes(1, 2)[..., None]
    alone[:, layers] = np.square(firsts).sum(-2)[..., 0] if n > 1 else np.nan
    return np.minimum(capture, 1.0), np.minimum(alone, 1.0)


def _leading(
    norms: Float64[np.ndarray, "b bases s s"], images: Float64[np.ndarray, "b bases s s"]
) -> Float64[np.ndarray, "b bases r s"]:
    """Combinations of the rows A of a stack S, the leading at most 8, that are orthonormal as rows of A S.

    `norms` is A (SSᵀ) Aᵀ and `images` A (SSᵀ)² Aᵀ: a Rayleigh-Ritz step with SᵀS on the span of A S. Rows
    that depend on others are left out.
    """
    values, vectors = np.linalg.eigh(norms)
    present = values > 1e-10 * values[..., -1:]
    whitened = vectors * np.where(present, 1 / np.sqrt(np.where(present, values, 1)), 0)[..., None, :]
    chosen = np.linalg.eigh(whitened.swapaxes(-1, -2) @ images @ whitened)[1][..., -SHARED_RANK:]
    return (whitened @ chosen).swapaxes(-1, -2)


def _ranks(products: Float64[np.ndarray, "b n n"]) -> Float64[np.ndarray, " b"]:
    return np.array([effective_rank(values) for values in singular_values(products)])
