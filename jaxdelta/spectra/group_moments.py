"""What one view of a layer's update tells of its documents: what it is without each, in halves, and theirs.

Axes: n tokens, d hidden size, r = min(n, d), q leading axes, G groups of documents, R divisions of them into
halves, c directions of the basis. Written for NumPy's arrays, which a CPU has, and for traced ones alike.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64

from jaxdelta.spectra.linalg import eigenvalues, eigh, product
from jaxdelta.spectra.spectrum import Spectrum
from jaxdelta.text.groups import Groups
from jaxdelta.utils.arrays import AnyArray, namespace

FACTOR_ROWS = 512
LEADING = 16  # axes whose turning is followed when a document is left out: more than 10, for top10_frac
_FIRST_AMONG = 8  # of these a half's first direction is looked for before iterating
_CHEBYSHEV_STEPS = 10
_TINY = np.finfo(np.float64).tiny


class Resampled(NamedTuple):
    """What resampling needs: all σ² without each of the groups, and |<v_1', v_1''>| of two halves' own v_1,
    NaN where a half has no update."""

    without: Float64[AnyArray, "*layers G r"]
    split_half: Float64[AnyArray, "*layers R"]


class Crossed(NamedTuple):
    """What relations between layers need of a view.

    `factor` F: FᵀF = δᵀδ; δ itself, or, where it has more than FACTOR_ROWS rows, its leading FACTOR_ROWS
    directions times their σ. `coupling`: V Σ_{i in g} δ_iδ_iᵀ for every group g, V the basis.
    """

    factor: Float32[AnyArray, "*layers R d"]
    coupling: Float32[AnyArray, "*layers G c d"]


def resampled(
    x: Float64[AnyArray, "n d"],
    norms: Float64[AnyArray, " n"],
    square: Float64[AnyArray, "n n"] | None,
    spectrum: Spectrum,
    coordinates: Float64[AnyArray, "n q"],
    groups: Groups,
) -> Resampled:
    """Of a view's tokens, their squared norms, x xᵀ where it is known, and their coordinates along V."""
    xp, values = namespace(x), spectrum.singular_values
    leading = coordinates[:, :LEADING]
    among = moments_by_group(leading, groups.membership)
    beyond = product(groups.membership, norms) - xp.trace(among, axis1=1, axis2=2)
    first = leading[:, :_FIRST_AMONG], among[:, :_FIRST_AMONG, :_FIRST_AMONG]
    return Resampled(
        without_groups(xp.square(values), among, beyond), _split_half(x, square, *first, values[0], groups)
    )


def crossed(
    x: Float64[AnyArray, "n d"], spectrum: Spectrum, coordinates: Float64[AnyArray, "n q"], groups: Groups
) -> Crossed:
    """Of a view's tokens and their coordinates along V, FACTOR_ROWS at least where there are so many."""
    narrow = x.astype(np.float32)
    basis = spectrum.directions.astype(np.float32)
    coupling = by_group(product(narrow, basis.T), narrow, groups.membership)
    if len(x) <= FACTOR_ROWS:
        return Crossed(narrow, coupling)
    # U_Rᵀδ, which is diag(σ_R) V_Rᵀ.
    values = namespace(x).maximum(spectrum.singular_values[:FACTOR_ROWS], _TINY)
    left = (coordinates[:, :FACTOR_ROWS] / values).astype(np.float32)
    return Crossed(product(left.T, narrow), coupling)


def without_groups(
    energies: Float64[AnyArray, " r"], among: Float64[AnyArray, "G q q"], beyond: Float64[AnyArray, " G"]
) -> Float64[AnyArray, "G r"]:
    """The eigenvalues λ of the moments without each group: of Λ - A_g, exactly within the first q axes.

    `among` are the groups' own moments A_g in those axes, `beyond` what they hold in all others. There all λ
    shrink alike: they are directions with nearly nothing in them, and only how much they hold together enters
    a figure. Within, Λ is solved anew: to first order its λ_j are λ_j - a_jj, which is too steady, for the
    axes were fitted to the group itself. Without it they turn.
    """
    xp, q = namespace(among), among.shape[1]
    top = eigenvalues(xp.diag(energies[:q]) - among)[:, ::-1]
    share = beyond / xp.maximum(energies[q:].sum(), _TINY)
    tail = xp.maximum(1 - share, 0)[:, None] * energies[q:]
    return xp.concatenate([xp.maximum(top, 0), tail], axis=1)


def moments_by_group(
    x: Float64[AnyArray, "n q"], membership: Float64[AnyArray, "G n"]
) -> Float64[AnyArray, "G q q"]:
    """Σ x_i x_iᵀ over the tokens of each group: of a few axes, all in one product."""
    squares = (x[:, :, None] * x[:, None]).reshape(len(x), -1)
    return product(membership, squares).reshape(-1, x.shape[1], x.shape[1])


def by_group(
    x: Float[AnyArray, "n p"], y: Float[AnyArray, "n q"], membership: Float64[AnyArray, "G n"]
) -> Float[AnyArray, "G p q"]:
    """Σ x_i y_iᵀ over the tokens of each group.

    Traced, where a shape cannot depend on a group, tokens lie in pieces of ⌈n/G⌉, each of one group: at most
    2G. That is 2/G of the work of all tokens for each group, however long the groups are.
    """
    if isinstance(x, np.ndarray):
        order = np.argsort(membership.argmax(axis=0), kind="stable")
        ends = np.cumsum(membership.sum(axis=1)).astype(int).tolist()
        spans, x, y = itertools.pairwise([0, *ends]), x.take(order, axis=0), y.take(order, axis=0)
        return np.stack([x[start:end].T @ y[start:end] for start, end in spans])
    groups, n = membership.shape
    size, counts = -(-n // groups), jnp.cumsum(membership, axis=1).astype(int)
    owner, pieces = jnp.argmax(membership, axis=0), -(-counts[:, -1] // size)
    end, tokens = jnp.cumsum(pieces), jnp.arange(n)
    before = counts[owner, tokens] - 1  # tokens of its group that come before a token
    piece = (end - pieces)[owner] + before // size
    places = jnp.full((2 * groups, size), n).at[piece, before % size].set(tokens)
    left, right = (jnp.pad(part, ((0, 1), (0, 0)))[places] for part in (x, y))
    found = product(jnp.swapaxes(left, 1, 2), right)
    return jax.ops.segment_sum(found, jnp.zeros(2 * groups, int).at[piece].set(owner), groups)


def _split_half(
    x: Float64[AnyArray, "n d"],
    square: Float64[AnyArray, "n n"] | None,
    leading: Float64[AnyArray, "n q"],
    among: Float64[AnyArray, "G q q"],
    first: Any,
    groups: Groups,
) -> Float64[AnyArray, " R"]:
    """|<v', v''>| of the first right singular vectors of two halves of the groups, NaN where one has none.

    With W a half's tokens, v ∝ XᵀWu, u the first eigenvector of W XXᵀ W: all in the space of the tokens. In
    units of σ_1, so that float32 serves an update of any size.
    """
    xp, (repeats, _, count) = namespace(x), groups.halves.shape
    if not repeats:
        return xp.zeros(0, x.dtype)
    unit = xp.where(first > 0, first, 1)
    halves = groups.halves.reshape(2 * repeats, count)
    tokens = product(groups.membership.T, halves.T).astype(np.float32)
    moments = product(halves, among.reshape(count, -1)).reshape(-1, *among.shape[1:]) / unit**2
    through = _through(x, square, unit)
    u = _first_vectors(through, tokens, (leading / unit).astype(np.float32), moments.astype(np.float32))
    images = through(u)
    u, images = (part.reshape(len(x), repeats, 2) for part in (u, images))
    lengths = xp.sqrt(xp.maximum(xp.sum(u * images, axis=0), 0)).prod(axis=1)
    cosines = xp.abs(xp.sum(u[..., 0] * images[..., 1], axis=0)) / xp.where(lengths > 0, lengths, 1)
    return xp.where(lengths > 0, cosines, np.nan).astype(x.dtype)


def _through(
    x: Float64[AnyArray, "n d"], square: Float64[AnyArray, "n n"] | None, unit: Any
) -> Callable[[Float32[AnyArray, "n B"]], Float32[AnyArray, "n B"]]:
    """y -> x xᵀ y in units of x, by whichever takes less work."""
    n, d = x.shape
    if square is not None:
        rows = (square / unit**2).astype(np.float32)
        return lambda y: product(rows, y)
    narrow = (x / unit).astype(np.float32)
    transposed = narrow.T
    if not isinstance(x, np.ndarray):  # XLA on a CPU is slow at products of a transpose that is none yet.
        transposed = jax.lax.optimization_barrier(transposed)
    if n > d:
        return lambda y: product(narrow, product(transposed, y))
    rows = product(narrow, transposed)
    return lambda y: product(rows, y)


def _first_vectors(
    through: Callable[[Any], Any],
    tokens: Float32[AnyArray, "n B"],
    coordinates: Float32[AnyArray, "n q"],
    among: Float32[AnyArray, "B q q"],
) -> Float32[AnyArray, "n B"]:
    """The first eigenvector of W XXᵀ W for several W = diag(0 or 1), in columns; 0 where there is none.

    The best of those in X's leading axes, where XᵀWX is `among` with eigenvalues θ_1, θ_2 ..., then
    T_s(W XXᵀ W/θ_2) of it, T_s the Chebyshev polynomial: it keeps what belongs to eigenvalues up to θ_2 below
    1 and grows fastest beyond it, as a power does far slower. θ_1/10 stands for a smaller θ_2.
    """
    xp, (values, vectors) = namespace(tokens), eigh(among)
    edge = xp.maximum(values[:, :-1].max(axis=1, initial=0), values[:, -1] / 10)
    scaled = tokens / xp.where(edge > 0, edge, 1)
    start = tokens * product(coordinates, xp.where(values[:, -1] > 0, vectors[:, :, -1].T, 0))
    before, u = start, scaled * through(start)
    for _ in range(1, _CHEBYSHEV_STEPS):
        before, u = u, 2 * scaled * through(u) - before
    return u / xp.maximum(xp.linalg.norm(u, axis=0), np.finfo(np.float32).tiny)
