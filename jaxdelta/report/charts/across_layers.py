"""The figures that relate layers: maps, phases, captures, each beside chance. See `contents`."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxdelta.report.charts.chart import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SHARE,
    YELLOW,
    Axis,
    Figure,
    Heatmap,
    Number,
    Panel,
    Series,
    bars,
    by_layer,
    phase_bands,
)
from jaxdelta.report.result import Result
from jaxdelta.statistics.across_layers.nulls import isotropic_cos_mean
from jaxdelta.statistics.across_layers.verdict import OWN_RANK, SHARED_RANK


def overlaps(analysis: Result) -> Figure:
    """How alike the directions of every two layers are, and neighbours beside chance."""
    k, d = analysis.directions.shape[1:]
    relations = (analysis.overlap or {}).get("raw", {})
    bands = phase_bands(analysis)
    cosines = np.abs(analysis.top1_cos)
    chance = isotropic_cos_mean(d)
    maps = [Heatmap("|cos| between first directions v_L", "|cos|", cosines, SHARE, chance, bands)]
    if analysis.principal_cosines is not None:
        angles = analysis.principal_cosines.astype(np.float64)
        shared = np.square(angles).mean(axis=2)
        angle = _random_angle(k, d)
        smallest = np.degrees(np.arccos(np.clip(angles[:, :, 0], 0, 1)))
        maps += [
            Heatmap(f"Shared part of the first {k} directions", "mean cos² θ", shared, SHARE, k / d, bands),
            Heatmap("Smallest principal angle", "θ₁ (°)", smallest, (0.0, 90.0), angle, bands, reverse=True),
        ]
    return Figure(
        "overlaps",
        "Which layers write the same directions",
        "Bright squares along the diagonal, within the lines that part the phases, are layers that share "
        f"directions; {_angles_said(k, analysis)}random directions give {_listed(maps)}"
        + (", and chance for neighbours is drawn from their covariance." if _has_null(relations) else "."),
        (*maps, *_neighbours(analysis, relations)),
    )


def phases(analysis: Result) -> Figure:
    """|cos| within phases, and the number of dimensions their directions fill."""
    rows = trusted(analysis).get("phases")
    if rows is None:  # a run without resampling, or of an older version
        rows = [
            {
                "phase": row["phase"],
                "layers": row["layers"],
                "intra": {"value": row["intra_cos_mean"] if row["layers"] > 1 else None},
                "cross": {"value": row["cross_cos_mean"] if len(analysis.phase_overlap) > 1 else None},
            }
            for row in analysis.phase_overlap
        ]
    names = Axis("phase", range=(-0.5, len(rows) - 0.5), names=tuple(str(row["phase"]) for row in rows))
    intra = [row["intra"] for row in rows]
    places = list(range(len(rows)))
    left, right = ([place + shift for place in places] for shift in (-0.15, 0.15))
    cosines = [
        *_null(left, intra, kind="points"),
        _figures("within the phase", left, intra, BLUE, kind="points"),
        _figures("with all other layers", right, [row["cross"] for row in rows], GREEN, kind="points"),
    ]
    panels = [Panel("|cos| of first directions", names, Axis("mean |cos|", range=SHARE), _measured(cosines))]
    if "stacked_rank" in rows[0]:
        ranks = [_divided(row["stacked_rank"], row["layers"]) if row["layers"] > 1 else {} for row in rows]
        levels = [
            Series(name, [-0.5, len(rows) - 0.5], [y, y], GREY, dash=dash)
            for name, y, dash in (("few (half)", SHARED_RANK, "dot"), ("its own each", OWN_RANK, "dash"))
        ]
        series = _measured([_figures("rank / layers", places, ranks, BLUE, kind="points"), *levels])
        highest = max([1.0, *(rank["interval"][1] for rank in ranks if "interval" in rank)])
        axis = Axis("rank of the v_L / layers (ratio)", range=(0.0, highest))
        panels.append(Panel("Dimensions the first directions fill", names, axis, series))
    if len(rows) == 1 and rows[0]["layers"] == 1:
        return Figure("phases", "Phases", "One layer: there is nothing to compare.")
    return Figure(
        "phases",
        "Phases",
        "Directions are shared where layers of a phase are closer to each other than "
        + ("chance's 95 % point" if any("null_95" in one for one in intra) else "to all others")
        + f", and each layer has its own where the rank is near their number{bars(analysis)}.",
        tuple(panels),
    )


def captures(analysis: Result) -> Figure:
    """How much of each layer's first direction lies in what its phase shares, beside chance."""
    rows = trusted(analysis).get("layers")
    title = "What a phase shares"
    if not rows:
        rows = [{"L": row["L"], "capture": {"value": row["capture"]}} for row in analysis.block_capture]
    if not rows:
        return Figure("captures", title, "No phase has two layers: there is nothing to share.")
    layers = list(range(analysis.num_layers))
    there = {row["L"]: row for row in rows}
    rows = [there.get(layer, {}) for layer in layers]  # a gap where a layer is alone in its phase
    panels = []
    for key, name in (("capture", "The layer among the phase's"), ("leave_one_out", "The layer left out")):
        found = [row.get(key, {}) for row in rows]
        index = Series(
            "alignment of the whole update",
            layers,
            [row.get("alignment_index") for row in rows],
            PURPLE,
            dash="dash",
        )
        isotropic = [each.get("isotropic_mean") for each in found]
        series = [
            _figures("captured", layers, found, BLUE),
            *([index] if key == "leave_one_out" else []),
            *_null(layers, found),
            Series("random directions", layers, isotropic, YELLOW, dash="dot"),
        ]
        axis = Axis("share of ‖v_L‖² (no unit)", range=SHARE)
        panels.append(by_layer(analysis, name, axis, series))
    return Figure(
        "captures",
        title,
        "How much of a layer's v_L lies in the first 8 directions of its phase; with the layer among them, "
        f"chance is high too, so only what is left out and above chance tells{bars(analysis)}.",
        tuple(panel for panel in panels if panel.series),
    )


def trusted(analysis: Result) -> dict[str, Any]:
    """The relations that the verdict is from: without sinks where they were masked; none without any."""
    views = analysis.overlap or {}
    return views.get("masked") or views.get("raw") or {}


def _angles_said(k: int, analysis: Result) -> str:
    if analysis.principal_cosines is None:
        return ""
    return f"θ are the principal angles between the layers' {k} directions; "


def _listed(maps: Sequence[Heatmap]) -> str:
    return ", ".join(f"{one.label} {one.chance:.3g}" for one in maps if one.chance is not None)


def _random_angle(k: int, d: int, draws: int = 50) -> float:
    """The mean smallest angle between k random directions of d and k others, in degrees.

    The others may be the first k axes: cos² are the eigenvalues of (XᵀX)⁻¹ X₁ᵀX₁, X₁ the first k rows of X.
    """
    x = np.random.default_rng(0).normal(size=(draws, d, k))
    first = x[:, :k]
    squares = np.linalg.eigvals(np.linalg.solve(x.mT @ x, first.mT @ first)).real.max(axis=1)
    return float(np.degrees(np.arccos(np.sqrt(np.clip(squares, 0, 1)))).mean())


def _has_null(relations: dict[str, Any]) -> bool:
    return any("null_mean" in row for row in relations.get("adjacent", []))


def _neighbours(analysis: Result, relations: dict[str, Any]) -> list[Panel]:
    """|cos| of neighbours: the row L is of layers L and L+1."""
    rows = relations.get("adjacent") or [
        {"L": layer, "abs_cos": abs(cosine)} for layer, cosine in enumerate(analysis.top1_cos_adjacent)
    ]
    places = [row["L"] + 0.5 for row in rows]
    run = Series(
        "run", places, [row["abs_cos"] for row in rows], BLUE, bounds=[row.get("interval") for row in rows]
    )
    control = (analysis.control or {}).get("top1_cos_adjacent", [])
    beside = Series("control", places[: len(control)], [abs(c) for c in control], PURPLE, dash="dash")
    level = isotropic_cos_mean(analysis.hidden)
    isotropic = Series("random directions", places, [level] * len(places), YELLOW, dash="dot")
    series = [run, beside, *_null(places, rows), isotropic]
    panel = by_layer(analysis, "Neighbouring layers", Axis("|cos| of L and L+1", range=SHARE), series)
    return [panel] if panel.series else []


def _null(x: Sequence[Number], found: Iterable[dict[str, Any]], kind: str = "line") -> list[Series]:
    """Chance's mean and 95 % point."""
    rows = list(found)
    means = Series("chance, mean", x, [row.get("null_mean") for row in rows], GREY, kind, "dash")
    return [means, Series("chance, 95 % point", x, [row.get("null_95") for row in rows], GREY, kind, "dot")]


def _figures(
    name: str, x: Sequence[Number], found: Sequence[dict[str, Any]], color: str, kind: str = "line"
) -> Series:
    bounds = [row.get("interval") for row in found]
    return Series(name, x, [row.get("value") for row in found], color, kind, bounds=bounds)


def _divided(figure: dict[str, Any], by: int) -> dict[str, Any]:
    """A figure and its interval over a number."""
    divided = {"value": figure["value"] / by}
    return divided | (
        {"interval": [bound / by for bound in figure["interval"]]} if "interval" in figure else {}
    )


def _measured(series: Iterable[Series]) -> tuple[Series, ...]:
    return tuple(one for one in series if any(value is not None for value in one.y))
