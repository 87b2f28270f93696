"""The moments of a layer over a long text, and the summaries of its views computed from them.

Axes: n counted tokens, s of them set aside; P parts, G groups, d hidden size, p directions of a frame,
c directions of a basis, q = min(d, LEADING_AXES). Functions of arrays must be traced with 64-bit types on.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from jaxdelta.spectra.channels import ChannelTable
from jaxdelta.spectra.linalg import eigh, product
from jaxdelta.spectra.moments.sums import add_rows
from jaxdelta.spectra.spectrum import MAX_RESIDUAL, orient, residual
from jaxdelta.spectra.view_summary import (
    COMPARED_VIEWS,
    FACTOR_ROWS,
    LayerSummary,
    MeasurementPlan,
    ViewSummary,
)
from jaxdelta.spectra.views import View, without_sinks
from jaxdelta.utils.arrays import AnyArray

LEADING_AXES = 128  # axes of the groups' moments
_KNOWN_SHARE = 0.99  # smallest part of σ_1² in the frame for which tokens' shares of σ_1² are reported
_TINY = np.finfo(np.float64).tiny


class ViewMoments(NamedTuple):
    """Σxxᵀ and Σx of each group's tokens, and their number; x is centred where `centred` is 1, else 0."""

    squares: Float64[AnyArray, "G d d"]
    sums: Float64[AnyArray, "G d"]
    counts: Float64[AnyArray, " G"]
    centred: Float[AnyArray, ""]

    @property
    def mean(self) -> Float64[Array, " d"]:
        """The vector subtracted from every token."""
        return jnp.asarray(self.centred) * jnp.sum(self.sums, axis=0) / jnp.maximum(jnp.sum(self.counts), 1)


class SetAsideTokens(NamedTuple):
    """Tokens whose rows are kept: positions among the counted tokens, groups, parts of the update, whole
    updates, and the states entering the layer."""

    places: Int[np.ndarray, " s"]
    groups: Int[np.ndarray, " s"]
    rows: Float32[np.ndarray, "P s d"]
    updates: Float32[np.ndarray, "s d"]
    states: Float32[np.ndarray, "s d"]

    @classmethod
    def of(cls, parts: Sequence["SetAsideTokens"]) -> "SetAsideTokens":
        """The concatenation of several."""
        places, groups, rows, updates, states = zip(*parts, strict=True)
        flat = (np.concatenate(part) for part in (updates, states))
        return cls(np.concatenate(places), np.concatenate(groups), np.concatenate(rows, axis=1), *flat)

    def take(self, chosen: Bool[np.ndarray, " s"]) -> "SetAsideTokens":
        """The chosen tokens."""
        places, groups, rows, *flat = self
        return SetAsideTokens(places[chosen], groups[chosen], rows[:, chosen], *(x[chosen] for x in flat))


class FrameCoordinates(NamedTuple):
    """A run's frame of a layer, and the coordinates of its tokens in it."""

    frame: Float64[np.ndarray, "P p d"]
    coordinates: Float32[np.ndarray, "P n p"]


@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """The moments of a layer.

    Per-token statistics of centred views are unknown, since the mean is known only after the last token, and
    so are shares of σ_1² if v_1 is not in the frame.

    Attributes:
        parts: names of the parts.
        squares: Σxxᵀ of each part and group, without the tokens set aside.
        sums: Σx of each part and group, without these tokens.
        counts: number of tokens of each group, without these tokens.
        table: `state_products` of every token.
        aside: the tokens set aside.
        located: frame and coordinates of all tokens, by run.
        channels: energies by channel, without the tokens set aside.
    """

    parts: tuple[str, ...]
    squares: Float64[AnyArray, "P G d d"]
    sums: Float64[np.ndarray, "P G d"]
    counts: Float64[np.ndarray, " G"]
    table: dict[str, Float64[np.ndarray, " n"]]
    aside: SetAsideTokens
    located: tuple[FrameCoordinates, ...]
    channels: ChannelTable

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self.table["update"]), self.sums.shape[2]

    def summary(self, plan: MeasurementPlan) -> LayerSummary:
        """The summary of every view. Consumes `squares`: call it once."""
        entering, leaving = (np.sqrt(self.table[name]) for name in ("entering", "leaving"))
        sinks = np.flatnonzero(~without_sinks(entering, leaving, plan.sink_factor))
        kept = np.ones(self.shape[0], bool)
        kept[np.intersect1d(sinks, self.aside.places)] = False  # no other sinks can be removed
        left = len(sinks) - int(np.sum(~kept))
        with jax.enable_x64(True):
            views = self._views(plan, kept, left)
        energies = {name: float(column.sum()) for name, column in self.table.items()}
        return LayerSummary({view: views[view] for view in plan.views}, energies)

    def _views(
        self, plan: MeasurementPlan, kept: Bool[np.ndarray, " n"], sinks_left: int
    ) -> dict[View, ViewSummary]:
        """The masked views come first: rows can be added to the moments, not removed."""
        squares, sums, counts = jnp.asarray(self.squares), self.sums.copy(), self.counts.copy()
        channels = self.channels
        summaries: dict[View, ViewSummary] = {}
        for masked in (True, False):
            added = self.aside.take(kept[self.aside.places] == masked)
            squares = add_rows(squares, added.rows, added.groups)
            for part, rows in zip(sums, added.rows, strict=True):
                np.add.at(part, added.groups, rows.astype(np.float64))
            np.add.at(counts, added.groups, 1)
            channels = channels.plus(added.updates, added.states)
            chosen = kept if masked else np.ones_like(kept)
            for view in (view for view in plan.views if view.masked == masked):
                same = summaries.get(view._replace(masked=True))
                if same is not None and kept.all() and not sinks_left:
                    summaries[view] = same
                    continue
                part = self.parts.index(view.part)
                moments = ViewMoments(squares[part], sums[part], counts, np.asarray(float(view.centred)))
                summary = self._view(view, moments, plan, chosen)
                summaries[view] = summary._replace(
                    channels=channels if view in COMPARED_VIEWS else None,
                    kept=chosen,
                    sinks_left=sinks_left if masked else 0,
                )
        return summaries

    def _view(
        self, view: View, moments: ViewMoments, plan: MeasurementPlan, kept: Bool[np.ndarray, " n"]
    ) -> ViewSummary:
        summary = _summary(moments, plan.basis_size(*self.shape))
        # With fewer tokens than d the other singular values are 0; float32 products leave rounding there.
        values = np.where(np.arange(self.shape[1]) < kept.sum() - view.centred, summary.singular_values, 0)
        summary = summary._replace(singular_values=values[: min(self.shape)])
        if not plan.resampled:
            summary = summary._replace(group_moments=None, group_rest=None)
        if not plan.compares(view):
            summary = summary._replace(coupling=None, factor=None)
        products = self.table[view.part], self.table["entering"], self.table[f"{view.part}_h"]
        shares = self._sigma1_shares(view, moments, summary, kept)
        return summary._replace(products=None if view.centred else products, sigma1_shares=shares)

    def _sigma1_shares(
        self, view: View, moments: ViewMoments, summary: ViewSummary, kept: Bool[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"] | None:
        """Each token's share of σ_1²; None if v_1 is not in the frame."""
        part, first, mean = self.parts.index(view.part), summary.basis[0], np.asarray(moments.mean)
        along = np.concatenate([run.coordinates[part] @ (run.frame[part] @ first) for run in self.located])
        along[self.aside.places] = self.aside.rows[part].astype(np.float64) @ first
        energy = max(float(summary.singular_values[0]) ** 2, _TINY)
        shares = np.where(kept, np.square(along - mean @ first) / energy, 0)
        return shares if abs(shares.sum() - 1) <= 1 - _KNOWN_SHARE else None


def merge(layers: Sequence[LayerMoments]) -> LayerMoments:
    """The moments of a layer over several texts together; the groups of the texts stay separate."""
    first = layers[0]
    tokens = np.cumsum([0, *(layer.shape[0] for layer in layers[:-1])])
    groups = np.cumsum([0, *(len(layer.counts) for layer in layers[:-1])])
    aside = [
        layer.aside._replace(places=layer.aside.places + n, groups=layer.aside.groups + g)
        for layer, n, g in zip(layers, tokens, groups, strict=True)
    ]
    return LayerMoments(
        first.parts,
        np.concatenate([np.asarray(layer.squares) for layer in layers], axis=1),
        np.concatenate([layer.sums for layer in layers], axis=1),
        np.concatenate([layer.counts for layer in layers]),
        {name: np.concatenate([layer.table[name] for layer in layers]) for name in first.table},
        SetAsideTokens.of(aside),
        tuple(run for layer in layers for run in layer.located),
        ChannelTable(*map(sum, zip(*(layer.channels for layer in layers), strict=True))),
    )


def _summary(moments: ViewMoments, size: int) -> ViewSummary:
    """The summary of a view without its tokens, recomputed by NumPy if the certificate fails."""
    matrix = _total(moments)
    summary = _summarise(moments, matrix, *_solve(matrix), size)
    if failed := not float(summary.certificate) <= MAX_RESIDUAL:
        summary = _summarise(moments, matrix, *np.linalg.eigh(np.asarray(matrix)), size)
    return jax.tree.map(np.asarray, summary)._replace(on_host=failed)


@jax.jit
def _total(moments: ViewMoments) -> Float64[Array, "d d"]:
    """M = Σ_g M_g, or 0 if it is not finite: some solvers never return from a NaN."""
    mean, n = moments.mean, jnp.sum(moments.counts)
    matrix = jnp.sum(moments.squares, axis=0) - n * jnp.outer(mean, mean)
    return jnp.where(jnp.isfinite(matrix).all(), matrix, 0)


_solve = jax.jit(eigh)


@partial(jax.jit, static_argnums=4)
def _summarise(
    moments: ViewMoments,
    matrix: Float64[AnyArray, "d d"],
    energies: Float64[AnyArray, " d"],
    vectors: Float64[AnyArray, "d d"],
    size: int,
) -> ViewSummary:
    """The summary with `size` directions, from eigenvalues and eigenvectors of the total moment matrix."""
    values, axes = jnp.sqrt(jnp.maximum(energies[::-1], 0)), jnp.asarray(vectors).T[::-1]
    n, centre = jnp.sum(moments.counts), moments.mean
    left = jnp.sum(moments.sums, axis=0) - n * centre
    basis = orient(axes[:size], values[:size], left, n)
    image = product(basis, jnp.asarray(matrix))
    leading = axes[: max(LEADING_AXES, size)]
    along = _products(moments, leading)
    within = product(along, leading.T)
    signs = jnp.sign(jnp.sum(basis * axes[:size], axis=1))
    return ViewSummary(
        values,
        basis,
        residual(image, values, basis, jnp.trace(matrix)),
        jnp.sum(jnp.square(left)) / jnp.maximum(n, 1),
        group_moments=within,
        group_rest=_rest(moments, within),
        coupling=(signs[:, None] * along[:, :size]).astype(jnp.float32),
        factor=(values[:FACTOR_ROWS, None] * axes[:FACTOR_ROWS]).astype(jnp.float32),
    )


def _products(moments: ViewMoments, axes: Float64[Array, "q d"]) -> Float64[Array, "G q d"]:
    """V M_g of every group; M_g is centred: Σxxᵀ - s μᵀ - μ sᵀ + n μμᵀ with s = Σx and the mean μ."""
    mean, sums = moments.mean, jnp.asarray(moments.sums)
    along_sums, along_mean = product(sums, axes.T), product(axes, mean)
    counts = jnp.asarray(moments.counts)[:, None]
    rank_one = along_sums[..., None] * mean
    other = along_mean[:, None] * (sums - counts * mean)[:, None]
    return product(axes, jnp.asarray(moments.squares)) - rank_one - other


def _rest(moments: ViewMoments, within: Float64[Array, "G q q"]) -> Float64[Array, " G"]:
    """Each group's energy outside the leading axes."""
    mean = moments.mean
    diagonal = jnp.sum(jnp.diagonal(moments.squares, axis1=1, axis2=2), axis=1)
    shifted = diagonal - 2 * product(jnp.asarray(moments.sums), mean) + moments.counts * jnp.sum(mean * mean)
    return shifted - jnp.trace(within, axis1=1, axis2=2)
