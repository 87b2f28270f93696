"""What is remembered of a layer: its row, and no array that grows with the text."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from updates import K, tokens, update

from jaxdelta.spectra.group_moments import FACTOR_ROWS
from jaxdelta.spectra.scheduler import measure
from jaxdelta.spectra.view_summary import Design, LayerFigures
from jaxdelta.spectra.views import ALL, MASKED, RAW
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.layer_row import described, layer_row
from jaxdelta.sweep.sweep import Update, Wrote
from jaxdelta.text.groups import Sample

N, D = FACTOR_ROWS + 9, 40
SAMPLE, PHASES = Sample.of(tokens(N), 20, 0), Phases(("A", "B"))


def figures(*wrote: Update) -> list[LayerFigures]:
    """Of layers, and of the last one normed."""
    design = Design(K, views=tuple(ALL.values()), groups=SAMPLE.groups)
    return measure([[Wrote(one)] for one in wrote], (N, D), design)


def arrays(of: Any) -> Iterator[np.ndarray]:
    for leaf in jax.tree.leaves(of, is_leaf=lambda node: hasattr(node, "__dict__")):
        if hasattr(leaf, "__dict__"):
            yield from arrays(list(vars(leaf).values()))
        elif isinstance(leaf, np.ndarray):
            yield leaf


def test_rows_stay_and_tokens_go() -> None:
    layers = figures(update((N, D), 0), update((N, D), 1, {5: 60.0}), update((N, D), 2))
    assert any(N in array.shape for array in arrays(layers))
    found = list(described(layers, PHASES, SAMPLE, K, D))
    places = [(0, "A"), (1, "B"), (1, "B")]  # the normed one is in the last one's place
    for layer, one, place in zip(layers, found, places, strict=True):
        assert one.row == layer_row(*place, layer, SAMPLE, K, D)
        assert list(one.views) == [RAW, MASKED]
        assert (one.finite, one.on_host) == (True, False)
        assert one.defect == max(view.defect for view in layer.views.values())
        for view, lighter in one.views.items():
            np.testing.assert_array_equal(lighter.directions, layer.views[view].directions)
            np.testing.assert_array_equal(lighter.singular_values, layer.views[view].singular_values)
            assert lighter.crossed is layer.views[view].crossed is not None
    assert not [array.shape for array in arrays(found) if N in array.shape]
    same = [one.views[RAW] is one.views[MASKED] for one in found]
    assert same == [True, False, True]


def test_a_layer_that_overflowed_has_no_row() -> None:
    wrote = update((N, D))
    wrote.mlp[3] = np.inf
    (one,) = described(figures(wrote), Phases(("A",)), SAMPLE, K, D)
    assert (one.row, one.finite) == ({}, False)
