"""A layer as it is remembered while the others pass: its row, and what compares it with them.

What is known of each token goes into the row and is then forgotten: of a long text nothing else would grow
with the number of layers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxdelta.measure import CROSSED, LayerFigures, ViewFigures
from jaxdelta.relations import Phases
from jaxdelta.rows import Sample, layer_row
from jaxdelta.views import View


class Described(NamedTuple):
    """A layer's row, empty where a figure is not `finite`; its views that are compared, without what is of
    tokens or documents; the largest defect of its spectra, and whether NumPy had to do one again."""

    row: dict[str, Any]
    views: dict[View, ViewFigures]
    finite: bool
    defect: float
    on_host: bool


def described(
    layers: Iterable[LayerFigures], phases: Phases, sample: Sample, k: int, hidden: int
) -> Iterator[Described]:
    """Every layer, and the last one normed, which has the last one's place."""
    last = len(phases.of_layer) - 1
    for number, figures in enumerate(layers):
        index, every = min(number, last), list(figures.views.values())
        finite = all(view.finite for view in every)
        yield Described(
            layer_row(index, phases.of_layer[index], figures, sample, k, hidden) if finite else {},
            _compared(figures.views),
            finite,
            max(view.defect for view in every),
            any(view.on_host for view in every),
        )


def _compared(views: dict[View, ViewFigures]) -> dict[View, ViewFigures]:
    """What is one object stays one: without sinks the masked view is the raw one."""
    lighter: dict[int, ViewFigures] = {}
    for figures in views.values():
        found = figures.found._replace(products=None, owned=None, resampled=None)
        lighter[id(figures)] = replace(figures, found=found, kept=np.zeros(0, bool))
    return {view: lighter[id(figures)] for view, figures in views.items() if view in CROSSED}
