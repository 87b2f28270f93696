"""Summaries of layers from moments: texts too long to keep their updates leave moments and a few rows.

Axes: n counted tokens, s of them set aside; B windows of a block, T tokens of each; P parts, G groups, d
hidden size.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int

from jaxdelta.spectra.moments.kernels import MomentKernels, one_device_kernels
from jaxdelta.spectra.moments.summary import FrameCoordinates, LayerMoments, SetAsideTokens
from jaxdelta.spectra.moments.sums import BlockTokens, Moments, assembled, parts_of
from jaxdelta.spectra.scheduler import Finish, Schedule, Summaries
from jaxdelta.spectra.view_summary import MeasurementPlan
from jaxdelta.spectra.views import parts_of_views
from jaxdelta.sweep.sweep import BlockUpdate, Update

_SUSPECT = 0.5  # A token is set aside if its state's norm exceeds this times the bound of sinks so far.


@dataclasses.dataclass(frozen=True)
class TextBlocks:
    """The tokens of a text by blocks of windows, and the number of their groups."""

    blocks: list[BlockTokens]
    groups: int

    @classmethod
    def of(cls, counted: list[Bool[np.ndarray, "B T"]], owners: Int[np.ndarray, " n"]) -> "TextBlocks":
        """From the mask of counted tokens of each block, and the group of every counted token."""
        ends = np.cumsum([block.sum() for block in counted])[:-1]
        filled = [np.full(block.shape, -1, np.int32) for block in counted]
        for block, mask, groups in zip(filled, counted, np.split(owners, ends), strict=True):
            block[mask] = groups
        visited = [[np.unique(window[window >= 0]) for window in block] for block in filled]
        most = max(1, *(len(groups) for block in visited for groups in block))

        def visits(block: list[np.ndarray]) -> np.ndarray:
            padded = [np.pad(groups, (0, most - len(groups)), constant_values=-1) for groups in block]
            return np.array(padded, np.int32)

        blocks = zip(counted, filled, map(visits, visited), strict=True)
        return cls([BlockTokens(*block) for block in blocks], int(owners.max()) + 1)


def moment_bytes(parts: int, groups: int, hidden: int) -> int:
    """Bytes reserved for moments: three times those of a layer, and five d×d matrices to solve one."""
    return 8 * hidden**2 * (3 * parts * groups + 5)


class MomentSummaries(Summaries):
    """Summaries from moments; every device solves one layer at a time, while the next is computed.

    `keep` is called with the number and the moments of each layer.
    """

    def __init__(
        self,
        plan: MeasurementPlan,
        finish: Finish,
        schedule: Schedule,
        text: TextBlocks,
        keep: Callable[[int, LayerMoments], None] | None = None,
        kernels: MomentKernels | None = None,
    ):
        self._kernels = kernels or one_device_kernels()
        super().__init__(self._kernels.devices, self._kernels.devices + 1)
        self._plan, self._finish, self._text, self._keep = plan, finish, text, keep
        self._clock, self._numbers = schedule.clock, itertools.count(schedule.start)

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """See `Summaries.add`."""
        accumulators = [MomentAccumulator(self._text, self._plan, self._kernels) for _ in range(2)]
        for block, updates in enumerate(layer):
            with self._clock("compute"):  # includes the layer itself: the device overlaps the two
                for accumulator, update in zip(accumulators, updates, strict=True):
                    if update:
                        accumulator.add(block, update)
        for accumulator in accumulators[: 1 + bool(updates.normed)]:
            accumulator.add_up()
            yield from self.submit(partial(self._summarise, next(self._numbers), accumulator))

    def _summarise(self, number: int, sums: "MomentAccumulator") -> list[Any]:
        with self._clock("spectra"):
            layer = sums.moments()
            if self._keep:
                self._keep(number, layer)
            return [self._finish(number, layer.summary(self._plan))]


class MomentAccumulator:
    """Accumulates a layer's update block by block into its moments."""

    def __init__(self, text: TextBlocks, plan: MeasurementPlan, kernels: MomentKernels):
        self._text, self._plan, self._kernels = text, plan, kernels
        self._parts = parts_of_views(plan.views)
        self._masked = any(view.masked for view in plan.views)
        self._waiting: list[tuple[Update, BlockTokens, Bool[np.ndarray, " m"], jax.Array]] = []
        self._tables: list[dict[str, np.ndarray]] = []
        self._coordinates: list[np.ndarray] = []
        self._aside: list[SetAsideTokens] = []
        self._n = 0

    _moments: Moments

    def add(self, block: int, update: Update) -> None:
        """Adds the update of all tokens of a block."""
        tokens = self._text.blocks[block]
        counted = np.flatnonzero(tokens.counted)
        if not len(counted):
            return
        with jax.enable_x64(True):
            table = self._kernels.products(update)
            self._tables.append({name: np.asarray(column)[counted] for name, column in table.items()})
            aside = self._suspects()
            kept = np.asarray(tokens.counted).copy()
            kept.ravel()[counted[aside]] = False
            if not hasattr(self, "_frame"):  # the first block with tokens that count
                self._frame = self._kernels.find_frame(update, kept.ravel(), self._parts)
                shape = len(self._parts), self._text.groups, update.h.shape[1]
                self._moments = self._kernels.zeros(*shape)
            self._moments, coordinates = self._kernels.add_block(
                self._moments, self._frame, update, tokens._replace(counted=kept), self._parts
            )
        self._take()  # the previous block, which the device has finished
        self._waiting.append((update, tokens, aside, coordinates))

    def _suspects(self) -> Bool[np.ndarray, " m"]:
        """Mask of the latest block's tokens that may be sinks of the whole text.

        Their squared norm, entering or leaving, exceeds a bound from the median of all tokens so far.
        """
        suspects = np.zeros(len(self._tables[-1]["entering"]), bool)
        if self._masked:
            bound = np.square(_SUSPECT * self._plan.sink_factor)
            for name in ("entering", "leaving"):
                suspects |= ~(self._tables[-1][name] <= bound * np.median(self._column(name)))
        return suspects

    def _column(self, name: str) -> Float64[np.ndarray, " m"]:
        """A column of the table of all tokens so far."""
        return np.concatenate([table[name] for table in self._tables])

    def _take(self) -> None:
        """Moves the coordinates and the set-aside rows of a block to the host."""
        for update, tokens, aside, coordinates in self._waiting:
            counted, chosen = np.flatnonzero(tokens.counted), np.flatnonzero(aside)
            self._coordinates.append(np.asarray(coordinates)[:, counted])
            if len(chosen):
                owners = np.asarray(tokens.owners).ravel()[counted[chosen]]
                rows = self._rows(update, counted[chosen])
                self._aside.append(SetAsideTokens(self._n + chosen, owners, *rows))
            self._n += len(counted)
        self._waiting.clear()

    def _rows(self, update: Update, places: Int[np.ndarray, " s"]) -> tuple[np.ndarray, ...]:
        """Parts, updates and states of these tokens, padded to a power of two: few programs compile."""
        padded = np.resize(places, 1 << (len(places) - 1).bit_length())
        taken = self._kernels.take(update, padded)
        parts = np.asarray(parts_of(taken, self._parts))[:, : len(places)]
        return parts, *(np.asarray(rows)[: len(places)] for rows in (taken.delta, taken.h))

    def add_up(self) -> None:
        """Sums over devices; on the thread of the pass, since all devices must do so in one order."""
        if self._kernels.total is not None:
            with jax.enable_x64(True):
                self._take()
                self._moments = self._kernels.total(self._moments)

    def moments(self) -> LayerMoments:
        """The moments of the layer, after its last block."""
        with jax.enable_x64(True):
            self._take()
            squares = assembled(*self._moments[:3], self._frame)
        nothing = np.zeros(0, int)
        hidden = self._moments.sums.shape[2]
        rows, flat = np.zeros((len(self._parts), 0, hidden), np.float32), np.zeros((0, hidden), np.float32)
        return LayerMoments(
            self._parts,
            squares,
            np.asarray(self._moments.sums),
            np.asarray(self._moments.counts),
            {name: self._column(name) for name in self._tables[0]},
            SetAsideTokens.of([SetAsideTokens(nothing, nothing, rows, flat, flat), *self._aside]),
            (FrameCoordinates(np.asarray(self._frame), np.concatenate(self._coordinates, axis=1)),),
            jax.tree.map(np.asarray, self._moments.channels),
        )
