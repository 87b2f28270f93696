"""Updates whose statistics can be computed by hand: of documents, anisotropic, with sinks where wanted; and
their summaries from rows and from moments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdelta.spectra.moments.accumulate import MomentAccumulator, TextBlocks
from jaxdelta.spectra.moments.kernels import one_device_kernels
from jaxdelta.spectra.moments.summary import LayerMoments
from jaxdelta.spectra.scheduler import OneByOne, Solver, summarise_batch
from jaxdelta.spectra.view_summary import LayerSummary, MeasurementPlan
from jaxdelta.spectra.views import ALL
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import Tokens

DOCUMENTS = 12
WIDE, TALL = (72, 96), (96, 72)  # (n, d)
K = 4


def tokens(n: int, documents: int | np.ndarray = DOCUMENTS, windows: int = 1) -> Tokens:
    """Windows whose updates have n rows, in this number of documents, or in those given for each row."""
    if isinstance(documents, int):
        documents = np.arange(n) * documents // n
    rows = documents.reshape(windows, -1)
    owners = np.concatenate([rows[:, :1], rows], axis=1).astype(np.int32)
    ids = np.arange(owners.size, dtype=np.int32).reshape(owners.shape)
    return Tokens(ids, owners, lambda window, place: f"t{ids[window, place]}")


def update(
    shape: tuple[int, int], seed: int = 0, sinks: dict[int, float] | None = None, power: float = 0.75
) -> Update:
    """Tokens with a mean, of documents with means and sizes of their own; `sinks`: rows, times as large;
    `power`: axis i is i^-power as long."""
    n, d = shape
    rng = np.random.default_rng(seed)
    owners = np.arange(n) * DOCUMENTS // n
    scale = np.arange(1.0, d + 1) ** -power
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]

    def written() -> np.ndarray:
        x = rng.normal(size=(n, d)) + rng.normal(size=(DOCUMENTS, d))[owners] + 0.5 * (np.arange(d) < 3)
        return x * scale * np.exp(0.3 * rng.normal(size=(DOCUMENTS, 1)))[owners] @ turn

    attention, mlp, h = 0.5 * written(), written(), 0.3 * rng.normal(size=(n, d))
    for row, factor in (sinks or {}).items():
        attention[row], mlp[row] = factor * attention[row], factor * mlp[row]
    return Update(*(part.astype(np.float32) for part in (attention, mlp, h)))


def on_device(wrote: Update) -> Update:
    """The update's arrays as those of JAX."""
    return jax.tree.map(jnp.asarray, wrote)


def plan(**options: Any) -> MeasurementPlan:
    """K directions of every view, resampled, unless the options say otherwise."""
    return MeasurementPlan(**{"k": K, "views": tuple(ALL.values()), "resampled": True} | options)


def from_rows(
    wrote: Update, sample: ResamplingGroups, solver: Solver | None = None, **options: Any
) -> LayerSummary:
    """A layer's summary from its rows; by NumPy's LAPACK unless another solver is given."""
    wanted = plan(**options)
    solver = solver or OneByOne(sample.groups if wanted.resampled else None)
    with jax.enable_x64(True):
        return summarise_batch([wrote], wanted, solver)[0]


def accumulated(wrote: Update, sample: ResamplingGroups, blocks: int = 1, **options: Any) -> LayerMoments:
    """The moments of a layer whose windows come in this number of blocks."""
    counted = sample.tokens.counted
    sums = MomentAccumulator(
        TextBlocks.of(np.split(counted, blocks), sample.group_of_token), plan(**options), one_device_kernels()
    )
    parts = [np.split(_among_all(part, counted), blocks) for part in wrote]
    for block, rows in enumerate(zip(*parts, strict=True)):
        sums.add(block, on_device(Update(*rows)))
    return sums.moments()


def from_moments(wrote: Update, sample: ResamplingGroups, blocks: int = 1, **options: Any) -> LayerSummary:
    """The same layer's summary from its moments."""
    return accumulated(wrote, sample, blocks, **options).summary(plan(**options))


def _among_all(rows: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The rows in the places of tokens that count; the others are long, so that none goes unseen."""
    every = np.full((counted.size, rows.shape[1]), 1e3, np.float32)
    every[counted.ravel()] = rows
    return every
