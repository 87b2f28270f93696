"""Every layer's figures from the residual stream: updates, spectra, token statistics, closure."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int

from jaxdelta.model import ResidualStream
from jaxdelta.spectrum import (
    CERTIFIED,
    Spectrum,
    TokenStatistics,
    host_spectrum,
    layers_at_once,
    over_layers,
    token_statistics,
    update_spectrum,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """What is computed on the device for one layer (or, stacked, for several)."""

    spectrum: Spectrum
    tokens: TokenStatistics
    finite: Array


def measure_layers(stream: ResidualStream, k: int, method: str) -> tuple[LayerFigures, list[int]]:
    """Every layer's figures over all tokens but the first, and one row more: the last layer's when its
    state is taken after the final norm, as the reference takes it.

    A spectrum whose certificate fails is computed again by NumPy on the host.

    Returns:
        The stacked figures (N + 1 rows) and the rows that were computed on the host.
    """
    count = stream.attention.shape[0] + 1
    n, d = stream.states.shape[-2] - 1, stream.states.shape[-1]
    figures = partial(layer_figures, stream, k=k, method=method, batch=min(count, layers_at_once(n, d)))
    found = over_layers(figures, count)
    bad = [row for row in range(count) if found.finite[row] and not found.spectrum.defect[row] <= CERTIFIED]
    for row in bad:
        with jax.enable_x64(True):
            spectrum = host_spectrum(np.asarray(row_inputs(stream, row)[0]), k)
        for mended, value in zip(jax.tree.leaves(found.spectrum), jax.tree.leaves(spectrum), strict=True):
            mended[row] = value
    return found, bad


@partial(jax.jit, static_argnames=("k", "method", "batch"))
def layer_figures(
    stream: ResidualStream, rows: Int[Array, " m"], *, k: int, method: str, batch: int
) -> LayerFigures:
    """The figures of the given rows of `row_inputs`, `batch` of them at a time."""

    def one(row: Int[Array, ""]) -> LayerFigures:
        delta, h = row_inputs(stream, row)
        finite = jnp.isfinite(delta).all() & jnp.isfinite(h).all()
        delta = jnp.where(finite, delta, 0)  # Some solvers never return from a NaN.
        return LayerFigures(update_spectrum(delta, k, method), token_statistics(delta, h), finite)

    return jax.lax.map(one, rows, batch_size=batch)


def row_inputs(
    stream: ResidualStream, row: int | Int[Array, ""]
) -> tuple[Float32[Array, "n d"], Float32[Array, "n d"]]:
    """δ and h of a row without the first token: layer `row`, or, past the last, the last layer's normed."""
    assert stream.normed is not None
    last = stream.attention.shape[0] - 1
    layer = jnp.minimum(row, last)
    h = stream.states[layer, 0, 1:].astype(jnp.float32)
    written = (stream.attention[layer] + stream.mlp[layer])[0, 1:]
    return jnp.where(row > last, stream.normed[0, 1:] - h, written), h


@jax.jit
def closure_error(stream: ResidualStream) -> Float64[Array, ""]:
    """‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F: how well the updates account for the last state (trace with x64 on)."""
    first, last = (stream.states[i].astype(jnp.float64) for i in (0, -1))
    written = jnp.sum(stream.attention, axis=0, dtype=jnp.float64) + jnp.sum(
        stream.mlp, axis=0, dtype=jnp.float64
    )
    return jnp.linalg.norm((first + written - last).ravel()) / jnp.linalg.norm(last.ravel())
