"""The summary of a view from the rows of a layer's update, one row per token.

Axes: n tokens, d hidden size, r = min(n, d), c basis directions, v known coordinates, G groups, R rows of
the factor. All functions here must be traced with 64-bit types on.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64

from jaxdelta.spectra.channels import channel_energies
from jaxdelta.spectra.group_moments import by_group
from jaxdelta.spectra.linalg import product
from jaxdelta.spectra.spectrum import Spectrum, decompose, solve
from jaxdelta.spectra.token_table import token_products
from jaxdelta.spectra.view_summary import COMPARED_VIEWS, FACTOR_ROWS, MeasurementPlan, ViewSummary
from jaxdelta.spectra.views import Selection, View
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import Groups
from jaxdelta.utils.arrays import AnyArray

LEADING_AXES = 48  # of the groups' moments; `split_half_cosines` gives the error
_TINY = np.finfo(np.float64).tiny


class Wanted(NamedTuple):
    """The static options of a view's summary.

    `basis`: number c of directions; `method`: see `decompose`; `channels`: with energies by channel;
    `compared`: with the arrays for the comparison of layers.
    """

    basis: int
    method: str
    channels: bool
    compared: bool

    @classmethod
    def of(cls, plan: MeasurementPlan, view: View, n: int, d: int) -> "Wanted":
        """For a view of an update of shape (n, d)."""
        return cls(plan.basis_size(n, d), plan.method, view in COMPARED_VIEWS, plan.compares(view))

    def axes(self, n: int, d: int, resampled: bool) -> int:
        """Number of eigenvectors needed: those of the basis, of the groups' moments and of the factor."""
        needed = LEADING_AXES if resampled else self.basis
        if self.compared and n > FACTOR_ROWS:
            needed = max(needed, FACTOR_ROWS)
        return max(self.basis, min(needed, n, d))


def summarise_update(
    update: Update,
    kept: Float64[AnyArray, " n"],
    selection: Selection,
    groups: Groups | None,
    wanted: Wanted,
) -> ViewSummary:
    """The summary of one view of one layer, solved in XLA. `kept` is 1 for the tokens of the view, else 0."""
    x = view_rows(update, kept, selection)
    solved = solve(finite(x), 0) if wanted.method == "gram" else None
    decomposition = decompose(finite(x), wanted.basis, wanted.method, solved)
    return summarise_rows(x, update.h, kept, decomposition, groups, wanted)


def view_rows(update: Update, kept: Float64[AnyArray, " n"], selection: Selection) -> Float64[Array, "n d"]:
    """The rows x_i of a view of one layer, 0 for tokens not `kept`."""
    kept = jnp.asarray(kept)
    x = (selection.attention * update.attention + selection.mlp * update.mlp).astype(jnp.float64)
    mean = product(kept, x) / jnp.maximum(kept.sum(), 1)
    return kept[:, None] * (x - selection.centred.astype(jnp.float64) * mean)


def finite(x: Float64[Array, "n d"]) -> Float64[Array, "n d"]:
    """x, or 0 if any element is not finite: some solvers never return from a NaN."""
    return jnp.where(jnp.isfinite(jnp.sum(jnp.square(x))), x, 0)


def summarise_rows(
    x: Float64[AnyArray, "n d"],
    h: Float32[AnyArray, "n d"],
    kept: Float64[AnyArray, " n"],
    decomposition: tuple[Spectrum, Float64[AnyArray, "n v"]],
    groups: Groups | None,
    wanted: Wanted,
) -> ViewSummary:
    """The summary of a view's rows, given the spectrum and the coordinates from `decompose`.

    The products of tokens keep NaN and infinity, which the caller checks for.
    """
    spectrum, coordinates = decomposition
    products = token_products(jnp.asarray(x), jnp.asarray(h))
    x = finite(jnp.asarray(x))
    first = jnp.maximum(jnp.square(spectrum.singular_values[0]), _TINY)
    summary = ViewSummary(
        spectrum.singular_values,
        spectrum.directions,
        spectrum.residual,
        jnp.sum(jnp.square(x.sum(axis=0))) / jnp.maximum(jnp.sum(kept), 1),
        products,
        jnp.square(coordinates[:, 0]) / first,
    )
    if wanted.channels:
        counted = jnp.where(jnp.asarray(kept)[:, None] > 0, jnp.asarray(h), 0)
        summary = summary._replace(channels=channel_energies(x, counted))
    if groups is None:
        return summary
    leading = coordinates[:, :LEADING_AXES]
    moments = by_group(leading, leading, groups.membership)
    rest = product(groups.membership, jnp.sum(jnp.square(x), axis=1)) - jnp.trace(moments, axis1=1, axis2=2)
    summary = summary._replace(group_moments=moments, group_rest=rest)
    return _with_comparison(summary, x, coordinates, groups) if wanted.compared else summary


def _with_comparison(
    summary: ViewSummary, x: Float64[AnyArray, "n d"], coordinates: Float64[AnyArray, "n v"], groups: Groups
) -> ViewSummary:
    """Adds coupling and factor, from float32 products."""
    narrow = x.astype(np.float32)
    along = product(narrow, summary.basis.astype(np.float32).T)
    coupling = by_group(along, narrow, groups.membership)
    return summary._replace(coupling=coupling, factor=factor(x, coordinates, summary.singular_values))


def factor(
    x: Float64[AnyArray, "n d"], coordinates: Float64[AnyArray, "n v"], values: Float64[AnyArray, " r"]
) -> Float32[AnyArray, "R d"]:
    """F with FᵀF = xᵀx: x itself, or, for n > R = FACTOR_ROWS, approximately U_Rᵀx = diag(σ_R) V_Rᵀ."""
    narrow = x.astype(np.float32)
    if len(x) <= FACTOR_ROWS:
        return narrow
    left = coordinates[:, :FACTOR_ROWS] / (values[:FACTOR_ROWS] + _TINY)
    return product(left.astype(np.float32).T, narrow)
