"""From the records of all layers to the fields of a result: rows, overlaps, phases, verdict."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdelta.run.options import Options
from jaxdelta.spectra.view_summary import COMPARED_VIEWS, ViewSummary
from jaxdelta.spectra.views import RAW, View
from jaxdelta.statistics.across_layers.overlap import overlaps, principal_angles
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.across_layers.table import compare_layers, reference_tables, stacked_directions
from jaxdelta.statistics.across_layers.verdict import verdicts
from jaxdelta.statistics.layer_row import LayerRecord
from jaxdelta.text.groups import ResamplingGroups


def collect(
    layers: Sequence[LayerRecord], phases: Phases, sample: ResamplingGroups, options: Options
) -> dict[str, Any]:
    """The Analysis' fields that follow from the layers' figures: the last is the last layer's, normed."""
    *plain, normed = layers
    chosen = [*plain[:-1], normed if options.last_state == "normed" else plain[-1]]
    raw = _view(chosen, RAW)
    directions = stacked_directions(raw, options.top_k)
    angles = principal_angles(directions)
    found = overlaps(directions, phases.members)
    return {
        "per_layer": [layer.row for layer in chosen],
        "last_layer_normed": normed.row,
        "last_layer_residual": plain[-1].row,
        **reference_tables(found, phases),
        **_related(chosen, phases, sample, options),
        "directions": directions.astype(np.float32),
        "singular_values": np.stack([figures.singular_values for figures in raw]).astype(np.float32),
        "top1_cos": found.top1_cos.astype(np.float32),
        "principal_cosines": angles.cosines.astype(np.float32),
        "projection_distance": angles.projection_distance.astype(np.float32),
        "grassmann_distance": angles.grassmann_distance.astype(np.float32),
    }


def _related(
    layers: Sequence[LayerRecord], phases: Phases, sample: ResamplingGroups, options: Options
) -> dict[str, Any]:
    """What relates the layers, with and without sinks; and the verdict, without sinks if they were masked."""
    if not options.resampled:
        return {}
    overlap: dict[str, dict[str, Any]] = {}
    related: dict[tuple[int, ...], dict[str, Any]] = {}
    for view in (view for view in COMPARED_VIEWS if view in layers[0].views):
        figures = _view(layers, view)
        same = tuple(map(id, figures))  # without sinks, the masked view is the raw one
        if same not in related:
            related[same] = compare_layers(
                figures, phases, sample, options.top_k, options.null_draws, options.seed
            )
        overlap[view.name] = related[same]
    return {"overlap": overlap, "verdict": verdicts(related[same])}


def _view(layers: Sequence[LayerRecord], view: View) -> list[ViewSummary]:
    return [layer.views[view] for layer in layers]
