"""The fields of a result from the records of all layers: rows, overlaps, phases, verdict."""

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
from jaxdelta.text.excerpt import excerpt
from jaxdelta.text.groups import ResamplingGroups


def collect(
    layers: Sequence[LayerRecord], phases: Phases, sample: ResamplingGroups, options: Options
) -> dict[str, Any]:
    """The fields of an Analysis that depend on the layers; the last of `layers` is the last one, normed."""
    *plain, normed = layers
    chosen = [*plain[:-1], normed if options.last_state == "normed" else plain[-1]]
    raw = _view(chosen, RAW)
    directions = stacked_directions(raw, options.top_k)
    angles = principal_angles(directions)
    related = overlaps(directions, phases.members)
    return {
        "per_layer": [layer.row for layer in chosen],
        "last_layer_normed": normed.row,
        "last_layer_residual": plain[-1].row,
        "text": excerpt(sample.tokens, [layer.row for layer in chosen]),
        **reference_tables(related, phases),
        **_related(chosen, phases, sample, options),
        "directions": directions.astype(np.float32),
        "singular_values": np.stack([summary.singular_values for summary in raw]).astype(np.float32),
        "top1_cos": related.top1_cos.astype(np.float32),
        "principal_cosines": angles.cosines.astype(np.float32),
        "projection_distance": angles.projection_distance.astype(np.float32),
        "grassmann_distance": angles.grassmann_distance.astype(np.float32),
    }


def _related(
    layers: Sequence[LayerRecord], phases: Phases, sample: ResamplingGroups, options: Options
) -> dict[str, Any]:
    """Cross-layer statistics, raw and masked; and the verdict, on the masked view if there is one."""
    if not options.resampled:
        return {}
    overlap: dict[str, dict[str, Any]] = {}
    computed: dict[tuple[int, ...], dict[str, Any]] = {}
    for view in (view for view in COMPARED_VIEWS if view in layers[0].views):
        summaries = _view(layers, view)
        key = tuple(map(id, summaries))  # without sinks, the masked view is the raw one
        if key not in computed:
            arguments = (phases, sample, options.top_k, options.null_draws, options.seed)
            computed[key] = compare_layers(summaries, *arguments)
        overlap[view.name] = computed[key]
    return {"overlap": overlap, "verdict": verdicts(computed[key])}


def _view(layers: Sequence[LayerRecord], view: View) -> list[ViewSummary]:
    return [layer.views[view] for layer in layers]
