"""A layer's figures from a text that is too long to keep: its tokens' moments, and the few rows set aside.

Axes: n tokens that count, s of them set aside; B windows of a block, T tokens of each; P parts, G groups of
windows, d hidden size.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32

from jaxdelta.spectra.linalg import single_threaded_blas
from jaxdelta.spectra.moments.summary import Aside, Gathered, Located
from jaxdelta.spectra.moments.sums import Bounds, Moments, accumulate, assembled, find_frame, parts_of
from jaxdelta.spectra.token_table import state_products
from jaxdelta.spectra.view_summary import Design, LayerFigures
from jaxdelta.spectra.views import parts_looked_at
from jaxdelta.sweep.sweep import Update, Wrote
from jaxdelta.utils.timing import Clock

# Times the sinks' factor: beyond that, a state is set aside before the text's median is known.
_SUSPECT = 0.5


class Windows(NamedTuple):
    """The text as it passes, block by block: which tokens count, and the group that each window is in;
    `halves` as in `documents.Groups`."""

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
    keep: Callable[[int, Gathered], None] | None = None,
    programs: Programs = ONE_DEVICE,
    start: int = 0,
) -> Iterator[LayerFigures]:
    """`measure` of a text that is too long to keep; a layer is solved while the next one passes, or, where
    several devices solve them in turn, while as many pass.

    Args:
        layers: what each wrote, block by block, all tokens of them.
        windows: which of them count, and how they are grouped.
        hidden: their size.
        design: what is measured.
        clock: is told the time that goes into spectra, and into moments as `compute`.
        keep: is called with every layer's number, and the next number for the last one normed, and what is
            kept of it.
        programs: what runs where the updates are.
        start: the first layer's number.
    """
    numbers = itertools.count(start)

    def solved(pool: Pool, number: int) -> LayerFigures:
        with clock("spectra"):
            layer = pool.gathered()
            if keep:
                keep(number, layer)
            return layer.figures(design, windows.halves)

    with single_threaded_blas(), ThreadPoolExecutor(programs.devices, "spectra") as beside:
        pending: list[Future[LayerFigures]] = []
        for blocks in layers:
            pools = [Pool(windows, hidden, design, programs) for _ in range(2)]
            for block, wrote in enumerate(blocks):
                with clock("compute"):  # the device does one with the other
                    for pool, update in zip(pools, wrote, strict=True):
                        if update:
                            pool.add(block, update)
            for pool in pools[: 1 + bool(wrote.normed)]:
                if len(pending) == programs.devices:
                    yield pending.pop(0).result()
                pool.add_up()
                pending.append(beside.submit(solved, pool, next(numbers)))
            del pool, pools, wrote
        yield from (found.result() for found in pending)


class Pool:
    """Takes a layer's update block by block, and gives what is kept of all of it."""

    def __init__(self, windows: Windows, hidden: int, design: Design, programs: Programs = ONE_DEVICE):
        self._windows, self._design, self._programs = windows, design, programs
        self._parts = parts_looked_at(design.views)
        self._masked = any(view.masked for view in design.views)
        self._shape = len(self._parts), windows.halves.shape[2], hidden
        self._waiting: list[tuple[int, Update, dict[str, jax.Array], jax.Array, jax.Array]] = []
        self._tables: list[dict[str, np.ndarray]] = []
        self._coordinates: list[np.ndarray] = []
        self._aside: list[Aside] = []
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
                self._aside.append(Aside(self._n + aside, owners[aside], rows))
            self._n += len(counted)
        self._waiting.clear()

    def _rows(self, update: Update, places: Int[np.ndarray, " s"]) -> Float32[np.ndarray, "P s d"]:
        """The rows of these tokens; as many are taken as a power of two: few programs serve all blocks."""
        padded = np.resize(places, 1 << (len(places) - 1).bit_length())
        taken = self._programs.take(update, padded)
        return np.asarray(parts_of(taken, self._parts))[:, : len(places)]

    def add_up(self) -> None:
        """Ends what several devices do together: they must all do that in one order, and so on one thread."""
        if self._programs.total is not None:
            with jax.enable_x64(True):
                self._take()
                self._moments = self._programs.total(self._moments)

    def gathered(self) -> Gathered:
        """Everything, when all blocks have come."""
        with jax.enable_x64(True):
            self._take()
            squares = assembled(*self._moments[:3], self._frame)
        places = np.zeros(0, int)
        nothing = Aside(places, places, np.zeros((self._shape[0], 0, self._shape[2]), np.float32))
        return Gathered(
            self._parts,
            squares,
            np.asarray(self._moments.sums),
            np.asarray(self._moments.counts),
            {name: np.concatenate([part[name] for part in self._tables]) for name in self._tables[0]},
            Aside.of([nothing, *self._aside]),
            (Located(np.asarray(self._frame), np.concatenate(self._coordinates, axis=1)),),
        )
