"""Runs the figures of many layers: on a CPU side by side on its cores, on an accelerator in batches."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Bool

from jaxdelta.spectrum import (
    CERTIFIED,
    Spectrum,
    TokenStatistics,
    host_spectrum,
    token_products,
    token_statistics,
    update_spectrum,
)
from jaxdelta.sweep import Update
from jaxdelta.timing import Clock
from jaxdelta.types import AnyArray

_WORKSPACE_BYTES = 4 << 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """What is measured of a layer; its arrays have a leading axis of layers.

    `on_host` marks the spectra that failed their certificate and were computed again by NumPy.
    """

    spectrum: Spectrum
    tokens: TokenStatistics
    finite: Bool[AnyArray, "*layers"]
    on_host: Bool[AnyArray, "*layers"]


def measure(
    updates: Iterable[Update],
    shape: tuple[int, int],
    k: int,
    method: str,
    at_once: int | None = None,
    clock: Clock | None = None,
) -> LayerFigures:
    """Spectrum and token statistics of every update, in their order, as they come.

    Args:
        updates: δ and h of each layer.
        shape: (n, d) of all of them: compiling begins before the first one comes.
        k: directions kept.
        method: `gram` or `full`, see `update_spectrum`.
        at_once: how many are computed at once; by default as many as memory, or cores, allow.
        clock: is told the time that goes into spectra.
    """
    run = _on_threads if jax.default_backend() == "cpu" else _in_batches
    at_once = at_once or layers_at_once(*shape, _WORKSPACE_BYTES)
    parts = list(run(updates, shape, k, method, at_once, clock or Clock()))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


class _Found(NamedTuple):
    """What the device finds of an update."""

    spectrum: Spectrum
    products: tuple[AnyArray, AnyArray, AnyArray]


@partial(jax.jit, static_argnames=("k", "method"))
def _figures(update: Update, *, k: int, method: str) -> _Found:
    """Spectrum and token products of one update."""
    products = token_products(update.delta, update.h)
    # Some solvers never return from a NaN; the products keep it, for `_complete` to see.
    delta = jnp.where(jnp.isfinite(products[0].sum()), update.delta, 0)
    return _Found(update_spectrum(delta, k, method), products)


@partial(jax.jit, static_argnames=("k", "method"))
def _batched_figures(updates: list[Update], *, k: int, method: str) -> _Found:
    """`_figures` of several updates, stacked."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)
    return jax.vmap(partial(_figures, k=k, method=method))(stacked)


def _on_threads(
    updates: Iterable[Update], shape: tuple[int, int], k: int, method: str, at_once: int, clock: Clock
) -> Iterator[LayerFigures]:
    """A thread for each core, whose linear algebra runs on that core alone.

    One layer's matrices are too small to share out well.
    """
    pending: list[Future[LayerFigures]] = []
    with ThreadPoolExecutor(at_once, "spectra") as pool, contextlib.ExitStack() as stack:
        # One compiles; the others wait for it, or they would all compile.
        compiled = pool.submit(_prepare, shape, k, method, stack)
        for update in updates:
            pending.append(pool.submit(_run_one, compiled, update, clock))
            if len(pending) >= layers_pending(at_once):
                yield pending.pop(0).result()
        yield from (future.result() for future in pending)


def _prepare(shape: tuple[int, int], k: int, method: str, stack: contextlib.ExitStack) -> Any:
    stack.enter_context(_single_threaded_blas())
    return _compiled(shape, k, method)


@cache
def _compiled(shape: tuple[int, int], k: int, method: str) -> Any:
    example: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.enable_x64(True):
        return _figures.lower(Update(example, example), k=k, method=method).compile()


def _run_one(compiled: Future[Any], update: Update, clock: Clock) -> LayerFigures:
    figures = compiled.result()
    with clock("spectra"), jax.enable_x64(True):
        found = jax.tree.map(lambda leaf: np.array(leaf)[None], figures(update))
    return _complete(found, [update])


def _in_batches(
    updates: Iterable[Update], shape: tuple[int, int], k: int, method: str, at_once: int, clock: Clock
) -> Iterator[LayerFigures]:
    """As many layers in one call as their workspace allows: a solver alone leaves a GPU nearly idle."""
    iterator = iter(updates)
    while batch := list(itertools.islice(iterator, at_once)):
        with clock("spectra"), jax.enable_x64(True):
            found = jax.tree.map(np.array, _batched_figures(batch, k=k, method=method))
        yield _complete(found, batch)


def update_bytes(n: int, d: int) -> int:
    """A layer's Update: two float32 matrices."""
    return 8 * n * d


def spectrum_bytes(n: int, d: int) -> int:
    """A layer's float64 workspace: δ twice, the Gram matrix, three of its size in the solver."""
    return 8 * (2 * n * d + 4 * min(n, d) ** 2)


def layers_at_once(n: int, d: int, free: int) -> int:
    """How many layers' figures are computed at once where so many bytes are free; one at least."""
    if jax.default_backend() == "cpu":
        return os.cpu_count() or 1
    # Each of them with its own Update, while those of the next batch arrive.
    return max(1, min(free, _WORKSPACE_BYTES) // (spectrum_bytes(n, d) + 2 * update_bytes(n, d)))


def layers_pending(at_once: int) -> int:
    """How many layers' Updates are in memory at most."""
    return 2 * at_once + 1


def _complete(found: _Found, updates: list[Update]) -> LayerFigures:
    """The layers' figures, with the spectra whose certificate failed computed again by NumPy."""
    spectrum, on_host = found.spectrum, ~(found.spectrum.defect <= CERTIFIED)  # also where it is NaN
    for row in np.flatnonzero(on_host):
        with jax.enable_x64(True):
            again = host_spectrum(np.asarray(updates[row].delta), spectrum.directions.shape[1])
        for mended, value in zip(jax.tree.leaves(spectrum), jax.tree.leaves(again), strict=True):
            mended[row] = value
    finite = np.all([np.isfinite(part).all(axis=-1) for part in found.products], axis=0)
    statistics = token_statistics(*(np.where(finite[:, None], part, 0) for part in found.products))
    return LayerFigures(spectrum, statistics, finite, on_host)


@contextlib.contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Several threads calling a threaded OpenBLAS is slow and, on many cores, unsafe (jax issue 39292)."""
    import scipy.linalg.cython_lapack  # noqa: F401 - XLA's LAPACK; loaded now so that it is limited too

    with threadpoolctl.threadpool_limits(1, "blas"):
        yield
