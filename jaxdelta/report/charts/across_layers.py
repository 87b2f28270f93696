"""The figures that compare layers: maps, phases and captures, with the values expected by chance."""

from collections.abc import Sequence
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
    measured,
    phase_bands,
)
from jaxdelta.report.result import Result
from jaxdelta.statistics.across_layers.nulls import isotropic_cos_mean
from jaxdelta.statistics.across_layers.verdict import OWN_RANK, SHARED_RANK, relative_rank


def overlaps(analysis: Result) -> Figure:
    """Maps of |cos| and principal angles between all layers, and |cos| of neighbours with chance."""
    k, d = analysis.directions.shape[1:]
    relations = (analysis.overlap or {}).get("raw", {})
    bands = phase_bands(analysis)
    cosines = np.abs(analysis.top1_cos)
    chance = isotropic_cos_mean(d)
    maps = [Heatmap("|cos| between first directions v_L", "|cos|", cosines, SHARE, chance, bands)]
    explained = ""
    if analysis.principal_cosines is not None:
        angles = analysis.principal_cosines.astype(np.float64)
        shared = np.square(angles).mean(axis=2)
        angle = _random_angle(k, d)
        smallest = np.degrees(np.arccos(np.clip(angles[:, :, 0], 0, 1)))
        maps += [
            Heatmap(f"Shared part of the first {k} directions", "mean cos² θ", shared, SHARE, k / d, bands),
            Heatmap("Smallest principal angle", "θ₁ (°)", smallest, (0.0, 90.0), angle, bands, reverse=True),
        ]
        explained = f"θ are the principal angles between the layers' {k} directions; "
    levels = ", ".join(f"{heatmap.label} {heatmap.chance:.3g}" for heatmap in maps)
    has_null = any("null_mean" in row for row in relations.get("adjacent", []))
    return Figure(
        "overlaps",
        "Which layers write the same directions",
        "Bright blocks along the diagonal are groups of layers that write along the same directions; lines "
        f"separate the phases; {explained}random directions give {levels}"
        + (", and chance for neighbours is drawn from their covariance." if has_null else "."),
        (*maps, *_neighbours(analysis, relations)),
    )


def phases(analysis: Result) -> Figure:
    """|cos| within phases, and the number of dimensions spanned by their first directions."""
    rows = phase_rows(analysis)
    if len(rows) == 1 and rows[0]["layers"] == 1:
        return Figure("phases", "Phases", "One layer: there is nothing to compare.")
    names = phase_axis([row["phase"] for row in rows])
    intra, numbers = [row["intra"] for row in rows], range(len(rows))
    left, right = ([number + shift for number in numbers] for shift in (-0.15, 0.15))
    cosines = [
        *_null(left, intra, kind="points"),
        with_intervals("within the phase", left, intra, BLUE, kind="points"),
        with_intervals("with all other layers", right, [row["cross"] for row in rows], GREEN, kind="points"),
    ]
    ranks = with_intervals("rank / layers", numbers, [relative_rank(row) for row in rows], BLUE, "points")
    panels = (
        Panel("|cos| of first directions", names, Axis("mean |cos|", range=SHARE), measured(cosines)),
        rank_panel(names, [ranks]),
    )
    reference = "the 95 % point of chance" if any("null_95" in row for row in intra) else "to all others"
    return Figure(
        "phases",
        "Phases",
        f"Layers of a phase share directions if they are closer to each other than {reference}; each layer "
        f"has its own direction if the rank is close to the number of layers{bars(analysis)}.",
        tuple(panel for panel in panels if panel.series),
    )


def phase_rows(analysis: Result) -> list[dict[str, Any]]:
    """The phases in the view of the verdict; without resampling, only their cosines."""
    if rows := _verdict_view(analysis).get("phases"):
        return rows
    several = len(analysis.phase_overlap) > 1
    return [
        {
            "phase": row["phase"],
            "layers": row["layers"],
            "intra": {"value": row["intra_cos_mean"] if row["layers"] > 1 else None},
            "cross": {"value": row["cross_cos_mean"] if several else None},
        }
        for row in analysis.phase_overlap
    ]


def phase_axis(names: Sequence[str]) -> Axis:
    """A categorical axis of phases."""
    return Axis("phase", range=(-0.5, len(names) - 0.5), names=tuple(map(str, names)))


def rank_panel(x: Axis, ranks: Sequence[Series]) -> Panel:
    """Rank of the stacked v_L over their number, by phase, with the verdict's thresholds; may be empty."""
    levels = [
        Series(name, x.range or (), [level, level], GREY, dash=dash)
        for name, level, dash in (("few (half)", SHARED_RANK, "dot"), ("its own each", OWN_RANK, "dash"))
    ]
    highest = max([1.0, *(bounds[1] for series in ranks for bounds in series.bounds if bounds)])
    axis = Axis("rank of the v_L / layers (ratio)", range=(0.0, highest))
    shown = measured(ranks)
    return Panel("Dimensions the first directions fill", x, axis, (*shown, *levels) if shown else ())


def captures(analysis: Result) -> Figure:
    """The share of each layer's first direction in its phase's leading directions, with chance."""
    rows = _verdict_view(analysis).get("layers")
    title = "What a phase shares"
    if not rows:
        rows = [{"L": row["L"], "capture": {"value": row["capture"]}} for row in analysis.block_capture]
    if not rows:
        return Figure("captures", title, "No phase has two layers: there is nothing to share.")
    layers = range(analysis.num_layers)
    by_number = {row["L"]: row for row in rows}
    rows = [by_number.get(layer, {}) for layer in layers]  # a gap where a layer is alone in its phase
    alignment = [row.get("alignment_index") for row in rows]
    index = Series("alignment of the whole update", layers, alignment, PURPLE, dash="dash")
    panels = []
    for key, name, more in (
        ("capture", "The layer among the phase's", []),
        ("leave_one_out", "The layer left out", [index]),
    ):
        entries = [row.get(key, {}) for row in rows]
        isotropic = [entry.get("isotropic_mean") for entry in entries]
        series = [
            with_intervals("captured", layers, entries, BLUE),
            *more,
            *_null(layers, entries),
            Series("random directions", layers, isotropic, YELLOW, dash="dot"),
        ]
        panels.append(by_layer(analysis, name, Axis("share of ‖v_L‖² (no unit)", range=SHARE), series))
    return Figure(
        "captures",
        title,
        "Share of v_L inside the first 8 directions of its phase. If these include the layer's own, chance "
        f"is high too, so only a value above chance with the layer left out is evidence{bars(analysis)}.",
        tuple(panel for panel in panels if panel.series),
    )


def _verdict_view(analysis: Result) -> dict[str, Any]:
    """The comparison of layers on which the verdict is based: without sinks if they were masked."""
    views = analysis.overlap or {}
    return views.get("masked") or views.get("raw") or {}


def _random_angle(k: int, d: int, draws: int = 50) -> float:
    """The mean smallest principal angle between two random k-dimensional subspaces of d, in degrees.

    One may be the first k axes; cos² are then the eigenvalues of (XᵀX)⁻¹ X₁ᵀX₁, X₁ the first k rows of X.
    """
    x = np.random.default_rng(0).normal(size=(draws, d, k))
    first = x[:, :k]
    squares = np.linalg.eigvals(np.linalg.solve(x.mT @ x, first.mT @ first)).real.max(axis=1)
    return float(np.degrees(np.arccos(np.sqrt(np.clip(squares, 0, 1)))).mean())


def _neighbours(analysis: Result, relations: dict[str, Any]) -> list[Panel]:
    """|cos| of neighbouring layers L and L+1, drawn at L + 1/2."""
    rows = relations.get("adjacent") or [
        {"L": layer, "abs_cos": abs(cosine)} for layer, cosine in enumerate(analysis.top1_cos_adjacent)
    ]
    between = [row["L"] + 0.5 for row in rows]
    cosines, bounds = [row["abs_cos"] for row in rows], [row.get("interval") for row in rows]
    pairs = [f"layers {row['L']} and {row['L'] + 1}" for row in rows]
    control = [abs(cosine) for cosine in (analysis.control or {}).get("top1_cos_adjacent", [])]
    isotropic = [isotropic_cos_mean(analysis.hidden)] * len(rows)
    series = [
        Series("run", between, cosines, BLUE, bounds=bounds, labels=pairs),
        Series("control", between[: len(control)], control, PURPLE, dash="dash"),
        *_null(between, rows),
        Series("random directions", between, isotropic, YELLOW, dash="dot"),
    ]
    y = Axis("|cos| of L and L+1", range=SHARE)
    panel = by_layer(analysis, "Neighbouring layers", y, series, hover="neighbouring layers")
    return [panel] if panel.series else []


def _null(x: Sequence[Number], entries: Sequence[dict[str, Any]], kind: str = "line") -> list[Series]:
    """The mean and the 95 % point of the null."""
    lines = (("mean", "null_mean", "dash"), ("95 % point", "null_95", "dot"))
    return [
        Series(f"chance, {name}", x, [entry.get(key) for entry in entries], GREY, kind, dash)
        for name, key, dash in lines
    ]


def with_intervals(
    name: str, x: Sequence[Number], entries: Sequence[dict[str, Any]], color: str, kind: str = "line"
) -> Series:
    """A series of JSON entries with their `value` and, if there is one, their `interval`."""
    values, bounds = [entry.get("value") for entry in entries], [entry.get("interval") for entry in entries]
    return Series(name, x, values, color, kind, bounds=bounds)
