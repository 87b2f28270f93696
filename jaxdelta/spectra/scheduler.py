"""Summaries of many layers from their rows: one layer per core on a CPU, in batches elsewhere."""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxdelta.spectra.from_rows import Wanted, factor, finite, summarise_rows, summarise_update, view_rows
from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.spectra.spectrum import MAX_RESIDUAL, Solved, decompose, host_decompose, solve
from jaxdelta.spectra.token_table import state_products
from jaxdelta.spectra.view_summary import FACTOR_ROWS, LayerSummary, MeasurementPlan, ViewSummary
from jaxdelta.spectra.views import Selection, View, without_sinks
from jaxdelta.sweep.sweep import BlockUpdate, Update, concatenate_blocks
from jaxdelta.text.groups import Groups
from jaxdelta.utils.timing import Clock

_WORKSPACE_BYTES = 4 << 30

# finish(number of a layer, its summary) -> the record kept of it; called while later layers are computed
Finish = Callable[[int, LayerSummary], Any]
Kept = Float64[np.ndarray, " n"]  # 1 for the tokens of a view, else 0
BatchCall = Callable[..., list[Any]]  # call(function, arguments of each layer, common ones, static ones)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Numbers of layers summarised at once and pending at most; the number of the first layer."""

    at_once: int
    pending: int
    start: int = 0
    clock: Clock = dataclasses.field(default_factory=Clock)


class Summaries:
    """Computes summaries on threads and yields, in the order of the layers, what `finish` makes of them.

    The last layer with the final norm counts as one more layer.
    """

    def __init__(self, threads: int, pending: int):
        self._threads, self._most = threads, pending
        self._pending: deque[Future[list[Any]]] = deque()

    def __enter__(self) -> Any:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(one_blas_thread())
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads, "spectra"))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """Takes a layer, block by block; yields finished results."""
        raise NotImplementedError

    def submit(self, work: Callable[[], list[Any]]) -> Iterator[Any]:
        """Submits work; yields the oldest results while too many are pending."""
        self._pending.append(self._pool.submit(work))
        while len(self._pending) >= self._most:
            yield from self._pending.popleft().result()

    def ready(self) -> Iterator[Any]:
        """Yields finished results without waiting."""
        while self._pending and self._pending[0].done():
            yield from self._pending.popleft().result()

    def rest(self) -> Iterator[Any]:
        """Yields the remaining results, after the last layer."""
        while self._pending:
            yield from self._pending.popleft().result()


class ThreadedSummaries(Summaries):
    """One layer per thread and core: a layer's matrices are too small for the linear algebra to use more."""

    def __init__(self, plan: MeasurementPlan, finish: Finish, schedule: Schedule, groups: Groups | None):
        super().__init__(schedule.at_once, schedule.pending)
        self._plan, self._finish, self._schedule = plan, finish, schedule
        self._solver = OneByOne(groups)
        self._numbers, self._compiled = itertools.count(schedule.start), threading.Event()

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """See `Summaries.add`."""
        for update in concatenate_blocks([layer]):
            yield from self.submit(partial(self._summarise, next(self._numbers), update))

    def _summarise(self, number: int, update: Update) -> list[Any]:
        if number > self._schedule.start:  # The first layer compiles; otherwise every thread would.
            self._compiled.wait()
        try:
            with self._schedule.clock("spectra"), jax.enable_x64(True):
                (summary,) = summarise_batch([update], self._plan, self._solver)
                return [self._finish(number, summary)]
        finally:
            self._compiled.set()


class BatchedSummaries(Summaries):
    """Batches of layers, each in one call: the matrices of one layer leave an accelerator nearly idle.

    A batch is solved while later layers are computed. Several devices must launch the same programs in the
    same order, so on a mesh the pass waits for the batch.
    """

    def __init__(self, plan: MeasurementPlan, finish: Finish, schedule: Schedule, solver: "Batched"):
        super().__init__(1, 2)
        self._plan, self._finish, self._schedule, self._solver = plan, finish, schedule, solver
        self._numbers = itertools.count(schedule.start)
        self._batch: list[Update] = []

    def add(self, layer: Iterable[BlockUpdate]) -> Iterator[Any]:
        """See `Summaries.add`."""
        for update in concatenate_blocks([layer]):
            self._batch.append(update)
            yield from self.ready()
            if len(self._batch) == self._schedule.at_once:
                yield from self._flush()

    def rest(self) -> Iterator[Any]:
        """See `Summaries.rest`."""
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


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """Solver for CPUs: LAPACK computes only the eigenvectors needed, between two compiled functions.

    `groups`: the groups of the tokens; None without resampling.
    """

    groups: Groups | None = None

    def products(self, batch: Sequence[Update]) -> list[dict[str, np.ndarray]]:
        """`state_products` of each layer."""
        return [jax.tree.map(np.asarray, _products(update)) for update in batch]

    def summaries(
        self, rows: Sequence[tuple[Update, Kept]], view: View, plan: MeasurementPlan
    ) -> list[ViewSummary]:
        """The summary of a view of each layer, given its update and its kept tokens."""
        return [self._summary(update, kept, view, plan) for update, kept in rows]

    def _summary(self, update: Update, kept: Kept, view: View, plan: MeasurementPlan) -> ViewSummary:
        x = _view_rows(update, kept, Selection.of(view))
        n, d = x.shape
        wanted = Wanted.of(plan, view, n, d)
        axes = wanted.axes(n, d, plan.resampled)
        solved = solve(np.asarray(x), axes) if wanted.method == "gram" else None
        traced, coordinates = _summarise_solved(x, update.h, kept, solved, self.groups, wanted)
        summary = jax.tree.map(np.asarray, traced)
        if summary.factor is None or n <= FACTOR_ROWS:
            return summary
        # By BLAS, on one core like the rest of the thread's linear algebra.
        rows = np.asarray(finite(x))
        return summary._replace(factor=factor(rows, np.asarray(coordinates), summary.singular_values))


@dataclasses.dataclass(frozen=True)
class Batched:
    """Solver for accelerators: one call for all layers of a batch.

    A batch is padded to `at_once` layers, so that nothing compiles twice. A view that at most half of them
    need is computed for `devices` layers at a time.

    Attributes:
        groups: the groups of the tokens; None without resampling.
        in_turn: whether it must run on the thread of the pass.
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
        """The summary of a view of each layer, given its update and its kept tokens."""
        wanted = Wanted.of(plan, view, *rows[0][0].h.shape)
        return self._filled(summarise_update, rows, (Selection.of(view), self.groups), (wanted,))

    def _filled(
        self, function: Callable[..., Any], each: Sequence[tuple[Any, ...]], common: Any, static: Any
    ) -> list[Any]:
        size = self.at_once if 2 * len(each) > self.at_once else self.devices
        results: list[Any] = []
        for start in range(0, len(each), size):
            part = each[start : start + size]
            filled = [*part, *[part[-1]] * (size - len(part))]
            results += self.call(function, filled, common, static)[: len(part)]
        return results


Solver = OneByOne | Batched


def on_one_device(at_once: int, groups: Groups | None) -> Batched:
    """Batches on a single accelerator."""
    return Batched(at_once, _together, groups)


def _together(
    function: Callable[..., Any], each: Sequence[tuple[Any, ...]], common: Any, static: Any
) -> list[Any]:
    results = jax.tree.map(np.array, _batched(function, list(each), common, static))
    # np.asarray: indexing a vector gives a NumPy scalar, not an array.
    return [jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), results) for row in range(len(each))]


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
            if mask.all() and unmasked in layer:  # Without sinks the two views are the same.
                layer[view] = layer[unmasked]
        missing = [row for row, layer in enumerate(layers) if view not in layer]
        rows = [(batch[row], kept[row].astype(np.float64)) for row in missing]
        for row, summary in zip(missing, _certified(rows, view, plan, solver), strict=True):
            layers[row][view] = summary._replace(kept=kept[row], sinks_left=0)
    with np.errstate(invalid="ignore"):  # ∞ - ∞ is NaN, which the caller checks for
        energies = [{name: float(column.sum()) for name, column in table.items()} for table in products]
    return list(map(LayerSummary, layers, energies))


def _certified(
    rows: Sequence[tuple[Update, Kept]], view: View, plan: MeasurementPlan, solver: Solver
) -> list[ViewSummary]:
    """A view of each layer, recomputed by NumPy where the certificate fails."""
    if not rows:
        return []
    summaries = solver.summaries(rows, view, plan)
    for index, (update, kept) in enumerate(rows):
        if not summaries[index].certificate <= MAX_RESIDUAL:  # also true for NaN
            wanted = Wanted.of(plan, view, *update.h.shape)
            summaries[index] = _on_host(update, kept, Selection.of(view), solver.groups, wanted)
    return summaries


def _on_host(
    update: Update, kept: Kept, selection: Selection, groups: Groups | None, wanted: Wanted
) -> ViewSummary:
    """The summary of a view by NumPy's SVD."""
    update = jax.tree.map(lambda part: jnp.asarray(np.asarray(part)), update)  # from the mesh to one device
    x = np.asarray(finite(view_rows(update, kept, selection)))
    summary = _summarise_rows(x, update.h, kept, host_decompose(x, wanted.basis), groups, wanted)
    return jax.tree.map(np.asarray, summary)._replace(on_host=True)


_products = jax.jit(state_products)
_view_rows = jax.jit(view_rows)
_summarise_rows = jax.jit(summarise_rows, static_argnums=5)


@partial(jax.jit, static_argnums=5)
def _summarise_solved(
    x: Any, h: Any, kept: Any, solved: Solved | None, groups: Groups | None, wanted: Wanted
) -> tuple[ViewSummary, Any]:
    """The summary and, if the factor needs them, the coordinates."""
    spectrum, coordinates = decompose(finite(x), wanted.basis, wanted.method, solved)
    summary = summarise_rows(x, h, kept, (spectrum, coordinates), groups, wanted)
    return summary, coordinates if wanted.compared and len(x) > FACTOR_ROWS else None


@partial(jax.jit, static_argnums=(0, 3))
def _batched(function: Callable[..., Any], each: Any, common: Any, static: Any) -> Any:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return jax.vmap(lambda arguments: function(*arguments, *common, *static))(stacked)


def update_bytes(n: int, d: int) -> int:
    """Bytes of a layer's Update: three float32 matrices."""
    return 12 * n * d


def spectrum_bytes(n: int, d: int) -> int:
    """Bytes of a layer's float64 workspace: δ twice, the Gram matrix and four matrices of its size."""
    return 8 * (2 * n * d + 5 * min(n, d) ** 2)


def in_batches() -> bool:
    """Whether several layers are summarised in one call rather than one by one."""
    return jax.default_backend() != "cpu"


def layers_at_once(shape: tuple[int, int], layers: int, free: int, devices: int = 1) -> int:
    """Number of layers a device summarises at once within `free` bytes, at least one.

    At most a quarter of all layers, so that a batch overlaps with the computation of the next layers.
    """
    if not in_batches():
        # One more than cores: no core idles while a thread waits for XLA or for Python's lock.
        return (os.cpu_count() or 1) + 1 if devices == 1 else 1
    # Every device holds the Updates of a batch, one per layer, while those of the next batch arrive.
    fitting = min(free, _WORKSPACE_BYTES) // (spectrum_bytes(*shape) + 2 * devices * update_bytes(*shape))
    return max(1, min(fitting, layers // (4 * devices)))


def layers_pending(at_once: int) -> int:
    """Largest number of layers whose Updates are in memory."""
    return 2 * at_once + 1
