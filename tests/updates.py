"""Updates whose figures can be computed by hand: made of documents, anisotropic, with sinks where wanted."""

from typing import Any
from unittest import mock

import jax
import numpy as np

from jaxdelta.spectra import scheduler, view_summary
from jaxdelta.spectra.view_summary import Design, LayerFigures
from jaxdelta.spectra.views import ALL
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import Tokens

DOCUMENTS = 12
WIDE, TALL = (72, 96), (96, 72)  # (n, d)
K = 4


def tokens(n: int, documents: int | np.ndarray = DOCUMENTS, windows: int = 1) -> Tokens:
    """Windows whose updates have n rows, in so many documents, or in those given for each row."""
    if isinstance(documents, int):
        documents = np.arange(n) * documents // n
    rows = documents.reshape(windows, -1)
    owners = np.concatenate([rows[:, :1], rows], axis=1).astype(np.int32)
    ids = np.arange(owners.size, dtype=np.int32).reshape(owners.shape)
    return Tokens(ids, owners, lambda window, place: f"t{ids[window, place]}")


def update(shape: tuple[int, int], seed: int = 0, sinks: dict[int, float] | None = None) -> Update:
    """Tokens with a mean, of documents with means and sizes of their own; `sinks`: rows, times as large."""
    n, d = shape
    rng = np.random.default_rng(seed)
    owners = np.arange(n) * DOCUMENTS // n
    scale = np.arange(1.0, d + 1) ** -0.75
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]

    def written() -> np.ndarray:
        x = rng.normal(size=(n, d)) + rng.normal(size=(DOCUMENTS, d))[owners] + 0.5 * (np.arange(d) < 3)
        return x * scale * np.exp(0.3 * rng.normal(size=(DOCUMENTS, 1)))[owners] @ turn

    attention, mlp, h = 0.5 * written(), written(), 0.3 * rng.normal(size=(n, d))
    for row, factor in (sinks or {}).items():
        attention[row], mlp[row] = factor * attention[row], factor * mlp[row]
    return Update(*(part.astype(np.float32) for part in (attention, mlp, h)))


def measured(wrote: Update, of: ResamplingGroups, **design: Any) -> LayerFigures:
    """One layer's figures in every view, on this thread; not what the comparison of layers needs."""
    whole = Design(**{"k": K, "views": tuple(ALL.values()), "groups": of.groups} | design)
    with (
        jax.enable_x64(True),
        mock.patch.object(scheduler, "CROSSED", ()),
        mock.patch.object(view_summary, "CROSSED", ()),
    ):
        return scheduler._measured([wrote], whole, scheduler._one_by_one)[0]
