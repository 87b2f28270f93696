"""What relates the layers of a view, by the names it has in the JSON: overlaps, their nulls and intervals.

Axes: N layers, P phases, m draws of a null, B draws of documents.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.spectra.view_summary import ViewSummary
from jaxdelta.statistics.across_layers.bootstrap import OverlapBootstrap, bootstrap_overlaps
from jaxdelta.statistics.across_layers.nulls import (
    PhaseNulls,
    adjacent_null,
    isotropic_cos_mean,
    isotropic_means,
    isotropic_p_value,
    layer_draws,
    phase_nulls,
)
from jaxdelta.statistics.across_layers.overlap import Overlaps, overlaps
from jaxdelta.statistics.across_layers.phase_test import segment_test
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.across_layers.subspaces import alignment_index
from jaxdelta.statistics.intervals import benjamini_hochberg, p_value, t_interval
from jaxdelta.statistics.layer_row import records
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.utils.arrays import AnyArray

ORDERS = 2000  # of segments tried by the phase test


def stacked_directions(layers: Sequence[ViewSummary], k: int) -> Float64[np.ndarray, "N k d"]:
    """The first k directions of all layers."""
    return np.stack([np.asarray(layer.basis)[:k] for layer in layers])


def reference_tables(found: Overlaps, phases: Phases) -> dict[str, Any]:
    """The reference's figures: adjacent cosines, phases' means, captures where a phase has two layers."""
    return {
        "top1_cos_adjacent": np.diagonal(found.top1_cos, 1).tolist(),
        "phase_overlap": [
            {
                "phase": name,
                "layers": int(inside.sum()),
                "intra_cos_mean": float(found.intra_cos_mean[p]),
                "cross_cos_mean": float(found.cross_cos_mean[p]),
            }
            for p, (name, inside) in enumerate(zip(phases.names, phases.members, strict=True))
        ],
        "block_capture": [
            {"phase": phases.names[p], "L": layer, "capture": float(found.capture[p, layer])}
            for p, layer in _together(phases).tolist()
        ],
    }


@one_blas_thread
def compare_layers(
    layers: Sequence[ViewSummary],
    phases: Phases,
    sample: ResamplingGroups,
    k: int,
    null_draws: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that relates the layers of one view, each figure beside chance and with its interval."""
    directions, members = stacked_directions(layers, k), phases.members
    factors = [np.asarray(layer.factor) for layer in layers]
    with ThreadPoolExecutor(1, "draws") as beside:
        drawn = beside.submit(_draws, layers, members, k, sample) if sample.intervals else None
        nulls = _Nulls.drawn(factors, members, k, null_draws, seed) if null_draws else None
        found = overlaps(directions, members)
        values = np.stack([figures.singular_values for figures in layers])
        aligned = alignment_index(directions, members, factors, values)
        tested = _phase_test(found, phases)
        draws = drawn.result() if drawn else None
    present = np.any(directions[:, 0], axis=-1)
    bounds = _Bounds(draws, sample.documents)
    return {
        "isotropic_cos_mean": isotropic_cos_mean(directions.shape[2]),
        "adjacent": _adjacent(found, nulls, bounds, present, directions.shape[2]),
        "phases": _phases(found, phases, nulls, bounds),
        "layers": _layers(found, aligned, phases, nulls, bounds),
        **tested,
        **({"v1_stability": _stability(draws.v1_cos[:, sample.documents :])} if draws else {}),
    }


def _draws(
    layers: Sequence[ViewSummary], members: Bool[np.ndarray, "P N"], k: int, sample: ResamplingGroups
) -> OverlapBootstrap:
    """The overlaps without each document, then in each draw of documents."""
    coupling = np.stack([np.asarray(layer.coupling) for layer in layers])
    basis = np.stack([figures.basis for figures in layers])
    weights = np.concatenate([sample.without, sample.draws])
    return bootstrap_overlaps(coupling, basis, k, weights, members)


@dataclasses.dataclass(frozen=True)
class _Nulls:
    """What chance gives, had the layers their covariance in common, or nothing."""

    adjacent: Float64[np.ndarray, "pairs m"]
    matched: PhaseNulls
    isotropic: dict[str, Float64[np.ndarray, " P"]]

    @classmethod
    def drawn(
        cls,
        factors: Sequence[Float32[np.ndarray, "_ d"]],
        members: Bool[np.ndarray, "P N"],
        k: int,
        draws: int,
        seed: int,
    ) -> "_Nulls":
        """So many draws of each, for k directions of each layer."""
        rows = layer_draws(factors, members, k, draws, seed)
        return cls(
            adjacent_null(rows, draws),
            phase_nulls(rows, members, k, draws, seed),
            isotropic_means(members, k, factors[0].shape[1], seed),
        )


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """Intervals from draws of documents, where there are any; in the first draws each is left out once."""

    draws: OverlapBootstrap | None
    documents: int

    def intervals(
        self, estimates: Float64[AnyArray, " n"], name: str, where: Any = (), scale: str = "unit"
    ) -> list[dict[str, Any]]:
        """As entries of the JSON; nothing without draws, or of a figure that is not defined."""
        if self.draws is None:
            return [{} for _ in estimates]
        without, draws = np.split(getattr(self.draws, name)[where], [self.documents], axis=-1)
        bounds = np.stack(t_interval(np.asarray(estimates), without, scale, draws), axis=-1).tolist()
        defined = np.isfinite(estimates)
        return [{"interval": ends} if there else {} for ends, there in zip(bounds, defined, strict=True)]


def _adjacent(
    found: Overlaps, nulls: _Nulls | None, bounds: _Bounds, present: Any, d: int
) -> list[dict[str, Any]]:
    """|cos| of neighbours; p-values are adjusted over the neighbours (Benjamini & Hochberg)."""
    cosines = np.abs(np.diagonal(found.top1_cos, 1))
    figures = zip(
        records({"L": np.arange(len(cosines)), "abs_cos": cosines}),
        bounds.intervals(cosines, "adjacent"),
        records({"isotropic_p": isotropic_p_value(cosines, d)}),
        _with_null(cosines, nulls.adjacent if nulls else None),
        strict=True,
    )
    rows = [place | interval | isotropic | chance for place, interval, isotropic, chance in figures]
    defined = present[1:] & present[:-1]
    for i in np.flatnonzero(~defined).tolist():
        rows[i] = {"L": i, "abs_cos": None, "note": "zero update: it has no directions"}
    if nulls is not None:
        _adjust([rows[i] for i in np.flatnonzero(defined)])
    return rows


def _phases(found: Overlaps, phases: Phases, nulls: _Nulls | None, bounds: _Bounds) -> list[dict[str, Any]]:
    """Per phase: its cosines, how many dimensions its v_L span, and chance."""
    intra = bounds.intervals(found.intra_cos_mean, "intra")
    cross = bounds.intervals(found.cross_cos_mean, "cross")
    rank = bounds.intervals(found.stacked_rank, "stacked_rank", scale="log")
    chance = _with_null(found.intra_cos_mean, nulls.matched.intra if nulls else None)
    rows = []
    for p, (name, inside) in enumerate(zip(phases.names, phases.members, strict=True)):
        row: dict[str, Any] = {
            "phase": name,
            "layers": int(inside.sum()),
            "intra": {"value": None},
            "cross": {"value": None},
            "stacked_rank": {"value": float(found.stacked_rank[p])},
            "dimensions_90": int(found.dimensions_90[p]),
        }
        if inside.sum() > 1:
            row["intra"] = {"value": float(found.intra_cos_mean[p]), **intra[p], **chance[p]}
            row["stacked_rank"] |= rank[p]
        else:
            row["note"] = "one layer: nothing to compare within"
        if not inside.all():
            row["cross"] = {"value": float(found.cross_cos_mean[p]), **cross[p]}
        rows.append(row)
    return rows


def _layers(
    found: Overlaps,
    aligned: Float64[np.ndarray, "P N"],
    phases: Phases,
    nulls: _Nulls | None,
    bounds: _Bounds,
) -> list[dict[str, Any]]:
    """Per layer: how much of v_L, and of its whole update, lies in what its phase shares."""
    p, layer = _together(phases).T

    def entries(name: str) -> list[dict[str, Any]]:
        values = getattr(found, name)[p, layer]
        intervals = bounds.intervals(values, name, (p, layer))
        chance = _with_null(values, getattr(nulls.matched, name)[p] if nulls else None)
        isotropic = records({"isotropic_mean": nulls.isotropic[name][p]}) if nulls else chance
        figures = zip(records({"value": values}), intervals, chance, isotropic, strict=True)
        return [value | interval | beside | mean for value, interval, beside, mean in figures]

    captures, alone = entries("capture"), entries("leave_one_out")
    if nulls:
        _adjust(alone)
    return [
        {
            "L": int(layer[i]),
            "phase": phases.names[p[i]],
            "capture": captures[i],
            "leave_one_out": alone[i],
            "alignment_index": _number(aligned[p[i], layer[i]]),
        }
        for i in range(len(layer))
    ]


def _phase_test(found: Overlaps, phases: Phases) -> dict[str, Any]:
    """Are layers of a phase closer than layers equally far apart that are not: see `segment_test`."""
    test = segment_test(np.abs(found.top1_cos), phases.of_layer, ORDERS)
    return {
        "phase_test": {
            "gap": _number(test.gap),
            "p_value": _number(test.p_value),
            "orders": test.orders,
            "exact": test.exact,
            "phases": [
                {"phase": name, "gap": _number(gap), "p_value": _number(p)}
                for name, gap, p in zip(phases.names, test.phase_gap, test.phase_p_value, strict=True)
            ],
        }
    }


def _stability(cosines: Float64[np.ndarray, "N B"]) -> list[dict[str, Any]]:
    """|cos| between a layer's v and that of other draws of documents: its median and its 5 % point."""
    low, middle = np.quantile(cosines, [0.05, 0.5], axis=1)
    return [
        {"L": i, "median": float(m), "low": float(b)}
        for i, (m, b) in enumerate(zip(middle, low, strict=True))
    ]


def _with_null(
    values: Float64[AnyArray, " n"], null: Float64[np.ndarray, "n m"] | None
) -> list[dict[str, float]]:
    """Of each value chance's mean and 95 % point, its p-value, what is above chance; of no null nothing."""
    if null is None:
        return [{} for _ in values]
    mean = null.mean(axis=-1)
    return records(
        {
            "null_mean": mean,
            "null_95": np.quantile(null, 0.95, axis=-1),
            "null_p": p_value(np.asarray(values), null),
            "excess": values - mean,
        }
    )


def _adjust(figures: list[dict[str, Any]]) -> None:
    """Adds to each its p-value adjusted over all of them (Benjamini & Hochberg)."""
    adjusted = benjamini_hochberg(np.array([figure["null_p"] for figure in figures]))
    for figure, q in zip(figures, adjusted, strict=True):
        figure["null_q"] = float(q)


def _together(phases: Phases) -> Int[np.ndarray, "n 2"]:
    """(phase, layer) of every layer that is not alone in its phase."""
    members = phases.members
    return np.argwhere(members & (members.sum(axis=1, keepdims=True) > 1))


def _number(value: Any) -> float | None:
    """For the JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None
