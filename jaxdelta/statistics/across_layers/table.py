"""The comparison of a view's layers, as in the JSON: overlaps, their nulls and intervals.

Axes: N layers, P phases, m draws of a null, B draws of documents.
"""

import dataclasses
import functools
import operator
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

ORDERS = 2000  # largest number of orders of segments in the phase test


def stacked_directions(layers: Sequence[ViewSummary], k: int) -> Float64[np.ndarray, "N k d"]:
    """The first k directions of each layer."""
    return np.stack([np.asarray(layer.basis)[:k] for layer in layers])


def reference_tables(overlap: Overlaps, phases: Phases) -> dict[str, Any]:
    """The reference's statistics: adjacent cosines, means per phase, captures in phases of several layers."""
    names, (p, layer) = np.array(phases.names), _together(phases).T
    sizes = phases.members.sum(axis=1)
    intra, cross = overlap.intra_cos_mean, overlap.cross_cos_mean
    means = {"phase": names, "layers": sizes, "intra_cos_mean": intra, "cross_cos_mean": cross}
    return {
        "top1_cos_adjacent": np.diagonal(overlap.top1_cos, 1).tolist(),
        "phase_overlap": records(means),
        "block_capture": records({"phase": names[p], "L": layer, "capture": overlap.capture[p, layer]}),
    }


@one_blas_thread()
def compare_layers(
    layers: Sequence[ViewSummary],
    phases: Phases,
    sample: ResamplingGroups,
    k: int,
    null_draws: int,
    seed: int,
) -> dict[str, Any]:
    """The comparison of the layers of one view by k directions each, with intervals and nulls.

    Without `null_draws` there are no nulls; `seed` is theirs.
    """
    directions, members = stacked_directions(layers, k), phases.members
    factors = [np.asarray(layer.factor) for layer in layers]
    with ThreadPoolExecutor(1, "draws") as background:
        drawn = background.submit(_draws, layers, members, k, sample) if sample.intervals else None
        nulls = _Nulls.drawn(factors, members, k, null_draws, seed) if null_draws else None
        overlap = overlaps(directions, members)
        values = np.stack([layer.singular_values for layer in layers])
        aligned = alignment_index(directions, members, factors, values)
        tested = _phase_test(overlap, phases)
        draws = drawn.result() if drawn else None
    present = np.any(directions[:, 0], axis=-1)
    bounds = _Bounds(draws, sample.documents)
    return {
        "isotropic_cos_mean": isotropic_cos_mean(directions.shape[2]),
        "adjacent": _adjacent(overlap, nulls, bounds, present, directions.shape[2]),
        "phases": _phases(overlap, phases, nulls, bounds),
        "layers": _layers(overlap, aligned, phases, nulls, bounds),
        "phase_test": tested,
        **({"v1_stability": _stability(draws.v1_cos[:, sample.documents :])} if draws else {}),
    }


def _draws(
    layers: Sequence[ViewSummary], members: Bool[np.ndarray, "P N"], k: int, sample: ResamplingGroups
) -> OverlapBootstrap:
    """The overlaps without each document, then in each draw of documents."""
    coupling = np.stack([np.asarray(layer.coupling) for layer in layers])
    basis = np.stack([layer.basis for layer in layers])
    weights = np.concatenate([sample.without, sample.draws])
    return bootstrap_overlaps(coupling, basis, k, weights, members)


@dataclasses.dataclass(frozen=True)
class _Nulls:
    """Nulls: the layers share only their covariance (`adjacent`, `matched`), or nothing (`isotropic`)."""

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
        """The nulls of k directions per layer."""
        rows = layer_draws(factors, members, k, draws, seed)
        return cls(
            adjacent_null(rows, draws),
            phase_nulls(rows, members, k, draws, seed),
            isotropic_means(members, k, factors[0].shape[1], seed),
        )


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """Intervals from draws of documents, if any; in the first draws each document is left out once."""

    draws: OverlapBootstrap | None
    documents: int

    def intervals(
        self, estimates: Float64[np.ndarray, " n"], name: str, where: Any = (), scale: str = "unit"
    ) -> list[dict[str, Any]]:
        """Entries of the JSON; empty without draws, or for an undefined estimate."""
        if self.draws is None:
            return [{} for _ in estimates]
        without, draws = np.split(getattr(self.draws, name)[where], [self.documents], axis=-1)
        bounds = np.stack(t_interval(estimates, without, scale, draws), axis=-1).tolist()
        defined = np.isfinite(estimates)
        return [{"interval": ends} if there else {} for ends, there in zip(bounds, defined, strict=True)]


def _adjacent(
    overlap: Overlaps, nulls: _Nulls | None, bounds: _Bounds, present: Any, d: int
) -> list[dict[str, Any]]:
    """|cos| of adjacent layers, with p-values adjusted over all pairs."""
    cosines = np.abs(np.diagonal(overlap.top1_cos, 1))
    rows = _joined(
        records({"L": np.arange(len(cosines)), "abs_cos": cosines}),
        bounds.intervals(cosines, "adjacent"),
        records({"isotropic_p": isotropic_p_value(cosines, d)}),
        _with_null(cosines, nulls.adjacent if nulls else None),
    )
    defined = present[1:] & present[:-1]
    for i in np.flatnonzero(~defined).tolist():
        rows[i] = {"L": i, "abs_cos": None, "note": "zero update: it has no directions"}
    if nulls is not None:
        _adjust([rows[i] for i in np.flatnonzero(defined)])
    return rows


def _phases(overlap: Overlaps, phases: Phases, nulls: _Nulls | None, bounds: _Bounds) -> list[dict[str, Any]]:
    """Per phase: cosines within and across, and the dimensions of its v_L, with nulls."""
    intra = bounds.intervals(overlap.intra_cos_mean, "intra")
    cross = bounds.intervals(overlap.cross_cos_mean, "cross")
    rank = bounds.intervals(overlap.stacked_rank, "stacked_rank", scale="log")
    chance = _with_null(overlap.intra_cos_mean, nulls.matched.intra if nulls else None)
    rows = []
    for p, (name, inside) in enumerate(zip(phases.names, phases.members, strict=True)):
        row: dict[str, Any] = {
            "phase": name,
            "layers": int(inside.sum()),
            "intra": {"value": None},
            "cross": {"value": None},
            "stacked_rank": {"value": float(overlap.stacked_rank[p])},
            "dimensions_90": int(overlap.dimensions_90[p]),
        }
        if inside.sum() > 1:
            row["intra"] = {"value": float(overlap.intra_cos_mean[p]), **intra[p], **chance[p]}
            row["stacked_rank"] |= rank[p]
        else:
            row["note"] = "one layer: nothing to compare within"
        if not inside.all():
            row["cross"] = {"value": float(overlap.cross_cos_mean[p]), **cross[p]}
        rows.append(row)
    return rows


def _layers(
    overlap: Overlaps,
    aligned: Float64[np.ndarray, "P N"],
    phases: Phases,
    nulls: _Nulls | None,
    bounds: _Bounds,
) -> list[dict[str, Any]]:
    """Per layer: the share of v_L, and of its whole update, in its phase's shared subspace."""
    p, layer = _together(phases).T

    def entries(name: str) -> list[dict[str, Any]]:
        values = getattr(overlap, name)[p, layer]
        columns = [records({"value": values}), bounds.intervals(values, name, (p, layer))]
        if nulls:
            columns.append(_with_null(values, getattr(nulls.matched, name)[p]))
            columns.append(records({"isotropic_mean": nulls.isotropic[name][p]}))
        return _joined(*columns)

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


def _phase_test(overlap: Overlaps, phases: Phases) -> dict[str, Any]:
    """The entry of `segment_test`."""
    test = segment_test(np.abs(overlap.top1_cos), phases.of_layer, ORDERS)
    return {
        "gap": _number(test.gap),
        "p_value": _number(test.p_value),
        "orders": test.orders,
        "exact": test.exact,
        "phases": [
            {"phase": name, "gap": _number(gap), "p_value": _number(p)}
            for name, gap, p in zip(phases.names, test.phase_gap, test.phase_p_value, strict=True)
        ],
    }


def _stability(cosines: Float64[np.ndarray, "N B"]) -> list[dict[str, Any]]:
    """Median and 5 % quantile of |cos| between a layer's v and that of each draw of documents."""
    low, median = np.quantile(cosines, [0.05, 0.5], axis=1)
    return records({"L": np.arange(len(cosines)), "median": median, "low": low})


def _with_null(
    values: Float64[np.ndarray, " n"], null: Float64[np.ndarray, "n m"] | None
) -> list[dict[str, float]]:
    """Mean and 95 % quantile of each value's null, its p-value and its excess over the mean."""
    if null is None:
        return [{} for _ in values]
    mean, high = null.mean(axis=-1), np.quantile(null, 0.95, axis=-1)
    p = p_value(values, null)
    return records({"null_mean": mean, "null_95": high, "null_p": p, "excess": values - mean})


def _joined(*columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of all entries of a layer, or of a pair of layers."""
    return [functools.reduce(operator.or_, entries) for entries in zip(*columns, strict=True)]


def _adjust(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its p-value adjusted over all rows (Benjamini & Hochberg)."""
    adjusted = benjamini_hochberg(np.array([row["null_p"] for row in rows]))
    for row, q in zip(rows, adjusted, strict=True):
        row["null_q"] = float(q)


def _together(phases: Phases) -> Int[np.ndarray, "n 2"]:
    """(phase, layer) of each layer that is not alone in its phase."""
    members = phases.members
    return np.argwhere(members & (members.sum(axis=1, keepdims=True) > 1))


def _number(value: Any) -> float | None:
    """A number of the JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None
