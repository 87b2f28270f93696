"""Summaries of many layers from their rows: on a CPU side by side on its cores, elsewhere in batches."""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxdelta.spectra.from_rows import Wanted, factor, finite, summarise_rows, summarise_update, view_rows
from jaxdelta.spectra.linalg import single_threaded_blas
from jaxdelta.spectra.spectrum import MAX_RESIDUAL, Solved, decompose, host_decompose, solve
from jaxdelta.spectra.token_table import state_products
from jaxdelta.spectra.view_summary import FACTOR_ROWS, LayerSummary, MeasurementPlan, ViewSummary
from jaxdelta.spectra.views import Selection, View, without_sinks
from jaxdelta.sweep.sweep import BlockUpdate, Update, concatenate_blocks
from jaxdelta.text.groups import Groups
from jaxdelta.utils.timing import Clock

_WORKSPACE_BYTES = 4 << 30

# finish(layer's number, its summary): what is kept of a layer; called while later layers pass.
Finish = Callable[[int, LayerSummary], Any]
Kept = Float64[np.ndarray, " n"]  # 1 for tokens that a view has, else 0
BatchCall = Callable[..., list[Any]]  # call(function, each layer's arguments, common ones, static ones)


@runtime_checkable
class Summaries(Protocol):
    """Takes the layers as they pass and gives, in their order, what `finish` makes of their summaries.

    The last layer with the final norm counts as one more layer.
    """

    def __enter__(self) -> "Summaries":
        """Starts the threads."""

    def __exit__(self, *exception: Any) -> None:
        """Ends the threads."""

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """Takes a layer, block by block; yields what is ready."""

    def rest(self) -> Iterator[Any]:
        """Yields what is left when all layers have passed."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many layers are summarised at once, how many may wait, and the number of the first one."""

    at_once: int
    pending: int
    start: int = 0
    clock: Clock = dataclasses.field(default_factory=Clock)


class Workers:
    """Threads whose results come in the order in which their work was handed over."""

    def __init__(self, threads: int, pending: int):
        self._threads, self._most = threads, pending
        self._pending: deque[Future[list[Any]]] = deque()

    def __enter__(self) -> Any:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(single_threaded_blas())
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads, "spectra"))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def submit(self, work: Callable[[], list[Any]]) -> Iterator[Any]:
        """Hands work over; yields the oldest results where too many are pending."""
        self._pending.append(self._pool.submit(work))
        while len(self._pending) >= self._most:
            yield from self._pending.popleft().result()

    def ready(self) -> Iterator[Any]:
        """Yields the oldest results that are there, without waiting."""
        while self._pending and self._pending[0].done():
            yield from self._pending.popleft().result()

    def rest(self) -> Iterator[Any]:
        """Yields all results that are pending."""
        while self._pending:
            yield from self._pending.popleft().result()


class ThreadedSummaries(Workers):
    """Each layer on a thread, whose linear algebra runs on one core.

    One layer's matrices are too small to share out well over all cores.
    """

    def __init__(self, plan: MeasurementPlan, finish: Finish, schedule: Schedule, groups: Groups | None):
        super().__init__(schedule.at_once, schedule.pending)
        self._plan, self._finish, self._schedule = plan, finish, schedule
        self._solver = OneByOne(groups)
        self._numbers, self._compiled = itertools.count(schedule.start), threading.Event()

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """Takes a layer, block by block; yields what is ready."""
        for update in concatenate_blocks([layer]):
            yield from self.submit(partial(self._summarise, next(self._numbers), update))

    def _summarise(self, number: int, update: Update) -> list[Any]:
        if number > self._schedule.start:  # The first layer compiles; else each would compile the same.
            self._compiled.wait()
        try:
            with self._schedule.clock("spectra"), jax.enable_x64(True):
                (summary,) = summarise_batch([update], self._plan, self._solver)
                return [self._finish(number, summary)]
        finally:
            self._compiled.set()


class BatchedSummaries(Workers):
    """Batches of layers, each in one call: one layer's matrices leave an accelerator nearly idle.

    A batch is solved while later layers pass. Several devices must launch the same programs in the same
    order, so there the pass waits for the batch.
    """

    def __init__(self, plan: MeasurementPlan, finish: Finish, schedule: Schedule, solver: "Solver"):
        super().__init__(1, 2)
        self._plan, self._finish, self._schedule, self._solver = plan, finish, schedule, solver
        self._numbers = itertools.count(schedule.start)
        self._batch: list[Update] = []

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """Takes a layer, block by block; yields what is ready."""
        for update in concatenate_blocks([layer]):
            self._batch.append(update)
            yield from self.ready()
            if len(self._batch) == self._schedule.at_once:
                yield from self._flush()

    def rest(self) -> Iterator[Any]:
        """Yields what is left when all layers have passed."""
        if self._batch:
            yield from self._flush()
        yield from super().rest()

    def _flush(self) -> Iterator[Any]:
        work = partial(self._summarise, self._batch)
        self._batch = []
        if self._solver.in_turn:
            yield from work()
        else:
            yield from self.submit(work)

    def _summarise(self, batch: list[Update]) -> list[Any]:
        with self._schedule.clock("spectra"), jax.enable_x64(True):
            summaries = summarise_batch(batch, self._plan, self._solver)
            return [self._finish(next(self._numbers), summary) for summary in summaries]


@runtime_checkable
class Solver(Protocol):
    """Computes token products and view summaries of several layers."""

    @property
    def in_turn(self) -> bool:
        """Whether it must run on the thread of the pass."""

    @property
    def groups(self) -> Groups | None:
        """The groups of the tokens; None where nothing is resampled."""

    def products(self, batch: Sequence[Update]) -> list[dict[str, np.ndarray]]:
        """`state_products` of each layer."""

    def summaries(
        self, rows: Sequence[tuple[Update, Kept]], view: View, plan: MeasurementPlan
    ) -> list[ViewSummary]:
        """The summary of a view of each layer, of its kept tokens (1, else 0)."""


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """On a CPU: LAPACK finds only the eigenvectors needed, between two compiled functions."""

    groups: Groups | None = None
    in_turn: bool = False

    def products(self, batch: Sequence[Update]) -> list[dict[str, np.ndarray]]:
        """`state_products` of each layer."""
        return [jax.tree.map(np.asarray, _products(update)) for update in batch]

    def summaries(
        self, rows: Sequence[tuple[Update, Kept]], view: View, plan: MeasurementPlan
    ) -> list[ViewSummary]:
        """The summary of a view of each layer, of its kept tokens (1, else 0)."""
        return [self._summary(update, kept, view, plan) for update, kept in rows]

    def _summary(self, update: Update, kept: Kept, view: View, plan: MeasurementPlan) -> ViewSummary:
        x = _view_rows(update, kept, Selection.of(view))
        n, d = x.shape
        wanted = Wanted.of(plan, view, n, d)
        axes = wanted.axes(n, d, plan.resampled)
        solved = solve(np.asarray(x), axes) if wanted.method == "gram" else None
        found, coordinates = _summarise_solved(x, update.h, kept, solved, self.groups, wanted)
        summary = jax.tree.map(np.asarray, found)
        if summary.factor is None or n <= FACTOR_ROWS:
            return summary
        # By BLAS, on one core as the rest of the thread's linear algebra.
        rows = np.asarray(finite(x))
        return summary._replace(factor=factor(rows, np.asarray(coordinates), summary.singular_values))


@dataclasses.dataclass(frozen=True)
class Batched:
    """On accelerators: one call for all layers of a batch.

    A batch is filled up to `at_once` layers, so that nothing compiles twice. A view that few of its layers
    need is computed for as many as the devices take in one turn, `devices`.
    """

    at_once: int
    call: BatchCall
    groups: Groups | None = None
    devices: int = 1
    in_turn: bool = False

    def products(self, batch: Sequence[Update]) -> list[dict[str, np.ndarray]]:
        """`state_products` of each layer."""
        return self._filled(state_products, [(update,) for update in batch], (), ())

    def summaries(
        self, rows: Sequence[tuple[Update, Kept]], view: View, plan: MeasurementPlan
    ) -> list[ViewSummary]:
        """The summary of a view of each layer, of its kept tokens."""
        wanted = Wanted.of(plan, view, *rows[0][0].h.shape)
        return self._filled(summarise_update, rows, (Selection.of(view), self.groups), (wanted,))

    def _filled(
        self, function: Callable[..., Any], each: Sequence[tuple[Any, ...]], common: Any, static: Any
    ) -> list[Any]:
        size = self.at_once if 2 * len(each) > self.at_once else self.devices
        found: list[Any] = []
        for start in range(0, len(each), size):
            part = each[start : start + size]
            filled = [*part, *[part[-1]] * (size - len(part))]
            found += self.call(function, filled, common, static)[: len(part)]
        return found


def on_one_device(at_once: int, groups: Groups | None) -> Batched:
    """Batches on a single accelerator."""
    return Batched(at_once, _together, groups)


def _together(
    function: Callable[..., Any], each: Sequence[tuple[Any, ...]], common: Any, static: Any
) -> list[Any]:
    found = jax.tree.map(np.array, _batched(function, list(each), common, static))
    # np.asarray: a row of a vector is a NumPy scalar, no array.
    return [jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), found) for row in range(len(each))]


def summarise_batch(batch: Sequence[Update], plan: MeasurementPlan, solver: Solver) -> list[LayerSummary]:
    """The summaries of a batch of layers."""
    products = solver.products(batch)
    without = [
        without_sinks(np.sqrt(table["entering"]), np.sqrt(table["leaving"]), plan.sink_factor)
        for table in products
    ]
    layers: list[dict[View, ViewSummary]] = [{} for _ in batch]
    for view in plan.views:
        unmasked = view._replace(masked=False)
        kept = [mask if view.masked else np.ones_like(mask) for mask in without]
        for layer, mask in zip(layers, kept, strict=True):
            if mask.all() and unmasked in layer:  # No sinks: it is the same view.
                layer[view] = layer[unmasked]
        missing = [row for row, layer in enumerate(layers) if view not in layer]
        rows = [(batch[row], kept[row].astype(np.float64)) for row in missing]
        for row, summary in zip(missing, _certified(rows, view, plan, solver), strict=True):
            layers[row][view] = summary._replace(kept=kept[row], sinks_left=0)
    with np.errstate(invalid="ignore"):  # ∞ - ∞ is NaN, and the caller's to find
        energies = [{name: float(column.sum()) for name, column in table.items()} for table in products]
    return list(map(LayerSummary, layers, energies))


def _certified(
    rows: Sequence[tuple[Update, Kept]], view: View, plan: MeasurementPlan, solver: Solver
) -> list[ViewSummary]:
    """A view of each layer; NumPy computes again what fails its certificate."""
    if not rows:
        return []
    found = solver.summaries(rows, view, plan)
    for place, (update, kept) in enumerate(rows):
        if not found[place].certificate <= MAX_RESIDUAL:  # also where it is NaN
            wanted = Wanted.of(plan, view, *update.h.shape)
            found[place] = _on_host(update, kept, Selection.of(view), solver.groups, wanted)
    return found


def _on_host(
    update: Update, kept: Kept, selection: Selection, groups: Groups | None, wanted: Wanted
) -> ViewSummary:
    """The summary of a view by NumPy's SVD."""
    update = jax.tree.map(lambda part: jnp.asarray(np.asarray(part)), update)  # from all devices to one
    x = np.asarray(finite(view_rows(update, kept, selection)))
    found = _summarise_rows(x, update.h, kept, host_decompose(x, wanted.basis), groups, wanted)
    return jax.tree.map(np.asarray, found)._replace(on_host=True)


_products = jax.jit(state_products)
_view_rows = jax.jit(view_rows)
_summarise_rows = jax.jit(summarise_rows, static_argnums=5)


@partial(jax.jit, static_argnums=5)
def _summarise_solved(
    x: Any, h: Any, kept: Any, solved: Solved | None, groups: Groups | None, wanted: Wanted
) -> tuple[ViewSummary, Any]:
    """The summary and, where the factor needs them, the coordinates."""
    spectrum, coordinates = decompose(finite(x), wanted.basis, wanted.method, solved)
    summary = summarise_rows(x, h, kept, (spectrum, coordinates), groups, wanted)
    return summary, coordinates if wanted.compared and len(x) > FACTOR_ROWS else None


@partial(jax.jit, static_argnums=(0, 3))
def _batched(function: Callable[..., Any], each: Any, common: Any, static: Any) -> Any:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return jax.vmap(lambda own: function(*own, *common, *static))(stacked)


def update_bytes(n: int, d: int) -> int:
    """A layer's Update: three float32 matrices."""
    return 12 * n * d


def spectrum_bytes(n: int, d: int) -> int:
    """A layer's float64 workspace: δ twice, the Gram matrix, three of its size in the solver, one more."""
    return 8 * (2 * n * d + 5 * min(n, d) ** 2)


def in_batches() -> bool:
    """Whether several layers are summarised in one call, and not each by itself."""
    return jax.default_backend() != "cpu"


def layers_at_once(shape: tuple[int, int], layers: int, free: int, devices: int = 1) -> int:
    """Number of layers a device summarises at once within `free` bytes, at least one.

    At most a quarter of all layers, so that the others pass meanwhile.
    """
    if not in_batches():
        # One more than cores: when one thread waits for XLA's, or for Python's lock, its core is not idle.
        return (os.cpu_count() or 1) + 1 if devices == 1 else 1
    # Each of them with its own Update, while those of the next batch arrive; all devices have them all.
    fitting = min(free, _WORKSPACE_BYTES) // (spectrum_bytes(*shape) + 2 * devices * update_bytes(*shape))
    return max(1, min(fitting, layers // (4 * devices)))


def layers_pending(at_once: int) -> int:
    """Largest number of layers whose Updates are in memory."""
    return 2 * at_once + 1
