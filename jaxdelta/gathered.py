"""What is kept of a layer's pass over a long text, and the figures that follow from it.

Axes: n tokens that count, s of them set aside; P parts, G groups of windows, d hidden size, p directions of a
frame. Texts of several runs follow each other in every array (`merge`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from jaxdelta import pooled
from jaxdelta.figures import Found
from jaxdelta.measure import CROSSED, Design, LayerFigures, ViewFigures
from jaxdelta.moments import add_rows
from jaxdelta.pooled import Pooled, PooledFigures
from jaxdelta.spectrum import CERTIFIED
from jaxdelta.types import AnyArray
from jaxdelta.views import PARTS, View, without_sinks

_FOUND_SHARE = 0.99  # of σ_1²: tokens are named as its owners where their coordinates in the frame hold it


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


def parts_looked_at(views: Sequence[View]) -> tuple[str, ...]:
    """The parts of an update that any of the views is of."""
    return tuple(part for part in PARTS if any(view.part == part for view in views))


def _solved(of: Pooled, size: int) -> tuple[PooledFigures, bool]:
    """The figures, and whether NumPy had to solve again."""
    matrix = pooled.total(of)
    found = pooled.describe(of, matrix, *pooled.solve(matrix), size)
    if failed := not float(found.spectrum.defect) <= CERTIFIED:
        found = pooled.describe(of, matrix, *np.linalg.eigh(np.asarray(matrix)), size)
    return found, failed
