"""What is kept of a layer's pass over a long text, and the figures that follow from it.

Axes: n tokens that count, s of them set aside; P parts, G groups of windows, d hidden size, p directions of a
frame. Texts of several runs follow each other in every array (`merge`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from jaxdelta.spectra.group_moments import FACTOR_ROWS, Crossed, Resampled, without_groups
from jaxdelta.spectra.linalg import eigh, product
from jaxdelta.spectra.moments.sums import add_rows
from jaxdelta.spectra.spectrum import CERTIFIED, Spectrum, defect, orient
from jaxdelta.spectra.view_summary import CROSSED, Design, Found, LayerFigures, ViewFigures
from jaxdelta.spectra.views import View, without_sinks
from jaxdelta.utils.arrays import AnyArray

_FOUND_SHARE = 0.99  # of σ_1²: tokens are named as its owners where their coordinates in the frame hold it
LEADING = 128


class Pooled(NamedTuple):
    """Of a view: Σxxᵀ and Σx of each group's tokens, x less `centred` (0 or 1) times the mean of all; how
    many they are; how the groups are divided, see `documents.Groups`."""

    squares: Float64[AnyArray, "G d d"]
    sums: Float64[AnyArray, "G d"]
    counts: Float64[AnyArray, " G"]
    centred: Float[AnyArray, ""]
    halves: Float64[AnyArray, "R 2 G"]

    @property
    def mean(self) -> Float64[Array, " d"]:
        """What is taken from every token."""
        return jnp.asarray(self.centred) * jnp.sum(self.sums, axis=0) / jnp.maximum(jnp.sum(self.counts), 1)


class PooledFigures(NamedTuple):
    """What the device finds of a view without its tokens: see `figures.Found`."""

    spectrum: Spectrum
    mean_energy: Float64[AnyArray, ""]
    resampled: Resampled
    crossed: Crossed


class Aside(NamedTuple):
    """Tokens whose rows are kept: their places among those that count, groups, and rows."""

    places: Int[np.ndarray, " s"]
    groups: Int[np.ndarray, " s"]
    rows: Float32[np.ndarray, "P s d"]

    @classmethod
    def of(cls, parts: Sequence["Aside"]) -> "Aside":
        """All of these."""
        places, groups, rows = zip(*parts, strict=True)
        return cls(np.concatenate(places), np.concatenate(groups), np.concatenate(rows, axis=1))

    def take(self, chosen: Bool[np.ndarray, " s"]) -> "Aside":
        """Those of them that are `chosen`."""
        return Aside(self.places[chosen], self.groups[chosen], self.rows[:, chosen])


class Located(NamedTuple):
    """The coordinates of a run's tokens in the frame that it found for the layer."""

    frame: Float64[np.ndarray, "P p d"]
    coordinates: Float32[np.ndarray, "P n p"]


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A layer's moments: Σxxᵀ and Σx of each part and group and its tokens' number, all but those set aside;
    every token's `figures.state_products`; those set aside; where the tokens are, by run.

    Beside what `figures` have of tokens at hand: tokens' own statistics of a centred view are missing, the
    mean being known only when they have gone, and owners of σ_1 where the frame does not hold v_1.
    """

    parts: tuple[str, ...]
    squares: Float64[AnyArray, "P G d d"]
    sums: Float64[np.ndarray, "P G d"]
    counts: Float64[np.ndarray, " G"]
    table: dict[str, Float64[np.ndarray, " n"]]
    aside: Aside
    located: tuple[Located, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self.table["update"]), self.sums.shape[2]

    def figures(self, design: Design, halves: Float64[np.ndarray, "R 2 G"]) -> LayerFigures:
        """Everything that is measured of the layer, `halves`: see `documents.Groups`. Uses the squares up."""
        with jax.enable_x64(True):
            entering, leaving = (np.sqrt(self.table[name]) for name in ("entering", "leaving"))
            sinks = np.flatnonzero(~without_sinks(entering, leaving, design.sink_factor))
            kept = np.ones(self.shape[0], bool)
            kept[np.intersect1d(sinks, self.aside.places)] = False  # no other can be taken out again
            views = dict(self._views(design, halves, kept))
        ledger = {name: float(column.sum()) for name, column in self.table.items()}
        return LayerFigures({view: views[view] for view in design.views}, ledger)

    def _views(
        self, design: Design, halves: Float64[np.ndarray, "R 2 G"], kept: Bool[np.ndarray, " n"]
    ) -> Iterator[tuple[View, ViewFigures]]:
        """First the masked ones: what is added to the moments is not taken out again."""
        squares, sums, counts = jnp.asarray(self.squares), self.sums.copy(), self.counts.copy()
        found: dict[View, ViewFigures] = {}
        for masked in (True, False):
            added = self.aside.take(kept[self.aside.places] == masked)
            squares = add_rows(squares, added.rows, added.groups)
            for part, rows in zip(sums, added.rows, strict=True):
                np.add.at(part, added.groups, rows.astype(np.float64))
            np.add.at(counts, added.groups, 1)
            chosen = kept if masked else np.ones_like(kept)
            for view in (view for view in design.views if view.masked == masked):
                same = found.get(view._replace(masked=True)) if kept.all() else None
                if same is None:
                    part = self.parts.index(view.part)
                    centred = np.asarray(float(view.centred))
                    of = Pooled(squares[part], sums[part], counts, centred, halves)
                    same = found[view] = self._view(view, of, design, chosen)
                yield view, same

    def _view(self, view: View, of: Pooled, design: Design, kept: Bool[np.ndarray, " n"]) -> ViewFigures:
        found, on_host = _solved(of, design.basis_size(*self.shape))
        found = jax.tree.map(np.asarray, found)
        resampled = found.resampled if design.groups else None
        own = self.table[view.part], self.table["entering"], self.table[f"{view.part}_h"]
        products = None if view.centred else own
        owned = self._owned(view, of, found, kept)
        compared = found.crossed if design.groups and view in CROSSED else None
        whole = Found(found.spectrum, products, owned, found.mean_energy, resampled, compared)
        return ViewFigures(whole, design.k, kept, on_host)

    def _owned(
        self, view: View, of: Pooled, found: PooledFigures, kept: Bool[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"] | None:
        """Each token's share of σ_1²; None where the frame does not hold v_1."""
        part, first, mean = self.parts.index(view.part), found.spectrum.directions[0], np.asarray(of.mean)
        along = np.concatenate([run.coordinates[part] @ (run.frame[part] @ first) for run in self.located])
        along[self.aside.places] = self.aside.rows[part].astype(np.float64) @ first
        energy = max(float(found.spectrum.singular_values[0]) ** 2, np.finfo(np.float64).tiny)
        shares = np.where(kept, np.square(along - mean @ first) / energy, 0)
        return shares if abs(shares.sum() - 1) <= 1 - _FOUND_SHARE else None


def merge(layers: Sequence[Gathered]) -> Gathered:
    """The same layer over several texts, as over all of them; each keeps its groups."""
    first = layers[0]
    tokens = np.cumsum([0, *(layer.shape[0] for layer in layers[:-1])])
    groups = np.cumsum([0, *(len(layer.counts) for layer in layers[:-1])])
    aside = [
        Aside(layer.aside.places + n, layer.aside.groups + g, layer.aside.rows)
        for layer, n, g in zip(layers, tokens, groups, strict=True)
    ]
    return Gathered(
        first.parts,
        np.concatenate([np.asarray(layer.squares) for layer in layers], axis=1),
        np.concatenate([layer.sums for layer in layers], axis=1),
        np.concatenate([layer.counts for layer in layers]),
        {name: np.concatenate([layer.table[name] for layer in layers]) for name in first.table},
        Aside.of(aside),
        tuple(run for layer in layers for run in layer.located),
    )


def _solved(of: Pooled, size: int) -> tuple[PooledFigures, bool]:
    """The figures, and whether NumPy had to solve again."""
    matrix = total(of)
    found = describe(of, matrix, *solve(matrix), size)
    if failed := not float(found.spectrum.defect) <= CERTIFIED:
        found = describe(of, matrix, *np.linalg.eigh(np.asarray(matrix)), size)
    return found, failed


@jax.jit
def total(pooled: Pooled) -> Float64[Array, "d d"]:
    """M = Σ_g M_g; 0 where it is not finite: some solvers never return from a NaN."""
    mean, n = pooled.mean, jnp.sum(pooled.counts)
    matrix = jnp.sum(pooled.squares, axis=0) - n * jnp.outer(mean, mean)
    return jnp.where(jnp.isfinite(matrix).all(), matrix, 0)


@jax.jit
def solve(matrix: Float64[AnyArray, "d d"]) -> tuple[Float64[Array, " d"], Float64[Array, "d d"]]:
    """Eigenvalues and, in columns, eigenvectors, ascending."""
    return eigh(jnp.asarray(matrix))


@partial(jax.jit, static_argnums=4)
def describe(
    pooled: Pooled,
    matrix: Float64[AnyArray, "d d"],
    energies: Float64[AnyArray, " d"],
    vectors: Float64[AnyArray, "d d"],
    size: int,
) -> PooledFigures:
    """All figures of a view, `size` directions of it, from the solution of its total."""
    values, axes = jnp.sqrt(jnp.maximum(energies[::-1], 0)), jnp.asarray(vectors).T[::-1]
    n, centre = jnp.sum(pooled.counts), pooled.mean
    left = jnp.sum(pooled.sums, axis=0) - n * centre
    basis = orient(axes[:size], values[:size], left, n)
    image = product(basis, jnp.asarray(matrix))
    spectrum = Spectrum(values, basis, defect(image, values, basis, jnp.trace(matrix)))
    leading = axes[: max(LEADING, size)]
    along = _products(pooled, leading)
    within = product(along, leading.T)
    factor = (values[:FACTOR_ROWS, None] * axes[:FACTOR_ROWS]).astype(jnp.float32)
    signs = jnp.sign(jnp.sum(basis * axes[:size], axis=1))
    coupling = (signs[:, None] * along[:, :size]).astype(jnp.float32)
    return PooledFigures(
        spectrum,
        jnp.sum(jnp.square(left)) / jnp.maximum(n, 1),
        Resampled(
            without_groups(jnp.square(values), within, _beyond(pooled, within)), _split_half(pooled, within)
        ),
        Crossed(factor, coupling),
    )


def _products(pooled: Pooled, axes: Float64[Array, "q d"]) -> Float64[Array, "G q d"]:
    """V M_g of every group, its tokens less the mean: M_g - s μᵀ - μ sᵀ + n μμᵀ."""
    mean, sums = pooled.mean, jnp.asarray(pooled.sums)
    along_sums, along_mean = product(sums, axes.T), product(axes, mean)
    counts = jnp.asarray(pooled.counts)[:, None]
    rank_one = along_sums[..., None] * mean
    other = along_mean[:, None] * (sums - counts * mean)[:, None]
    return product(axes, jnp.asarray(pooled.squares)) - rank_one - other


def _beyond(pooled: Pooled, within: Float64[Array, "G q q"]) -> Float64[Array, " G"]:
    """What each group holds outside of the leading axes."""
    mean = pooled.mean
    diagonal = jnp.sum(jnp.diagonal(pooled.squares, axis1=1, axis2=2), axis=1)
    shifted = diagonal - 2 * product(jnp.asarray(pooled.sums), mean) + pooled.counts * jnp.sum(mean * mean)
    return shifted - jnp.trace(within, axis1=1, axis2=2)


def _split_half(pooled: Pooled, within: Float64[Array, "G q q"]) -> Float64[Array, " R"]:
    repeats, _, groups = pooled.halves.shape
    if not repeats:
        return jnp.zeros(0, within.dtype)
    halves = product(jnp.reshape(pooled.halves, (2 * repeats, groups)), within.reshape(groups, -1))
    values, vectors = eigh(halves.reshape(-1, *within.shape[1:]))
    first = vectors[:, :, -1].reshape(repeats, 2, -1)
    cosines = jnp.abs(jnp.sum(first[:, 0] * first[:, 1], axis=-1))
    return jnp.where((values[:, -1] > 0).reshape(repeats, 2).all(axis=1), cosines, np.nan)
