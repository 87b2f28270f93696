"""Runs the figures of many layers: on a CPU side by side on its cores, on an accelerator in batches."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from jaxdelta.spectra import from_rows, token_table
from jaxdelta.spectra.linalg import single_threaded_blas
from jaxdelta.spectra.spectrum import CERTIFIED, Solved, solve
from jaxdelta.spectra.view_summary import CROSSED, Design, Found, LayerFigures, ViewFigures
from jaxdelta.spectra.views import RAW, View, without_sinks
from jaxdelta.sweep.sweep import Update, Wrote, joined
from jaxdelta.utils.compiling import QuickJit
from jaxdelta.utils.timing import Clock

_WORKSPACE_BYTES = 4 << 30


def measure(
    layers: Iterable[Iterable[Wrote]], shape: tuple[int, int], design: Design, at_once: int | None = None
) -> list[LayerFigures]:
    """All that `measured` finds."""
    return list(measured(layers, shape, design, at_once))


def measured(
    layers: Iterable[Iterable[Wrote]],
    shape: tuple[int, int],
    design: Design,
    at_once: int | None = None,
    clock: Clock | None = None,
    pending: int | None = None,
    call: "Caller | None" = None,
) -> Iterator[LayerFigures]:
    """The figures of every layer, in their order, as they come, and of the last one normed.

    Args:
        layers: what each wrote, block by block.
        shape: (n, d) of a layer's update: compiling begins before the first one comes.
        design: what is measured.
        at_once: how many are computed at once; by default as many as memory, or cores, allow.
        clock: is told the time that goes into spectra.
        pending: on a CPU, how many layers pass at most before the first one's figures come.
        call: how several devices compute a batch; by default one does.
    """
    at_once, clock = at_once or layers_at_once(*shape, _WORKSPACE_BYTES), clock or Clock()
    if call or in_batches():
        return _in_batches(joined(layers), design, at_once, clock, call or _together)
    return _on_threads(joined(layers), shape, design, at_once, clock, pending or layers_pending(at_once))


def in_batches() -> bool:
    """Whether several layers are measured in one call, and not each by itself."""
    return jax.default_backend() != "cpu"


def _on_threads(
    updates: Iterable[Update], shape: tuple[int, int], design: Design, at_once: int, clock: Clock, most: int
) -> Iterator[LayerFigures]:
    """A thread for each core and one more, whose linear algebra runs on one core each.

    One layer's matrices are too small to share out well.
    """
    pending: list[Future[LayerFigures]] = []

    def run_one(update: Update) -> LayerFigures:
        compiled.result()
        with clock("spectra"), jax.enable_x64(True):
            return _measured([update], design, _one_by_one)[0]

    with ThreadPoolExecutor(at_once, "spectra") as pool, contextlib.ExitStack() as stack:
        # One compiles; the others wait for it, or they would all compile.
        compiled = pool.submit(_prepare, shape, design, stack)
        for update in updates:
            pending.append(pool.submit(run_one, update))
            if len(pending) >= most:
                yield pending.pop(0).result()
        yield from (future.result() for future in pending)


def _in_batches(
    updates: Iterable[Update], design: Design, at_once: int, clock: Clock, call: "Caller"
) -> Iterator[LayerFigures]:
    """As many layers in one call as their workspace allows: a solver alone leaves a GPU nearly idle."""
    iterator = iter(updates)
    while batch := list(itertools.islice(iterator, at_once)):
        with clock("spectra"), jax.enable_x64(True):
            yield from _measured(batch, design, call)


# call(function, arguments by layer, arguments of all layers, static arguments of all): the results by layer
Caller = Callable[..., list[Any]]
Arguments = Sequence[tuple[Any, ...]]


@partial(QuickJit, static_argnums=(0, 3))
def _single(function: Callable[..., Any], own: Any, common: Any, static: Any) -> Any:
    return function(*own, *common, *static)


@partial(jax.jit, static_argnums=(0, 3))
def _batched(function: Callable[..., Any], each: Any, common: Any, static: Any) -> Any:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    return jax.vmap(lambda own: function(*own, *common, *static))(stacked)


def _one_by_one(
    function: Callable[..., Any], each: Arguments, common: Any = (), static: Any = ()
) -> list[Any]:
    return [jax.tree.map(np.array, _single(function, own, common, static)) for own in each]


def _together(function: Callable[..., Any], each: Arguments, common: Any = (), static: Any = ()) -> list[Any]:
    found = jax.tree.map(np.array, _batched(function, list(each), common, static))
    # np.asarray: a row of a vector is a NumPy scalar, no array.
    return [jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), found) for row in range(len(each))]


def _prepare(shape: tuple[int, int], design: Design, stack: contextlib.ExitStack) -> None:
    """Limits BLAS, and compiles what `_one_by_one` will call."""
    stack.enter_context(single_threaded_blas())
    matrix: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    update = Update(matrix, matrix, matrix)
    with jax.enable_x64(True):
        kept, selection, size = np.ones(shape[0]), design.selection(RAW), design.basis_size(*shape)
        if not design.plain:
            _single.lower(token_table.state_products, (update,), (), ()).compile()
        rows = _single.lower(from_rows.view_rows, (update, kept), (selection,), ())
        rows.compile()
        for solved in _solved_shapes(shape, design):
            own = (rows.out_info, matrix, kept, solved)
            _single.lower(from_rows.spectral_figures, own, (), (size, design.method)).compile()


def _solved_shapes(shape: tuple[int, int], design: Design) -> list[Any]:
    """Of what `solve` finds of a view's rows, by numbers of axes; None where it finds nothing."""
    if design.method != "gram":
        return [None]
    of: Any = partial(jax.ShapeDtypeStruct, dtype=np.float64)
    r, axes = min(shape), {design.axes(view, *shape) for view in design.views}
    return [Solved(of((r, r)), of((r,)), of((r, q))) for q in axes]


def _measured(batch: list[Update], design: Design, call: Caller) -> list[LayerFigures]:
    """The figures of a batch of layers."""
    if design.plain:
        kept = [np.ones(len(update.h), bool) for update in batch]
        return [LayerFigures({RAW: found}, None) for found in _view(batch, kept, RAW, design, call)]
    states = call(token_table.state_products, [(update,) for update in batch])
    without = [
        without_sinks(np.sqrt(state["entering"]), np.sqrt(state["leaving"]), design.sink_factor)
        for state in states
    ]
    layers: list[dict[View, ViewFigures]] = [{} for _ in batch]
    for view in design.views:
        kept = [mask if view.masked else np.ones_like(mask) for mask in without]
        unmasked = view._replace(masked=False)
        if unmasked in layers[0] and all(mask.all() for mask in kept):  # No sinks: it is the same view.
            found = [layer[unmasked] for layer in layers]
        else:
            found = _view(batch, kept, view, design, call)
        for layer, one in zip(layers, found, strict=True):
            layer[view] = one
    with np.errstate(invalid="ignore"):  # ∞ - ∞ is NaN, and the caller's to find
        ledgers = [{name: float(rows.sum()) for name, rows in state.items()} for state in states]
    return list(map(LayerFigures, layers, ledgers))


def _view(
    batch: list[Update], kept: list[np.ndarray], view: View, design: Design, call: Caller
) -> list[ViewFigures]:
    """A view of every layer of a batch; spectra whose certificate failed are computed again by NumPy."""
    common, size = (design.selection(view), design.groups), design.basis_size(*batch[0].h.shape)
    compared = design.groups is not None and view in CROSSED
    own = [(update, mask.astype(np.float64)) for update, mask in zip(batch, kept, strict=True)]
    if call is _one_by_one:
        found = [_on_a_cpu(*one, view, design) for one in own]
    else:
        found = call(from_rows.view_figures, own, common, (size, design.method, compared))
    on_host = [not one.spectrum.defect <= CERTIFIED for one in found]  # also where it is NaN
    for row in np.flatnonzero(on_host):
        # One device has it then, where all had it.
        update = jax.tree.map(lambda part: jnp.asarray(np.asarray(part)), batch[row])
        found[row] = from_rows.host_figures(update, own[row][1], *common, size, compared)
    return [
        ViewFigures(one, design.k, mask, failed)
        for one, mask, failed in zip(found, kept, on_host, strict=True)
    ]


def _on_a_cpu(update: Update, kept: Float64[np.ndarray, " n"], view: View, design: Design) -> Found:
    """`from_rows.view_figures`, by LAPACK and NumPy what XLA's threads would take longer for."""
    rows = _single(from_rows.view_rows, (update, kept), (design.selection(view),), ())
    x, size = np.asarray(rows), design.basis_size(*rows.shape)
    solved = solve(x, design.axes(view, *x.shape)) if design.method == "gram" else None
    of_rows = _single(from_rows.spectral_figures, (rows, update.h, kept, solved), (), (size, design.method))
    found, coordinates = jax.tree.map(np.array, of_rows)
    if not np.isfinite(found.products[0].sum()):
        x = np.zeros_like(x)
    with np.errstate(invalid="ignore"):  # such a layer's figures are NaN, and the caller's to find
        return from_rows.with_documents(found, x, solved, coordinates, design.groups, view in CROSSED)


def update_bytes(n: int, d: int) -> int:
    """A layer's Update: three float32 matrices."""
    return 12 * n * d


def spectrum_bytes(n: int, d: int) -> int:
    """A layer's float64 workspace: δ twice, the Gram matrix, three of its size in the solver, one more."""
    return 8 * (2 * n * d + 5 * min(n, d) ** 2)


def layers_at_once(n: int, d: int, free: int, devices: int = 1) -> int:
    """How many layers' figures a device computes at once where so many bytes are free; one at least."""
    if jax.default_backend() == "cpu":
        # One more than cores: when one thread waits for XLA's, or for Python's lock, its core is not idle.
        return (os.cpu_count() or 1) + 1 if devices == 1 else 1
    # Each of them with its own Update, while those of the next batch arrive; all devices have them all.
    return max(1, min(free, _WORKSPACE_BYTES) // (spectrum_bytes(n, d) + 2 * devices * update_bytes(n, d)))


def layers_pending(at_once: int) -> int:
    """How many layers' Updates are in memory at most."""
    return 2 * at_once + 1
