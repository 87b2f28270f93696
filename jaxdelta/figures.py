"""What is measured of one view of a layer's update: spectrum, tokens, and what resampling and overlaps need.

Axes: n tokens, d hidden size, r = min(n, d), k kept directions, G groups of documents, R divisions of them
into halves. All functions here must be traced with 64-bit types on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64

from jaxdelta.lapack import eigh
from jaxdelta.spectrum import (
    Solved,
    Spectrum,
    decompose,
    host_decompose,
    product,
    row_sums,
    token_products,
)
from jaxdelta.sweep import Update
from jaxdelta.types import AnyArray
from jaxdelta.views import View

FACTOR_ROWS = 512
RESAMPLED_AXES = 512  # along which tokens' coordinates are known to resampling: not fewer than FACTOR_ROWS

# Directions among which a half's first is looked for before iterating, and whose turning is followed
# when a document is left out; more than 10, for top10_frac.
_RITZ = 16
_CHEBYSHEV_STEPS = 10


class Groups(NamedTuple):
    """The text's documents, or groups of them: they are drawn anew, since tokens of one are not independent.

    `membership[g, i]` is 1 where token i is in group g, else 0; `halves[r, s, g]` is 1 where group g is in
    half s of the r-th division.
    """

    membership: Float64[AnyArray, "G n"]
    halves: Float64[AnyArray, "R 2 G"]

    @classmethod
    def none(cls, halves: Float64[AnyArray, "R 2 G"]) -> "Groups":
        """Of no token: where groups are known otherwise."""
        return cls(np.zeros((halves.shape[2], 0)), halves)


class Selection(NamedTuple):
    """A view as numbers, so that one compiled function serves all views."""

    attention: Any
    mlp: Any
    centred: Any

    @classmethod
    def of(cls, view: View) -> "Selection":
        """A view as 1 for what is in it, attention, MLP, centring, and 0 for what is not."""
        numbers = (view.part != "mlp", view.part != "attention", view.centred)
        return cls(*(np.float32(number) for number in numbers))


class Resampled(NamedTuple):
    """What resampling needs: all σ² without each of the groups, and |<v_1', v_1''>| of two halves' own v_1,
    NaN where a half has no update."""

    without: Float64[AnyArray, "*layers G r"]
    split_half: Float64[AnyArray, "*layers R"]


class Found(NamedTuple):
    """What the device finds of a view.

    `products`: see `token_products`; `owned`: each token's share of σ_1²; `mean_energy`: ‖Σ_i δ_i‖²/n;
    `factor`: see Crossed, None where it is δ itself. Of a long text some products and shares are unknown,
    see `pooling`.
    """

    spectrum: Spectrum
    products: tuple[AnyArray, AnyArray, AnyArray] | None
    owned: Float64[AnyArray, "*layers n"] | None
    mean_energy: Float64[AnyArray, "*layers"]
    resampled: Resampled | None
    factor: Float32[AnyArray, "*layers R d"] | None


class Crossed(NamedTuple):
    """What relations between layers need of a view.

    `factor` F: FᵀF = δᵀδ; δ itself, or, where it has more than FACTOR_ROWS rows, its leading FACTOR_ROWS
    directions times their σ. `coupling`: V Σ_{i in g} δ_iδ_iᵀ for every group g, V the basis.
    """

    factor: Float32[AnyArray, "*layers R d"]
    coupling: Float32[AnyArray, "*layers G c d"]


def state_products(update: Update) -> dict[str, Float64[Array, " n"]]:
    """Each token's squared norms: of the state before the layer and after it, of what each sublayer wrote,
    of the whole update; `cross`, 2<attention, mlp>; and the products of the three writes with h."""
    attention, mlp, h = (part.astype(jnp.float64) for part in update)
    delta = jnp.asarray(update.delta).astype(jnp.float64)
    factors = {
        "entering": (h, h),
        "leaving": (h + delta, h + delta),
        "attention": (attention, attention),
        "mlp": (mlp, mlp),
        "cross": (2 * attention, mlp),
        "update": (delta, delta),
        "update_h": (delta, h),
        "attention_h": (attention, h),
        "mlp_h": (mlp, h),
    }
    return dict(zip(factors, row_sums([x * y for x, y in factors.values()]), strict=True))


def view_figures(
    update: Update,
    kept: Float64[AnyArray, " n"],
    rows: Float64[Array, "n d"] | None,
    solved: Solved | None,
    selection: Selection | None,
    groups: Groups | None,
    k: int,
    method: str,
) -> Found:
    """All figures of a view of one layer; tokens that are not `kept` (0, else 1) count nothing.

    Without a selection, of the raw view: no time goes into masks and means that change nothing. `rows`: the
    `view_rows`, where they are known, and `solved` what `solve` found of them; with groups, the vectors along
    which they are resampled.
    """
    kept = jnp.asarray(kept)
    x = view_rows(update, kept, selection) if rows is None else rows
    products = token_products(x, update.h)
    # Some solvers never return from a NaN; the products keep it, for the caller to see.
    x = jnp.where(jnp.isfinite(products[0].sum()), x, 0)
    return _describe(x, kept, products, groups, *decompose(x, k, method, solved))


def host_figures(
    update: Update,
    kept: Float64[np.ndarray, " n"],
    selection: Selection | None,
    groups: Groups | None,
    k: int,
) -> Found:
    """`view_figures` with NumPy's SVD: for a spectrum whose certificate failed."""
    x = view_rows(update, kept, selection)
    decomposed = host_decompose(np.asarray(x), k)
    products = token_products(x, update.h)
    return jax.jit(_describe)(x, jnp.asarray(kept), products, groups, *decomposed)


def crossed(
    update: Update,
    kept: Float64[AnyArray, " n"],
    basis: Float64[AnyArray, "c d"],
    factor: Float32[AnyArray, "R d"] | None,
    selection: Selection,
    groups: Groups,
) -> Crossed:
    """What relations between layers need of a view of which this was found."""
    x = view_rows(update, kept, selection).astype(jnp.float32)
    coupling = _by_group(product(x, jnp.asarray(basis, jnp.float32).T), x, jnp.asarray(groups.membership))
    return Crossed(x if factor is None else factor, coupling)


def factor_shape(n: int, d: int) -> tuple[int, int] | None:
    """The shape of a factor that is not δ itself."""
    return None if n <= FACTOR_ROWS else (min(FACTOR_ROWS, d), d)


def _factor(
    x: Float64[Array, "n d"], values: Float64[AnyArray, " r"], coordinates: Float64[Array, "n q"]
) -> Float32[Array, "R d"]:
    """U_Rᵀδ, which is diag(σ_R) V_Rᵀ."""
    left = coordinates[:, :FACTOR_ROWS] / jnp.maximum(values[:FACTOR_ROWS], np.finfo(np.float64).tiny)
    return product(left.T.astype(jnp.float32), x.astype(jnp.float32))


def view_rows(
    update: Update, kept: Float64[AnyArray, " n"], selection: Selection | None
) -> Float64[Array, "n d"]:
    """The tokens of a view of one layer."""
    if selection is None:
        return jnp.asarray(update.delta).astype(jnp.float64)
    kept = jnp.asarray(kept)
    x = (selection.attention * update.attention + selection.mlp * update.mlp).astype(jnp.float64)
    mean = product(kept, x) / jnp.maximum(kept.sum(), 1)
    return kept[:, None] * (x - selection.centred.astype(jnp.float64) * mean)


def _describe(
    x: Float64[Array, "n d"],
    kept: Float64[Array, " n"],
    products: tuple[Array, Array, Array],
    groups: Groups | None,
    spectrum: Spectrum,
    coordinates: Float64[Array, "n r"],
) -> Found:
    first = spectrum.singular_values[0]
    owned = jnp.square(coordinates[:, 0]) / jnp.maximum(jnp.square(first), np.finfo(np.float64).tiny)
    mean_energy = jnp.sum(jnp.square(x.sum(axis=0))) / jnp.maximum(kept.sum(), 1)
    resampled = factor = None
    if groups is not None:
        values = spectrum.singular_values
        resampled = _resampled(coordinates[:, :RESAMPLED_AXES], groups, values, products[0])
        if factor_shape(*x.shape):
            factor = _factor(x, values, coordinates)
    return Found(spectrum, products, owned, mean_energy, resampled, factor)


def _resampled(
    coordinates: Float64[Array, "n q"],
    groups: Groups,
    values: Float64[AnyArray, " r"],
    energies: Float64[AnyArray, " n"],
) -> Resampled:
    """From the tokens' coordinates along the leading q axes, and each token's whole energy.

    In units of σ_1, so that float32 serves an update of any size: it is enough for differences.
    """
    first, membership = jnp.linalg.norm(coordinates[:, 0]), jnp.asarray(groups.membership)
    beyond = product(membership, energies - jnp.square(coordinates).sum(axis=1))
    tail = shrunk(jnp.square(values[coordinates.shape[1] :]), beyond)
    coordinates = coordinates / jnp.where(first > 0, first, 1)
    x = coordinates.astype(jnp.float32)
    among = _by_group(x[:, :_RITZ], x, membership)
    without = jnp.square(first) * _without_groups(coordinates, membership, among)
    without = jnp.concatenate([without, tail], axis=1)
    halves = jnp.reshape(groups.halves, (-1, len(membership)))
    if not len(halves):
        return Resampled(without, jnp.zeros(0, without.dtype))
    leading = among[:, :, : among.shape[1]].reshape(len(membership), -1)
    moments = product(halves.astype(jnp.float32), leading).reshape(len(halves), *[among.shape[1]] * 2)
    found = _first_directions(x, product(halves, membership).astype(jnp.float32), moments)
    found = found.reshape(-1, *groups.halves.shape[:2])
    defined = jnp.any(found != 0, axis=0).all(axis=-1)
    cosines = jnp.abs(jnp.sum(found[..., 0] * found[..., 1], axis=0)).astype(without.dtype)
    return Resampled(without, jnp.where(defined, cosines, np.nan))


def shrunk(tail: Float64[AnyArray, " t"], beyond: Float64[Array, " G"]) -> Float64[Array, "G t"]:
    """The small λ without each group, which has so much of their sum: all shrink alike.

    They are directions with nearly nothing in them: only how much they hold together enters a figure.
    """
    share = beyond / jnp.maximum(jnp.sum(tail), np.finfo(np.float64).tiny)
    return jnp.maximum(1 - share, 0)[:, None] * tail


def _by_group(
    x: Float32[Array, "n p"], y: Float32[Array, "n q"], membership: Float64[Array, "G n"]
) -> Float32[Array, "G p q"]:
    """Σ x_i y_iᵀ over the tokens of each group.

    Tokens lie in pieces of ⌈n/G⌉, each of one group: at most 2G. That is 2/G of the work of all tokens for
    each group, however long the groups are.
    """
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


def _without_groups(
    coordinates: Float64[Array, "n q"], membership: Float64[Array, "G n"], among: Float32[Array, "G p q"]
) -> Float64[Array, "G q"]:
    """The eigenvalues of Λ - A_g, A_g = X_gᵀX_g of a group's coordinates X_g: exact within the first p axes,
    with the others by second-order perturbation.

    To first order they are λ_j - a_jj: too steady, for the axes were fitted to the group itself. Without it
    they turn. `among` are the first p rows of A_g. Of what couples the two parts, each pair moves apart as
    the eigenvalues of [[λ_j, a], [a, λ_k]] do; what one gains the other loses, equal ones nothing.
    """
    size, energies = among.shape[1], jnp.square(coordinates)
    diagonal = energies.sum(axis=0) - product(membership, energies)  # in float64: the sum is kept
    top, others = diagonal[:, :size], diagonal[:, size:]
    leading = jnp.where(np.eye(size, dtype=bool), top[:, None], -among[:, :, :size].astype(top.dtype))
    top, vectors = jax.vmap(eigh)(leading)
    along = product(jnp.swapaxes(vectors, 1, 2).astype(among.dtype), among[:, :, size:])
    gap = (top[:, :, None] - others[:, None]).astype(among.dtype) / 2
    squares = jnp.square(along)
    apart = jnp.sqrt(jnp.square(gap) + squares) + jnp.abs(gap)
    shift = (jnp.sign(gap) * squares / jnp.where(apart > 0, apart, 1)).astype(energies.dtype)
    moved = [(top + shift.sum(axis=2))[:, ::-1], others - shift.sum(axis=1)]
    return jnp.maximum(jnp.concatenate(moved, axis=1), 0)


def _first_directions(
    coordinates: Float32[Array, "n r"], weights: Float32[Array, "B n"], among: Float32[Array, "B q q"]
) -> Float32[Array, "r B"]:
    """The first eigenvector of M = XᵀWX for several W, X the tokens' coordinates; 0 where M is.

    The best within X's leading axes, where M is `among` with eigenvalues θ_1, θ_2 ..., then T_s(M/θ_2) of it
    in all of them, T_s the Chebyshev polynomial: it keeps what belongs to eigenvalues up to θ_2 below 1 and
    grows fastest beyond it, as the power M^s does far slower. θ_1/10 stands for a smaller θ_2.
    """
    values, vectors = jax.vmap(eigh)(among)
    edge = jnp.maximum(values[:, :-1].max(axis=1, initial=0), values[:, -1] / 10)
    scaled = weights.T / jnp.where(edge > 0, edge, 1)
    start = jnp.zeros((coordinates.shape[1], len(weights)), among.dtype)
    start = start.at[: among.shape[1]].set(jnp.where(values[:, -1] > 0, vectors[:, :, -1].T, 0))

    # The transpose is materialised: XLA on CPU is slow at products of one that is not.
    transposed = jax.lax.optimization_barrier(coordinates.T)

    def image(y: Array) -> Array:
        return product(transposed, scaled * product(coordinates, y))

    def step(_: Any, last: tuple[Array, Array]) -> tuple[Array, Array]:
        return last[1], 2 * image(last[1]) - last[0]

    y = jax.lax.fori_loop(1, _CHEBYSHEV_STEPS, step, (start, image(start)))[1]
    return y / jnp.maximum(jnp.linalg.norm(y, axis=0), np.finfo(np.float32).tiny)
