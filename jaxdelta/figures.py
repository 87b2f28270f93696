"""What is measured of one view of a layer's update: spectrum, tokens, and what resampling and overlaps need.

Axes: n tokens, d hidden size, r = min(n, d), k kept directions, G groups of documents, R divisions of them
into halves. All functions here must be traced with 64-bit types on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

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

LEADING = 16  # axes whose turning is followed when a document is left out: more than 10, for top10_frac
_FIRST_AMONG = 8  # of these a half's first direction is looked for before iterating
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
    `factor`: see Crossed, None where it is δ itself, or too few axes are known. Of a long text some products
    and shares are unknown, see `pooling`.
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
    `view_rows`, where they are known, and `solved` what `solve` found of them.
    """
    kept = jnp.asarray(kept)
    x = view_rows(update, kept, selection) if rows is None else rows
    products = token_products(x, update.h)
    # Some solvers never return from a NaN; the products keep it, for the caller to see.
    x = jnp.where(jnp.isfinite(products[0].sum()), x, 0)
    square = None if solved is None or len(x) > x.shape[1] else solved.square
    return _describe(x, kept, products, groups, square, *decompose(x, k, method, solved))


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
    return jax.jit(_describe)(x, jnp.asarray(kept), products, groups, None, *decomposed)


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
    coupling = by_group(product(x, jnp.asarray(basis, jnp.float32).T), x, jnp.asarray(groups.membership))
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
    square: Float64[AnyArray, "r r"] | None,
    spectrum: Spectrum,
    coordinates: Float64[Array, "n q"],
) -> Found:
    values = spectrum.singular_values
    owned = jnp.square(coordinates[:, 0]) / jnp.maximum(jnp.square(values[0]), np.finfo(np.float64).tiny)
    mean_energy = jnp.sum(jnp.square(x.sum(axis=0))) / jnp.maximum(kept.sum(), 1)
    resampled = factor = None
    if groups is not None:
        leading = coordinates[:, :LEADING]
        among = by_group(leading, leading, jnp.asarray(groups.membership))
        beyond = product(groups.membership, products[0]) - jnp.trace(among, axis1=1, axis2=2)
        first = leading[:, :_FIRST_AMONG], among[:, :_FIRST_AMONG, :_FIRST_AMONG]
        halves = _split_half(x, square, *first, values[0], groups)
        resampled = Resampled(without_groups(jnp.square(values), among, beyond), halves)
        shape = factor_shape(*x.shape)
        if shape and coordinates.shape[1] >= shape[0]:
            factor = _factor(x, values, coordinates)
    return Found(spectrum, products, owned, mean_energy, resampled, factor)


def without_groups(
    energies: Float64[Array, " r"], among: Float64[Array, "G q q"], beyond: Float64[Array, " G"]
) -> Float64[Array, "G r"]:
    """The eigenvalues λ of the moments without each group: of Λ - A_g, exactly within the first q axes.

    `among` are the groups' own moments A_g in those axes, `beyond` what they hold in all others. There all λ
    shrink alike: they are directions with nearly nothing in them, and only how much they hold together enters
    a figure. Within, Λ is solved anew: to first order its λ_j are λ_j - a_jj, which is too steady, for the
    axes were fitted to the group itself. Without it they turn.
    """
    q = among.shape[1]
    top = jax.vmap(eigh)(jnp.diag(energies[:q]) - among)[0][:, ::-1]
    share = beyond / jnp.maximum(jnp.sum(energies[q:]), np.finfo(np.float64).tiny)
    tail = jnp.maximum(1 - share, 0)[:, None] * energies[q:]
    return jnp.concatenate([jnp.maximum(top, 0), tail], axis=1)


def by_group(
    x: Float[Array, "n p"], y: Float[Array, "n q"], membership: Float64[Array, "G n"]
) -> Float[Array, "G p q"]:
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


def _split_half(
    x: Float64[Array, "n d"],
    square: Float64[AnyArray, "r r"] | None,
    leading: Float64[Array, "n q"],
    among: Float64[Array, "G q q"],
    first: Float64[Array, ""],
    groups: Groups,
) -> Float64[Array, " R"]:
    """|<v', v''>| of the first right singular vectors of two halves of the groups, NaN where one has none.

    With W a half's tokens, v ∝ XᵀWu, u the first eigenvector of W XXᵀ W: all in the space of the tokens. In
    units of σ_1, so that float32 serves an update of any size.
    """
    unit = jnp.where(first > 0, first, 1)
    repeats, _, count = groups.halves.shape
    if not repeats:
        return jnp.zeros(0, x.dtype)
    halves = jnp.reshape(jnp.asarray(groups.halves), (2 * repeats, count))
    tokens = product(halves, groups.membership).T.astype(jnp.float32)
    moments = product(halves, among.reshape(count, -1)).reshape(-1, *among.shape[1:]) / unit**2
    start = (leading / unit).astype(jnp.float32)
    through = _through((x / unit).astype(jnp.float32), None if square is None else square / unit**2)
    u = _first_vectors(through, tokens, start, moments.astype(jnp.float32))
    images = through(u)
    u, images = (jnp.reshape(part, (len(x), repeats, 2)) for part in (u, images))
    lengths = jnp.sqrt(jnp.sum(u * images, axis=0)).prod(axis=1)
    cosines = jnp.abs(jnp.sum(u[..., 0] * images[..., 1], axis=0)) / jnp.where(lengths > 0, lengths, 1)
    return jnp.where(lengths > 0, cosines, np.nan).astype(x.dtype)


def _through(
    x: Float32[Array, "n d"], square: Float64[AnyArray, "n n"] | None
) -> Callable[[Float32[Array, "n B"]], Float32[Array, "n B"]]:
    """y -> x xᵀ y, by whichever takes less work."""
    n, d = x.shape
    # The transpose is materialised: XLA on CPU is slow at products of one that is not.
    transposed = jax.lax.optimization_barrier(x.T)
    if n > d:
        return lambda y: product(x, product(transposed, y))
    rows = product(x, transposed) if square is None else jnp.asarray(square, jnp.float32)
    return lambda y: product(rows, y)


def _first_vectors(
    through: Callable[[Array], Array],
    tokens: Float32[Array, "n B"],
    coordinates: Float32[Array, "n q"],
    among: Float32[Array, "B q q"],
) -> Float32[Array, "n B"]:
    """The first eigenvector of W XXᵀ W for several W = diag(0 or 1), in columns; 0 where there is none.

    The best of those in X's leading axes, where XᵀWX is `among` with eigenvalues θ_1, θ_2 ..., then
    T_s(W XXᵀ W/θ_2) of it, T_s the Chebyshev polynomial: it keeps what belongs to eigenvalues up to θ_2 below
    1 and grows fastest beyond it, as a power does far slower. θ_1/10 stands for a smaller θ_2.
    """
    values, vectors = jax.vmap(eigh)(among)
    edge = jnp.maximum(values[:, :-1].max(axis=1, initial=0), values[:, -1] / 10)
    scaled = tokens / jnp.where(edge > 0, edge, 1)
    first = jnp.where(values[:, -1] > 0, vectors[:, :, -1].T, 0)
    start = tokens * product(coordinates, first)

    def step(_: Any, last: tuple[Array, Array]) -> tuple[Array, Array]:
        return last[1], 2 * scaled * through(last[1]) - last[0]

    u = jax.lax.fori_loop(1, _CHEBYSHEV_STEPS, step, (start, scaled * through(start)))[1]
    return u / jnp.maximum(jnp.linalg.norm(u, axis=0), np.finfo(np.float32).tiny)
