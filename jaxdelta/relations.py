"""What relates the layers of a view, by the names it has in the JSON: overlaps, their nulls and intervals.

Axes: N layers, P phases, m draws of a null, B draws of documents.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64

from jaxdelta.measure import ViewFigures
from jaxdelta.nulls import PhaseNulls, adjacent_null, isotropic_means, layer_draws, phase_nulls
from jaxdelta.overlap import Overlaps, overlaps
from jaxdelta.resampling import OverlapDraws, resampled_overlaps
from jaxdelta.rows import Sample
from jaxdelta.significance import (
    benjamini_hochberg,
    isotropic_cos_mean,
    isotropic_p_value,
    p_value,
    segment_test,
    t_interval,
)
from jaxdelta.subspaces import alignment_index, one_blas_thread

ORDERS = 2000  # of segments tried by the phase test


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phase of each layer, the phases' names in order, and which layers each has."""

    of_layer: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Every phase once, in order."""
        return list(dict.fromkeys(self.of_layer))

    @property
    def members(self) -> Bool[np.ndarray, "P N"]:
        """Which layers belong to which phase."""
        return np.array([[phase == name for phase in self.of_layer] for name in self.names])


def stacked_directions(layers: Sequence[ViewFigures]) -> Float64[np.ndarray, "N k d"]:
    """The directions of all layers."""
    return np.stack([figures.directions for figures in layers])


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
            for p, layer in _together(phases)
        ],
    }


@one_blas_thread
def relate(
    layers: Sequence[ViewFigures], phases: Phases, sample: Sample, null_draws: int, seed: int
) -> dict[str, Any]:
    """Everything that relates the layers of one view, each figure beside chance and with its interval."""
    directions, members = stacked_directions(layers), phases.members
    k, kept = directions.shape[1], [figures.crossed for figures in layers]
    factors = [np.asarray(one.factor) for one in kept if one is not None]
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
    layers: Sequence[ViewFigures], members: Bool[np.ndarray, "P N"], k: int, sample: Sample
) -> OverlapDraws:
    """The overlaps without each document, then in each draw of documents."""
    coupling = np.stack([figures.crossed.coupling for figures in layers if figures.crossed is not None])
    basis = np.stack([figures.basis for figures in layers])
    weights = np.concatenate([sample.without, sample.draws])
    return resampled_overlaps(coupling, basis, k, weights, members)


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

    draws: OverlapDraws | None
    documents: int

    def interval(self, estimate: Any, name: str, where: Any, scale: str = "unit") -> dict[str, Any]:
        """As an entry of the JSON; nothing without draws, or of a figure that is not defined."""
        if self.draws is None or not np.isfinite(estimate):
            return {}
        without, draws = np.split(getattr(self.draws, name)[where], [self.documents])
        low, high = t_interval(estimate, without, scale, draws)
        return {"interval": [float(low), float(high)]}


def _adjacent(
    found: Overlaps, nulls: _Nulls | None, bounds: _Bounds, present: Any, d: int
) -> list[dict[str, Any]]:
    """|cos| of neighbours; p-values are adjusted over the neighbours (Benjamini & Hochberg)."""
    cosines = np.abs(np.diagonal(found.top1_cos, 1))
    defined = present[1:] & present[:-1]
    isotropic = isotropic_p_value(cosines, d)
    rows: list[dict[str, Any]] = []
    for i, cosine in enumerate(cosines):
        if not defined[i]:
            rows.append({"L": i, "abs_cos": None, "note": "zero update: it has no directions"})
            continue
        figure = {"abs_cos": float(cosine), **bounds.interval(cosine, "adjacent", i)}
        chance = {"isotropic_p": float(isotropic[i])}
        if nulls is not None:
            chance |= _beside(cosine, nulls.adjacent[i])
        rows.append({"L": i, **figure, **chance})
    if nulls is not None:
        _adjust([row for row, there in zip(rows, defined, strict=True) if there])
    return rows


def _phases(found: Overlaps, phases: Phases, nulls: _Nulls | None, bounds: _Bounds) -> list[dict[str, Any]]:
    """Per phase: its cosines, how many dimensions its v_L span, and chance."""
    rows = []
    for p, (name, inside) in enumerate(zip(phases.names, phases.members, strict=True)):
        several = inside.sum() > 1
        intra, cross = float(found.intra_cos_mean[p]), float(found.cross_cos_mean[p])
        row: dict[str, Any] = {
            "phase": name,
            "layers": int(inside.sum()),
            "intra": {"value": intra if several else None},
            "cross": {"value": cross if not inside.all() else None},
            "stacked_rank": {"value": float(found.stacked_rank[p])},
            "dimensions_90": int(found.dimensions_90[p]),
        }
        if several:
            row["intra"] |= bounds.interval(intra, "intra", p)
            row["stacked_rank"] |= bounds.interval(found.stacked_rank[p], "stacked_rank", p, "log")
        else:
            row["note"] = "one layer: nothing to compare within"
        if not inside.all():
            row["cross"] |= bounds.interval(cross, "cross", p)
        if nulls and several:
            row["intra"] |= _beside(intra, nulls.matched.intra[p])
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
    rows = []
    for p, layer in _together(phases):
        row: dict[str, Any] = {"L": layer, "phase": phases.names[p]}
        for name in ("capture", "leave_one_out"):
            value = getattr(found, name)[p, layer]
            row[name] = {"value": float(value), **bounds.interval(value, name, (p, layer))}
            if nulls:
                row[name] |= _beside(value, getattr(nulls.matched, name)[p])
                row[name]["isotropic_mean"] = float(nulls.isotropic[name][p])
        rows.append(row | {"alignment_index": _number(aligned[p, layer])})
    if nulls:
        _adjust([row["leave_one_out"] for row in rows])
    return rows


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


def _beside(value: float, null: Float64[np.ndarray, " m"]) -> dict[str, float]:
    """Chance's mean and 95 % point, the p-value, and what is above chance."""
    mean = float(null.mean())
    return {
        "null_mean": mean,
        "null_95": float(np.quantile(null, 0.95)),
        "null_p": float(p_value(value, null)),
        "excess": float(value) - mean,
    }


def _adjust(figures: list[dict[str, Any]]) -> None:
    """Adds to each its p-value adjusted over all of them (Benjamini & Hochberg)."""
    adjusted = benjamini_hochberg(np.array([figure["null_p"] for figure in figures]))
    for figure, q in zip(figures, adjusted, strict=True):
        figure["null_q"] = float(q)


def _together(phases: Phases) -> list[tuple[int, int]]:
    """(phase, layer) of every layer that is not alone in its phase."""
    return [
        (p, int(layer))
        for p, inside in enumerate(phases.members)
        if inside.sum() > 1
        for layer in np.flatnonzero(inside)
    ]


def _number(value: Any) -> float | None:
    """For the JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None
