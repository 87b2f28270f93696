"""What is measured of one view of a layer's update: spectrum, tokens, and what resampling and overlaps need.

Axes: n tokens, d hidden size, r = min(n, d), k kept directions, G groups of documents, R divisions of them
into halves. All functions here must be traced with 64-bit types on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64

from jaxdelta.spectrum import (
    Spectrum,
    decompose,
    host_decompose,
    product,
    token_products,
)
from jaxdelta.sweep import Update
from jaxdelta.types import AnyArray
from jaxdelta.views import View

FACTOR_ROWS = 512

# Directions among which a half's first is looked for before the power steps, and whose turning is followed
# when a document is left out; more than 10, for top10_frac.
_RITZ = 16
_POWER_STEPS = 16


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

    def rows(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=-1)

    delta = jnp.asarray(update.delta).astype(jnp.float64)
    return {
        "entering": rows(h, h),
        "leaving": rows(h + delta, h + delta),
        "attention": rows(attention, attention),
        "mlp": rows(mlp, mlp),
        "cross": 2 * rows(attention, mlp),
        "update": rows(delta, delta),
        "update_h": rows(delta, h),
        "attention_h": rows(attention, h),
        "mlp_h": rows(mlp, h),
    }


def view_figures(
    update: Update,
    kept: Float64[AnyArray, " n"],
    selection: Selection | None,
    groups: Groups | None,
    k: int,
    method: str,
) -> Found:
    """All figures of a view of one layer; tokens that are not `kept` (0, else 1) count nothing.

    Without a selection, of the raw view: no time goes into masks and means that change nothing.
    """
    kept = jnp.asarray(kept)
    x = _rows(update, kept, selection)
    products = token_products(x, update.h)
    # Some solvers never return from a NaN; the products keep it, for the caller to see.
    x = jnp.where(jnp.isfinite(products[0].sum()), x, 0)
    return _describe(x, kept, products, groups, *decompose(x, k, method))


def host_figures(
    update: Update,
    kept: Float64[np.ndarray, " n"],
    selection: Selection | None,
    groups: Groups | None,
    k: int,
) -> Found:
    """`view_figures` with NumPy's SVD: for a spectrum whose certificate failed."""
    x = _rows(update, kept, selection)
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
    x = _rows(update, kept, selection).astype(jnp.float32)
    membership = jnp.asarray(groups.membership, jnp.float32)
    along = product(jnp.asarray(basis, jnp.float32), x.T)
    parted = (membership[:, None] * along).reshape(-1, x.shape[0])
    coupling = product(parted, x).reshape(len(membership), *basis.shape)
    return Crossed(x if factor is None else factor, coupling)


def factor_shape(n: int, d: int) -> tuple[int, int] | None:
    """The shape of a factor that is not δ itself."""
    return None if n <= FACTOR_ROWS else (min(FACTOR_ROWS, d), d)


def _factor(
    x: Float64[Array, "n d"], values: Float64[AnyArray, " r"], coordinates: Float64[Array, "n r"]
) -> Float32[Array, "R d"]:
    """U_Rᵀδ, which is diag(σ_R) V_Rᵀ."""
    left = coordinates[:, :FACTOR_ROWS] / jnp.maximum(values[:FACTOR_ROWS], np.finfo(np.float64).tiny)
    return product(left.T.astype(jnp.float32), x.astype(jnp.float32))


def _rows(
    update: Update, kept: Float64[AnyArray, " n"], selection: Selection | None
) -> Float64[Array, "n d"]:
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
        resampled = _resampled(coordinates, groups)
        if factor_shape(*x.shape):
            factor = _factor(x, spectrum.singular_values, coordinates)
    return Found(spectrum, products, owned, mean_energy, resampled, factor)


def _resampled(coordinates: Float64[Array, "n r"], groups: Groups) -> Resampled:
    membership, top = jnp.asarray(groups.membership), coordinates[:, :_RITZ]
    parted = (membership[:, None] * top.T).reshape(-1, len(top))
    among = product(parted, coordinates).reshape(len(membership), top.shape[1], -1)
    without = _without_groups(coordinates, membership, among)
    repeats, _, count = groups.halves.shape
    if not repeats:
        return Resampled(without, jnp.zeros(0, without.dtype))
    halves = jnp.reshape(groups.halves, (2 * repeats, count))
    leading = among[:, :, : top.shape[1]]
    moments = product(halves, leading.reshape(count, -1)).reshape(-1, *leading.shape[1:])
    first = _first_directions(coordinates, product(halves, membership), moments).reshape(-1, repeats, 2)
    defined = jnp.any(first != 0, axis=0).all(axis=-1)
    cosines = jnp.abs(jnp.sum(first[..., 0] * first[..., 1], axis=0))
    return Resampled(without, jnp.where(defined, cosines, np.nan))


def _without_groups(
    coordinates: Float64[Array, "n r"], membership: Float64[Array, "G n"], among: Float64[Array, "G q r"]
) -> Float64[Array, "G r"]:
    """The eigenvalues of Λ - A_g, A_g = X_gᵀX_g of a group's coordinates X_g: exact within the first q axes,
    with the others by second-order perturbation.

    To first order they are λ_j - a_jj: too steady, for the axes were fitted to the group itself. Without it
    they turn. `among` are the first q rows of A_g. Of what couples the two parts, each pair moves apart as
    the eigenvalues of [[λ_j, a], [a, λ_k]] do; what one gains the other loses, equal ones nothing.
    """
    size, energies = among.shape[1], jnp.square(coordinates)
    all_of_it = energies.sum(axis=0)
    leading = jnp.diag(all_of_it[:size]) - among[:, :, :size]
    # lax.map, not vmap: batched eigh on a CPU calls a threaded OpenBLAS from several threads (jax 39292).
    vectors, top = jax.lax.map(lambda a: tuple(jax.lax.linalg.eigh(a, symmetrize_input=False)), leading)
    others = (all_of_it - product(membership, energies))[:, size:]
    squares = jnp.square(product(jnp.swapaxes(vectors, 1, 2), among[:, :, size:]))
    gap = (top[:, :, None] - others[:, None]) / 2
    apart = jnp.sqrt(jnp.square(gap) + squares) + jnp.abs(gap)
    shift = jnp.sign(gap) * squares / jnp.where(apart > 0, apart, 1)
    moved = [(top + shift.sum(axis=2))[:, ::-1], others - shift.sum(axis=1)]
    return jnp.maximum(jnp.concatenate(moved, axis=1), 0)


def _first_directions(
    coordinates: Float64[Array, "n r"], weights: Float64[Array, "B n"], among: Float64[Array, "B q q"]
) -> Float64[Array, "r B"]:
    """The first eigenvector of XᵀWX for several W, X the tokens' coordinates: the best within X's leading
    axes, where XᵀWX is `among`, then power steps in all of them; 0 where XᵀWX is."""
    # lax.map, not vmap: batched eigh on a CPU calls a threaded OpenBLAS from several threads (jax 39292).
    start = jax.lax.map(lambda c: jax.lax.linalg.eigh(c, symmetrize_input=False)[0][:, -1], among)
    padded = jnp.zeros((coordinates.shape[1], len(weights)), start.dtype).at[: among.shape[1]].set(start.T)

    def step(_: Any, y: Array) -> Array:
        y = product(coordinates.T, weights.T * product(coordinates, y))
        return y / jnp.maximum(jnp.linalg.norm(y, axis=0), np.finfo(np.float64).tiny)

    return jax.lax.fori_loop(0, _POWER_STEPS, step, padded)
