"""The moments of a view's groups of tokens: the spectrum without each group, the agreement of halves.

Axes: n tokens, d hidden size, r = min(n, d), q leading axes, G groups, R divisions of the groups into halves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdelta.spectra.linalg import eigenvalues, eigh, product
from jaxdelta.utils.arrays import AnyArray

JACKKNIFE_AXES = 16  # more than 10, for top10_frac
_FIRST_AMONG = 8  # leading axes that hold the start of the iteration for a half's first direction
_CHEBYSHEV_STEPS = 20
_TINY = np.finfo(np.float64).tiny


def by_group(
    x: Float[AnyArray, "n p"], y: Float[AnyArray, "n q"], membership: Float64[AnyArray, "G n"]
) -> Float[Array, "G p q"]:
    """Σ x_i y_iᵀ over the tokens i of each group.

    Shapes cannot depend on the sizes of groups, so tokens are put in at most 2G pieces of ⌈n/G⌉ tokens of one
    group. That takes 2/G of the work of a masked product for each group.
    """
    groups, n = membership.shape
    size, counts = -(-n // groups), jnp.cumsum(jnp.asarray(membership), axis=1).astype(int)
    owner, pieces = jnp.argmax(membership, axis=0), -(-counts[:, -1] // size)
    end, tokens = jnp.cumsum(pieces), jnp.arange(n)
    before = counts[owner, tokens] - 1  # number of earlier tokens of the same group
    piece = (end - pieces)[owner] + before // size
    places = jnp.full((2 * groups, size), n).at[piece, before % size].set(tokens)
    left, right = (jnp.pad(jnp.asarray(part), ((0, 1), (0, 0)))[places] for part in (x, y))
    sums = product(jnp.swapaxes(left, 1, 2), right)
    return jax.ops.segment_sum(sums, jnp.zeros(2 * groups, int).at[piece].set(owner), groups)


def leave_one_out(
    singular_values: Float64[np.ndarray, " r"],
    group_moments: Float64[np.ndarray, "G q q"],
    group_rest: Float64[np.ndarray, " G"],
) -> Float64[np.ndarray, "G r"]:
    """The eigenvalues λ, descending, of the moments without each group, Λ - A_g.

    Within the first JACKKNIFE_AXES axes they are exact: the first-order λ_j - a_jj varies too little, since
    the axes were fitted to the group itself and turn without it. Beyond these axes all λ shrink by the
    group's share of the energy there.
    """
    q = min(JACKKNIFE_AXES, group_moments.shape[1])
    energies, among = np.square(singular_values), group_moments[:, :q, :q]
    beyond = group_rest + np.trace(group_moments, axis1=1, axis2=2) - np.trace(among, axis1=1, axis2=2)
    top = np.asarray(eigenvalues(np.diag(energies[:q]) - among))[:, ::-1]
    share = beyond / max(energies[q:].sum(), _TINY)
    tail = np.maximum(1 - share, 0)[:, None] * energies[q:]
    return np.concatenate([np.maximum(top, 0), tail], axis=1)


def split_half_cosines(
    group_moments: Float64[np.ndarray, "G q q"], halves: Float64[np.ndarray, "R 2 G"]
) -> Float64[np.ndarray, " R"]:
    """|<v', v''>| of the first right singular vectors of two halves of the groups; NaN if a half has none.

    Both are computed within the q leading axes. For σ_i = i⁻ᵖ the mean over ten divisions then had an error
    below 0.015 with 48 axes (largest near p = 1/4, below 0.009 from p = 1/2 to 1) and 0.007 with 128.
    """
    repeats, _, groups = halves.shape
    q = group_moments.shape[1]
    moments = halves.reshape(2 * repeats, groups) @ group_moments.reshape(groups, q * q)
    moments = moments.reshape(2 * repeats, q, q)
    first = _first_vectors(moments).reshape(repeats, 2, q)
    first /= np.maximum(np.linalg.norm(first, axis=-1, keepdims=True), _TINY)
    cosines = np.minimum(np.abs(np.sum(first[:, 0] * first[:, 1], axis=-1)), 1)
    # Energy below float32's resolution is rounding in the coordinates of masked tokens.
    energy = np.trace(moments, axis1=1, axis2=2)
    there = energy > np.finfo(np.float32).eps ** 2 * energy.max(initial=0)
    return np.where(there.reshape(repeats, 2).all(axis=1), cosines, np.nan)


def _first_vectors(moments: Float64[np.ndarray, "B q q"]) -> Float64[np.ndarray, "B q"]:
    """The direction of the first eigenvector of each matrix; 0 for a zero matrix.

    Starts from the first eigenvector within _FIRST_AMONG axes, whose eigenvalues are θ_1, θ_2, ..., and
    multiplies it by T_s(M/θ_2), T_s the Chebyshev polynomial: it stays below 1 up to θ_2 and grows fastest
    above. θ_2 is at least θ_1/10. That takes a fifth of the time of all eigenvectors.
    """
    values, vectors = eigh(moments[:, :_FIRST_AMONG, :_FIRST_AMONG])
    edge = np.maximum(values[:, :-1].max(axis=1, initial=0), values[:, -1] / 10)
    scaled = moments / np.where(edge > 0, edge, 1)[:, None, None]
    before = np.zeros((*moments.shape[:2], 1))
    before[:, :_FIRST_AMONG, 0] = np.where(values[:, -1:] > 0, vectors[:, :, -1], 0)
    first = scaled @ before
    for _ in range(1, _CHEBYSHEV_STEPS):
        before, first = first, 2 * scaled @ first - before
        length = np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1)
        before, first = before / length, first / length
    return first[..., 0]
