"""What is measured of one view of a layer's update: spectrum, tokens, and what resampling and overlaps need.

Axes: n tokens, d hidden size, r = min(n, d), k kept directions, q of which coordinates are known. All
functions here must be traced with 64-bit types on.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64

from jaxdelta.spectra.group_moments import crossed, resampled
from jaxdelta.spectra.linalg import product
from jaxdelta.spectra.spectrum import Solved, Spectrum, decompose, host_decompose, solve
from jaxdelta.spectra.token_table import token_products
from jaxdelta.spectra.view_summary import Found
from jaxdelta.spectra.views import Selection
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import Groups
from jaxdelta.utils.arrays import AnyArray


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


def view_figures(
    update: Update,
    kept: Float64[AnyArray, " n"],
    selection: Selection | None,
    groups: Groups | None,
    k: int,
    method: str,
    compared: bool,
) -> Found:
    """All figures of a view of one layer; tokens that are not `kept` (0, else 1) count nothing.

    Without a selection, of the raw view: no time goes into masks and means that change nothing.
    """
    x = view_rows(update, kept, selection)
    solved = solve(_finite(x), k) if method == "gram" else None
    found, coordinates = spectral_figures(x, update.h, kept, solved, k, method)
    return with_documents(found, _finite(x), solved, coordinates, groups, compared)


def spectral_figures(
    x: Float64[Array, "n d"],
    h: Float32[AnyArray, "n d"],
    kept: Float64[AnyArray, " n"],
    solved: Solved | None,
    k: int,
    method: str,
) -> tuple[Found, Float64[Array, "n q"]]:
    """The figures of a view's rows that tell nothing of documents, and the tokens' coordinates along V.

    `solved`: what `solve` found of them, for `method` gram.
    """
    return _found(x, h, kept, *decompose(_finite(x), k, method, solved))


def with_documents(
    found: Found,
    x: Float64[AnyArray, "n d"],
    solved: Solved | None,
    coordinates: Float64[AnyArray, "n q"],
    groups: Groups | None,
    compared: bool,
) -> Found:
    """What was found of rows, with all that the drawing of documents needs of them: by NumPy of NumPy's."""
    if groups is None or found.products is None:
        return found
    square = solved.square if solved is not None and len(x) <= x.shape[1] else None
    drawn = resampled(x, found.products[0], square, found.spectrum, coordinates, groups)
    across = crossed(x, found.spectrum, coordinates, groups) if compared else None
    return found._replace(resampled=drawn, crossed=across)


def host_figures(
    update: Update,
    kept: Float64[np.ndarray, " n"],
    selection: Selection | None,
    groups: Groups | None,
    k: int,
    compared: bool,
) -> Found:
    """`view_figures` with NumPy's SVD: for a spectrum whose certificate failed."""
    x = view_rows(update, kept, selection)
    found = _found(x, update.h, kept, *host_decompose(np.asarray(x), k))
    found, coordinates = jax.tree.map(np.asarray, found)
    return with_documents(found, np.asarray(x), None, coordinates, groups, compared)


def _finite(x: Float64[Array, "n d"]) -> Float64[Array, "n d"]:
    """Zero where not: some solvers never return from a NaN. The products keep it, for the caller to see."""
    return jnp.where(jnp.isfinite(jnp.sum(jnp.square(x))), x, 0)


def _found(
    x: Float64[Array, "n d"],
    h: Float32[AnyArray, "n d"],
    kept: Float64[AnyArray, " n"],
    spectrum: Spectrum,
    coordinates: Float64[Array, "n q"],
) -> tuple[Found, Float64[Array, "n q"]]:
    first = jnp.maximum(jnp.square(spectrum.singular_values[0]), np.finfo(np.float64).tiny)
    mean_energy = jnp.sum(jnp.square(_finite(x).sum(axis=0))) / jnp.maximum(jnp.sum(kept), 1)
    owned = jnp.square(coordinates[:, 0]) / first
    return Found(spectrum, token_products(x, jnp.asarray(h)), owned, mean_energy), coordinates
