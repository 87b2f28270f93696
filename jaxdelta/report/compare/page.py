"""The page of a comparison: one HTML file."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from jaxdelta.report.charts.across_layers import phase_axis, rank_panel, with_intervals
from jaxdelta.report.charts.chart import (
    GREY,
    ORDER,
    SHARE,
    Axis,
    Figure,
    Heatmap,
    Number,
    Panel,
    Series,
    measured,
    phase_bands,
)
from jaxdelta.report.compare.compare import Comparison, Pair, Part, steadiness
from jaxdelta.report.compare.metrics import Measure
from jaxdelta.report.page_parts import as_file, bounded, document, element, figure_section, number, table
from jaxdelta.statistics.across_layers.verdict import relative_rank

DEPTH = Axis("relative depth (L + ½)/N", range=(0.0, 1.0), hover="depth %{x}")
WORDS = {
    "norms": (
        "How much the layers write",
        "Norms of update and state, their ratio, and whether a layer amplifies the state (cosine above 0) or "
        "erases it (below 0); means over tokens",
    ),
    "ranks": (
        "How many directions the layers write",
        "With a low effective rank the updates of all tokens lie along few directions; if the energy of the "
        "mean update is high too, the first direction is one vector added to every token; v_L is noise in "
        "layers where two halves of the text disagree on it",
    ),
    "ledger": (
        "What attention writes and what the MLP writes",
        "Shares of ‖δ‖²; their cross term is the rest to 1",
    ),
    "across": (
        "How the layers of each run relate",
        "|cos| of the first directions of neighbours, and the share of v_L in the first 8 directions of the "
        "other layers of its phase, which grows with their number",
    ),
}
METHOD = (
    "Layer L of N lies at relative depth (L + ½)/N and covers L/N to (L + 1)/N. The value of a band is the "
    "mean over layers, weighted by their length inside the band: geometric for a logarithmic axis, otherwise "
    "arithmetic. The ends of its interval are the means of the layers' ends; the deviation of a mean is at "
    "most the mean of the deviations, so the interval is conservative. Two 95 % intervals without overlap "
    "mean a difference at the 5 % level or below, whether or not the runs share a text; an overlap is no "
    "evidence of equality (Schenker & Gentleman 2001, The American Statistician 55:182). There is no "
    "correction for multiple comparisons: of a hundred equal statistics, up to five may be marked."
)


def page(comparison: Comparison) -> str:
    """The page as HTML."""
    drawn = [*_by_depth(comparison), _directions(comparison), _phase_figure(comparison)]
    return document(f"{_listed(comparison.labels)} – jaxdelta", _body(comparison, drawn), drawn)


def page_file(comparison: Comparison) -> bytes:
    """The page as the bytes of its file."""
    return as_file(page(comparison))


def _body(comparison: Comparison, drawn: Iterable[Figure]) -> Iterator[Element]:
    yield element("h1", f"{_listed(comparison.labels)} side by side")
    rows = [
        [row.name, *(element("mark", v) if row.other(i) else v for i, v in enumerate(row.values))]
        for row in comparison.settings
    ]
    yield element("p", f"Marked: differs from {comparison.labels[0]}.", class_="faint")
    yield table(("", *comparison.labels), rows, "The runs", "words")
    if comparison.cautions:
        yield element("ul", *(element("li", said) for said in comparison.cautions), class_="warnings")
    for figure in drawn:
        if figure.name == "phases":
            yield from _band_table(comparison)
        yield figure_section(figure)
    yield _phase_table(comparison)
    yield element("section", element("h2", "How it was compared"), element("p", METHOD))


def _by_depth(comparison: Comparison) -> Iterator[Figure]:
    for name, (title, caption) in WORDS.items():
        compared = [entry for entry in comparison.compared if entry.measure.figure == name]
        panels = [
            Panel(measure.title, DEPTH, measure.axis, tuple(_curves(comparison, measure)))
            for measure in dict.fromkeys(entry.measure for entry in compared)
        ]
        if panels:
            bounds = any(any(series.bounds) for panel in panels for series in panel.series)
            dashed = any(entry.view == "masked" for entry in compared)
            caption += "; bars are 95 % intervals over documents" if bounds else ""
            yield Figure(
                name, title, caption + ("; dashed: without sinks." if dashed else "."), tuple(panels)
            )


def _curves(comparison: Comparison, measure: Measure) -> Iterator[Series]:
    """One line per run, in its colour, and a dashed one for its masked view if that differs."""
    for compared in comparison.compared:
        if compared.measure is not measure:
            continue
        raw = compared.view == "raw"
        runs = zip(comparison.runs, comparison.labels, compared.curves, ORDER, strict=False)
        for run, label, curve, color in runs:
            if curve and (raw or curve != measure.curve(run, "raw")):
                yield Series(
                    label if raw else f"{label}, {compared.view}",
                    curve.depths,
                    curve.values,
                    color,
                    dash="solid" if raw else "dash",
                    bounds=curve.bounds,
                    labels=[_place(place) for place in curve.places],
                )


def _place(place: Number) -> str:
    low, high = math.floor(place), math.ceil(place)
    return f"layer {low}" if low == high else f"layers {low} and {high}"


def _directions(comparison: Comparison) -> Figure:
    title, pairs, labels = "Whether the runs write the same directions", comparison.pairs, comparison.labels
    if not pairs:
        return Figure("directions", title, comparison.left_out)
    k, layers = pairs[0].k, len(pairs[0].p)

    def panel(name: str, axis: str, matrix: str, level: float, more: Iterable[Series] = ()) -> Panel:
        diagonals = [(pair.other, np.diagonal(getattr(pair, matrix))) for pair in pairs]
        lines = [_line(f"{labels[0]} and {labels[i]}", values, ORDER[i]) for i, values in diagonals]
        random = _line("random directions", [level] * layers, GREY, "dot")
        return Panel(name, DEPTH, Axis(axis, range=SHARE), (*lines, *more, random))

    steady = [
        _line(f"{labels[run]}, other draws of its text", steadiness(comparison.runs[run]), ORDER[run], "dash")
        for run in (0, *(pair.other for pair in pairs))
    ]
    cos, shared = pairs[0].cos_chance, pairs[0].shared_chance
    part = f"Shared part of the first {k} directions"
    return Figure(
        "directions",
        title,
        "|cos| of the first directions of layer L in two runs, and the shared part of their first "
        f"{k} directions, θ their principal angles. Another run cannot be expected to come closer than "
        f"resampled documents of the run's own text (dashed). {comparison.left_out}".strip(),
        (
            panel("|cos| between the runs", "|cos| of both v_L (no unit)", "cosines", cos, measured(steady)),
            panel(part, "mean cos² θ (no unit)", "shared", shared),
            *(heatmap for pair in pairs for heatmap in _maps(comparison, pair)),
        ),
    )


def _line(name: str, values: Iterable[Any], color: str, dash: str = "solid") -> Series:
    y = [None if value is None else float(value) for value in values]
    return Series(name, [(layer + 0.5) / len(y) for layer in range(len(y))], y, color, dash=dash)


def _maps(comparison: Comparison, pair: Pair) -> tuple[Heatmap, Heatmap]:
    """Each layer of the first run with each layer of the other."""
    bands = phase_bands(comparison.runs[0])
    sides = f"{comparison.labels[0]} down, {comparison.labels[pair.other]} across"
    return (
        Heatmap(f"|cos| of v_L: {sides}", "|cos|", pair.cosines, SHARE, pair.cos_chance, bands),
        Heatmap(f"Shared part: {sides}", "mean cos² θ", pair.shared, SHARE, pair.shared_chance, bands),
    )


def _phase_figure(comparison: Comparison) -> Figure:
    names = list(dict.fromkeys(phase.row["phase"] for phase in comparison.phases))
    x, count = phase_axis(names), len(comparison.runs)
    intra, chance, rank = [], [], []
    for run, (label, color) in enumerate(zip(comparison.labels, ORDER, strict=False)):
        rows = [phase.row for phase in comparison.phases if phase.run == run]
        shift = (run - (count - 1) / 2) * 0.7 / count
        places = [names.index(row["phase"]) + shift for row in rows]
        within = [row["intra"] for row in rows]
        means = [entry.get("null_mean") for entry in within]
        intra.append(with_intervals(label, places, within, color, "points"))
        chance.append(Series(f"{label}, chance", places, means, color, "points", "dash"))
        rank.append(with_intervals(label, places, [relative_rank(row) for row in rows], color, "points"))
    cosines = Axis("mean |cos|", range=SHARE)
    panels = (Panel("|cos| within the phase", x, cosines, measured([*intra, *chance])), rank_panel(x, rank))
    return Figure(
        "phases",
        "Phases and verdicts",
        "A phase has the same name in every run, but may cover other layers; strokes are chance.",
        tuple(panel for panel in panels if panel.series),
    )


def _band_table(comparison: Comparison) -> Iterator[Element]:
    yield element("h2", "By bands of depth")
    legend = f"Marked: the 95 % interval does not overlap with that of {comparison.labels[0]}."
    yield element("p", legend, class_="faint")
    rows: list[Sequence[Any] | Element] = []
    for compared in comparison.compared:
        title = (compared.title, " ", element("small", compared.measure.axis.label))
        rows.append(element("tr", element("th", *title, colspan=str(comparison.bands + 1), scope="rowgroup")))
        for label, parts in zip(comparison.labels, compared.parts, strict=True):
            rows.append([label, *map(_cell, parts or (Part(None),) * comparison.bands)])
    yield table(("", *comparison.band_names), rows, "Statistics by bands of depth", "bands")


def _cell(part: Part) -> Element:
    value = element("mark" if part.apart else "span", number(part.value))
    if part.interval is None:
        return value
    low, high = (number(end, ".3g") for end in part.interval)
    return element("div", value, element("small", f"{low} … {high}"))


def _phase_table(comparison: Comparison) -> Element:
    head = ("phase", "run", "layers", "|cos| within", "95 %", "chance", "p against drift", "rank / N", "95 %")
    rows = [
        [
            phase.row["phase"],
            comparison.labels[phase.run],
            phase.layers,
            *bounded(phase.row["intra"]),
            number(phase.row["intra"].get("null_mean")),
            number(phase.row.get("gap_p"), ".3f"),
            *bounded(relative_rank(phase.row)),
            _verdict(phase.row),
        ]
        for phase in comparison.phases
    ]
    return table((*head, "verdict"), rows, "Phases and verdicts", "verdicts")


def _verdict(row: dict[str, Any]) -> Element:
    if not row.get("verdict"):
        return element("span", "–")
    return element("span", element("span", row["verdict"], class_=row["verdict"]), f": {row['why']}")


def _listed(labels: Iterable[str]) -> str:
    *most, last = labels
    return f"{', '.join(most)} and {last}"
