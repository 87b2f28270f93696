"""A layer's figures from a text that is too long to keep: its tokens' moments, and the few rows set aside.

Axes: n tokens that count, s of them set aside; B windows of a block, T tokens of each; P parts, G groups of
windows, d hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32

from jaxdelta import pooled
from jaxdelta.figures import Found, state_products
from jaxdelta.measure import CROSSED, Design, LayerFigures, ViewFigures, single_threaded_blas
from jaxdelta.moments import Bounds, Moments, accumulate, add_rows, assembled, find_frame, parts_of
from jaxdelta.pooled import Pooled, PooledFigures
from jaxdelta.spectrum import CERTIFIED
from jaxdelta.sweep import Update, Wrote
from jaxdelta.timing import Clock
from jaxdelta.views import PARTS, View, without_sinks

# Times the sinks' factor: beyond that, a state is set aside before the text's median is known.
_SUSPECT = 0.5
_FOUND_SHARE = 0.99  # of σ_1²: tokens are named as its owners where their coordinates in the frame hold it


class Windows(NamedTuple):
    """The text as it passes, block by block: which tokens count, and the group that each window is in;
    `halves` as in `figures.Groups`."""

    counted: list[Bool[np.ndarray, "B T"]]
    groups: list[Int32[np.ndarray, " B"]]
    halves: Float64[np.ndarray, "R 2 G"]


class Programs(NamedTuple):
    """What is computed of a layer where its update is, on one device or on several.

    The first four as `moments` and `figures` have them; `take`: rows of an update; `total`: the moments of
    all devices together, on one of the `devices` that solve layers, in turn; None where there is but one.
    """

    find_frame: Callable[..., Any]
    accumulate: Callable[..., Any]
    products: Callable[[Update], dict[str, jax.Array]]
    zeros: Callable[[int, int, int], Moments]
    take: Callable[[Update, np.ndarray], Update]
    total: Callable[[Moments], Moments] | None = None
    devices: int = 1


def _take(update: Update, places: Int[np.ndarray, " s"]) -> Update:
    return Update(*(jnp.take(part, places, axis=0) for part in update))


ONE_DEVICE = Programs(find_frame, accumulate, jax.jit(state_products), Moments.zeros, _take)


def parts_looked_at(views: Sequence[View]) -> tuple[str, ...]:
    """The parts of an update that any of the views is of."""
    return tuple(part for part in PARTS if any(view.part == part for view in views))


def pool_bytes(parts: int, groups: int, hidden: int) -> int:
    """What a layer's moments take, with those of the layer before, which is being solved in three matrices
    of workspace, and assembled."""
    return 8 * hidden**2 * (3 * parts * groups + 5)


def pool_layers(
    layers: Iterable[Iterable[Wrote]],
    windows: Windows,
    hidden: int,
    design: Design,
    clock: Clock,
    programs: Programs = ONE_DEVICE,
) -> Iterator[LayerFigures]:
    """`measure` of a text that is too long to keep; a layer is solved while the next one passes, on one of
    several devices while as many pass.

    Args:
        layers: what each wrote, block by block, all tokens of them.
        windows: which of them count, and how they are grouped.
        hidden: their size.
        design: what is measured.
        clock: is told the time that goes into spectra.
        programs: what runs where the updates are.
    """

    def solved(pool: Pool) -> LayerFigures:
        with clock("spectra"):
            return pool.figures()

    with single_threaded_blas(), ThreadPoolExecutor(programs.devices, "spectra") as beside:
        pending: list[Future[LayerFigures]] = []
        for blocks in layers:
            pools = [Pool(windows, hidden, design, programs) for _ in range(2)]
            for block, wrote in enumerate(blocks):
                with clock("moments"):
                    for pool, update in zip(pools, wrote, strict=True):
                        if update:
                            pool.add(block, update)
            for pool in pools[: 1 + bool(wrote.normed)]:
                if len(pending) == programs.devices:
                    yield pending.pop(0).result()
                pool.gather()
                pending.append(beside.submit(solved, pool))
            del pool, pools, wrote
        yield from (found.result() for found in pending)


class _Aside(NamedTuple):
    """Tokens whose rows are kept: their places among those that count, groups, and rows."""

    places: Int[np.ndarray, " s"]
    groups: Int[np.ndarray, " s"]
    rows: Float32[np.ndarray, "P s d"]

    def take(self, chosen: Bool[np.ndarray, " s"]) -> "_Aside":
        return _Aside(self.places[chosen], self.groups[chosen], self.rows[:, chosen])


class Pool:
    """Takes a layer's update block by block; `figures` are what `measure` finds of the whole of it.

    Beside what `figures` have of tokens at hand: tokens' own statistics of a centred view are missing, the
    mean being known only when they have gone, and owners of σ_1 where the frame does not hold v_1.
    """

    def __init__(self, windows: Windows, hidden: int, design: Design, programs: Programs = ONE_DEVICE):
        self._windows, self._design, self._programs = windows, design, programs
        self._parts = parts_looked_at(design.views)
        self._masked = any(view.masked for view in design.views)
        self._shape = len(self._parts), windows.halves.shape[2], hidden
        self._waiting: list[tuple[int, Update, dict[str, jax.Array], jax.Array, jax.Array]] = []
        self._tables: list[dict[str, np.ndarray]] = []
        self._coordinates: list[np.ndarray] = []
        self._aside: list[_Aside] = []
        self._n = 0

    _moments: Moments

    def add(self, block: int, update: Update) -> None:
        """Adds what the layer wrote into a block, all its tokens."""
        counted, groups = self._windows.counted[block], self._windows.groups[block]
        with jax.enable_x64(True):
            if block == 0:
                self._begin(update, counted)
            self._moments, *found = self._programs.accumulate(
                self._moments, self._frame, update, counted, groups, self._bounds, self._parts
            )
        self._take()  # the block before this one, which the device has done
        self._waiting.append((block, update, *found))

    def _begin(self, update: Update, counted: Bool[np.ndarray, "B T"]) -> None:
        table = self._programs.products(update)
        entering, leaving = (np.asarray(table[name]) for name in Bounds._fields)
        usual = [np.inf, np.inf]
        if self._masked:
            middles = (np.median(squares[counted.ravel()]) for squares in (entering, leaving))
            usual = [np.square(_SUSPECT * self._design.sink_factor) * middle for middle in middles]
        self._bounds = Bounds(*map(np.asarray, usual))
        within = (entering <= usual[0]) & (leaving <= usual[1])
        self._frame = self._programs.find_frame(update, counted.ravel() & within, self._parts)
        self._moments = self._programs.zeros(*self._shape)

    def _take(self) -> None:
        """Brings what is known of each token of a block to the host."""
        for block, update, table, coordinates, kept in self._waiting:
            counted = np.flatnonzero(self._windows.counted[block])
            self._tables.append({name: np.asarray(column)[counted] for name, column in table.items()})
            self._coordinates.append(np.asarray(coordinates)[:, counted])
            aside = np.flatnonzero(~np.asarray(kept).ravel()[counted])
            if len(aside):
                owners = np.repeat(self._windows.groups[block], np.asarray(kept).shape[1])[counted]
                rows = self._rows(update, counted[aside])
                self._aside.append(_Aside(self._n + aside, owners[aside], rows))
            self._n += len(counted)
        self._waiting.clear()

    def _rows(self, update: Update, places: Int[np.ndarray, " s"]) -> Float32[np.ndarray, "P s d"]:
        """The rows of these tokens; as many are taken as a power of two: few programs serve all blocks."""
        padded = np.resize(places, 1 << (len(places) - 1).bit_length())
        taken = self._programs.take(update, padded)
        return np.asarray(parts_of(taken, self._parts))[:, : len(places)]

    def gather(self) -> None:
        """Ends what several devices do together: the rest is one's."""
        if self._programs.total is not None:
            with jax.enable_x64(True):
                self._take()
                self._moments = self._programs.total(self._moments)

    def figures(self) -> LayerFigures:
        """Everything that is measured of the layer."""
        with jax.enable_x64(True):
            self._take()
            table = {name: np.concatenate([part[name] for part in self._tables]) for name in self._tables[0]}
            aside = self._set_aside()
            entering, leaving = (np.sqrt(table[name]) for name in Bounds._fields)
            sinks = np.flatnonzero(~without_sinks(entering, leaving, self._design.sink_factor))
            kept = np.ones(self._n, bool)
            kept[np.intersect1d(sinks, aside.places)] = False  # no other can be taken out again
            views = dict(self._views(table, aside, kept))
        ledger = {name: float(column.sum()) for name, column in table.items()}
        return LayerFigures({view: views[view] for view in self._design.views}, ledger)

    def _set_aside(self) -> _Aside:
        nothing = _Aside(
            np.zeros(0, int), np.zeros(0, int), np.zeros((self._shape[0], 0, self._shape[2]), "f")
        )
        places, groups, rows = zip(*[nothing, *self._aside], strict=True)
        return _Aside(np.concatenate(places), np.concatenate(groups), np.concatenate(rows, axis=1))

    def _views(
        self, table: dict[str, np.ndarray], aside: _Aside, kept: Bool[np.ndarray, " n"]
    ) -> Iterator[tuple[View, ViewFigures]]:
        squares, sums, counts = assembled(self._moments, self._frame), *map(np.array, self._moments[3:])
        without: dict[View, ViewFigures] = {}
        for masked in (True, False):
            rows = aside.take(kept[aside.places] == masked)
            squares = add_rows(squares, rows.rows, rows.groups)
            for part, row, group in zip(sums, rows.rows, [rows.groups] * len(sums), strict=True):
                np.add.at(part, group, row.astype(np.float64))
            np.add.at(counts, rows.groups, 1)
            chosen = kept if masked else np.ones_like(kept)
            for view in (view for view in self._design.views if view.masked == masked):
                same = without.get(view._replace(masked=True)) if kept.all() else None
                if same is None:
                    part = self._parts.index(view.part)
                    of = Pooled(
                        squares[part],
                        sums[part],
                        counts,
                        np.asarray(float(view.centred)),
                        self._windows.halves,
                    )
                    same = without[view] = self._view(view, of, table, aside, chosen)
                yield view, same

    def _view(
        self,
        view: View,
        of: Pooled,
        table: dict[str, np.ndarray],
        aside: _Aside,
        kept: Bool[np.ndarray, " n"],
    ) -> ViewFigures:
        found, on_host = _solved(of, self._design.basis_size(self._n, self._shape[2]))
        found = jax.tree.map(np.asarray, found)
        resampled = found.resampled if self._design.groups else None
        own = table[view.part], table["entering"], table[f"{view.part}_h"]
        owned = self._owned(view, of, found, aside, kept)
        whole = Found(
            found.spectrum, None if view.centred else own, owned, found.mean_energy, resampled, None
        )
        compared = found.crossed if self._design.groups and view in CROSSED else None
        return ViewFigures(whole, self._design.k, kept, on_host, compared)

    def _owned(
        self, view: View, of: Pooled, found: PooledFigures, aside: _Aside, kept: Bool[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"] | None:
        """Each token's share of σ_1²; None where the frame does not hold v_1."""
        part = self._parts.index(view.part)
        first, mean = found.spectrum.directions[0], np.asarray(of.mean)
        within = np.asarray(self._frame[part]) @ first
        along = np.concatenate([block[part] for block in self._coordinates]).astype(np.float64) @ within
        along[aside.places] = aside.rows[part].astype(np.float64) @ first
        energy = max(float(found.spectrum.singular_values[0]) ** 2, np.finfo(np.float64).tiny)
        shares = np.where(kept, np.square(along - mean @ first) / energy, 0)
        return shares if abs(shares.sum() - 1) <= 1 - _FOUND_SHARE else None


def _solved(of: Pooled, size: int) -> tuple[PooledFigures, bool]:
    """The figures, and whether NumPy had to solve again."""
    matrix = pooled.total(of)
    found = pooled.describe(of, matrix, *pooled.solve(matrix), size)
    if failed := not float(found.spectrum.defect) <= CERTIFIED:
        found = pooled.describe(of, matrix, *np.linalg.eigh(np.asarray(matrix)), size)
    return found, failed
