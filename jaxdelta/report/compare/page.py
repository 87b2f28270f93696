"""One HTML file that sets runs beside each other and opens from disk: see `compare` for what is in it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from jaxdelta.report.charts.chart import GREY, ORDER, SHARE, Axis, Figure, Heatmap, Panel, Series, phase_bands
from jaxdelta.report.compare.compare import Comparison, Pair, Part, relative_rank, steadiness
from jaxdelta.report.compare.metrics import Curve, Measure
from jaxdelta.report.page_parts import as_file, bounded, document, element, figure_section, number, table
from jaxdelta.statistics.across_layers.verdict import OWN_RANK, SHARED_RANK

DEPTH = Axis("relative depth (L + ½)/N", range=(0.0, 1.0), place="depth")
WORDS = {
    "norms": (
        "How much the layers write",
        "The update's length and the state's, their ratio, and whether a layer amplifies what is there "
        "(cosine above 0) or erases it (below 0); means over tokens",
    ),
    "ranks": (
        "How many directions the layers write",
        "A low rank and much energy along v_L mean that a layer writes one thing for all tokens, which may "
        "be the mean update; v_L is noise where two halves of the text disagree on it",
    ),
    "ledger": (
        "What attention writes and what the MLP writes",
        "Shares of ‖δ‖²; their cross term is what is missing to 1",
    ),
    "across": (
        "How the layers of each run relate",
        "|cos| of the first directions of neighbours, and how much of v_L lies in the first 8 directions of "
        "its phase without it; the more layers a phase has, the more it can hold",
    ),
}
METHOD = (
    "Layer L of N lies at relative depth (L + ½)/N and fills the stretch from L/N to (L + 1)/N. A band's "
    "figure is the mean over layers, weighted by the length of their stretch within the band: geometric "
    "where the figure's axis is logarithmic, arithmetic elsewhere. Its interval goes from the mean of the "
    "layers' lower ends to that of the upper ones; the deviation of a mean is at most the mean of the "
    "deviations, so this is too wide rather than too narrow. Two intervals of 95 % that do not overlap "
    "mean a difference at the 5 % level or below, whether or not the runs share a text; that two overlap "
    "says nothing (Schenker & Gentleman 2001, The American Statistician 55:182). No correction is made "
    "for the number of figures: of a hundred equal ones, up to five may be marked."
)


def page(found: Comparison) -> str:
    """The page."""
    drawn = figures(found)
    return document(f"{_listed(found.labels)} – jaxdelta", _body(found, drawn), drawn)


def page_file(found: Comparison) -> bytes:
    """The page as the bytes of its file."""
    return as_file(page(found))


def figures(found: Comparison) -> list[Figure]:
    """All figures that there is something to show in, in the order of the page."""
    return [*_by_depth(found), _directions(found), _phase_figure(found)]


def _body(found: Comparison, drawn: Iterable[Figure]) -> Iterator[Element]:
    yield element("h1", f"{_listed(found.labels)} side by side")
    rows = [
        [row.name, *(element("mark", v) if row.other(i) else v for i, v in enumerate(row.values))]
        for row in found.settings
    ]
    yield element("p", f"Marked: what is not as in {found.labels[0]}.", class_="faint")
    yield table(("", *found.labels), rows, "The runs", "words")
    if found.cautions:
        yield element("ul", *(element("li", said) for said in found.cautions), class_="warnings")
    for figure in drawn:
        if figure.name == "phases":
            yield from _band_table(found)
        yield figure_section(figure)
    yield _phase_table(found)
    yield element("section", element("h2", "How it was compared"), element("p", METHOD))


def _by_depth(found: Comparison) -> Iterator[Figure]:
    for name, (title, caption) in WORDS.items():
        measures = dict.fromkeys(one.measure for one in found.compared if one.measure.figure == name)
        panels = [
            Panel(measure.title, DEPTH, measure.axis, tuple(_curves(found, measure))) for measure in measures
        ]
        if panels:
            bounds = any(any(series.bounds) for panel in panels for series in panel.series)
            said = caption + ("; bars are 95 % intervals over documents" if bounds else "")
            dashed = any(one.view == "masked" for one in found.compared if one.measure in measures)
            yield Figure(name, title, said + ("; dashed: without sinks." if dashed else "."), tuple(panels))


def _curves(found: Comparison, measure: Measure) -> Iterator[Series]:
    """A line a run, in its colour, and a dashed one where it has sinks and they are masked."""
    for compared in found.compared:
        if compared.measure is not measure:
            continue
        raw = compared.view == "raw"
        for run, label, curve, color in zip(found.runs, found.labels, compared.curves, ORDER, strict=False):
            if curve and (raw or curve != measure.curve(run, "raw")):
                yield Series(
                    label if raw else f"{label}, {compared.view}",
                    curve.depths,
                    curve.values,
                    color,
                    dash="solid" if raw else "dash",
                    bounds=curve.bounds,
                    labels=_places(curve),
                )


def _places(curve: Curve) -> list[str]:
    between = [(math.floor(place), math.ceil(place)) for place in curve.places]
    return [f"layer {low}" if low == high else f"layers {low} and {high}" for low, high in between]


def _directions(found: Comparison) -> Figure:
    title = "Whether the runs write the same directions"
    if not found.pairs:
        return Figure("directions", title, found.left_out)
    first, labels = found.pairs[0], found.labels
    names = {pair.other: f"{labels[0]} and {labels[pair.other]}" for pair in found.pairs}
    cosines = [_line(names[each.other], np.diagonal(each.cosines), ORDER[each.other]) for each in found.pairs]
    shared = [_line(names[each.other], np.diagonal(each.shared), ORDER[each.other]) for each in found.pairs]
    steady = [
        _line(f"{labels[run]}, other draws of its text", steadiness(found.runs[run]), ORDER[run], "dash")
        for run in (0, *names)
    ]
    levels = [
        (_line("random directions", [level] * len(first.p), GREY, "dot"),)
        for level in (first.cos_chance, first.shared_chance)
    ]
    part = f"Shared part of the first {first.k} directions"
    both, squares = (
        Axis("|cos| of both v_L (no unit)", range=SHARE),
        Axis("mean cos² θ (no unit)", range=SHARE),
    )
    return Figure(
        "directions",
        title,
        "|cos| of the first directions of layer L in two runs, and the shared part of their first "
        f"{first.k} directions, θ their principal angles. No other run can be expected to come closer than "
        f"the run's own text drawn anew (dashed). {found.left_out}".strip(),
        (
            Panel("|cos| between the runs", DEPTH, both, (*cosines, *_measured(steady), *levels[0])),
            Panel(part, DEPTH, squares, (*shared, *levels[1])),
            *(one for pair in found.pairs for one in _maps(found, pair)),
        ),
    )


def _line(name: str, values: Iterable[Any], color: str, dash: str = "solid") -> Series:
    y = [None if value is None else float(value) for value in values]
    return Series(name, [(layer + 0.5) / len(y) for layer in range(len(y))], y, color, dash=dash)


def _maps(found: Comparison, pair: Pair) -> tuple[Heatmap, Heatmap]:
    """Every layer of the first run beside every layer of the other."""
    bands = phase_bands(found.runs[0])
    places = f"{found.labels[0]} down, {found.labels[pair.other]} across"
    return (
        Heatmap(f"|cos| of v_L: {places}", "|cos|", pair.cosines, SHARE, pair.cos_chance, bands),
        Heatmap(f"Shared part: {places}", "mean cos² θ", pair.shared, SHARE, pair.shared_chance, bands),
    )


def _phase_figure(found: Comparison) -> Figure:
    names = list(dict.fromkeys(phase.row["phase"] for phase in found.phases))
    x = Axis("phase", range=(-0.5, len(names) - 0.5), names=tuple(names))
    step = 0.7 / len(found.runs)
    intra, chance, rank = [], [], []
    for run, (label, color) in enumerate(zip(found.labels, ORDER, strict=False)):
        rows = [phase.row for phase in found.phases if phase.run == run]
        places = [names.index(row["phase"]) + (run - (len(found.runs) - 1) / 2) * step for row in rows]
        within = [row["intra"] for row in rows]
        intra.append(_points(label, places, within, color))
        means = [one.get("null_mean") for one in within]
        chance.append(Series(f"{label}, chance", places, means, color, "points", "dash"))
        stacked = [relative_rank(row) for row in rows]
        rank.append(_points(label, places, stacked, color))
    levels = [
        Series(name, [-0.5, len(names) - 0.5], [y, y], GREY, dash=dash)
        for name, y, dash in (("few (half)", SHARED_RANK, "dot"), ("its own each", OWN_RANK, "dash"))
    ]
    highest = max([1.0, *(bounds[1] for series in rank for bounds in series.bounds if bounds)])
    panels = [
        Panel("|cos| within the phase", x, Axis("mean |cos|", range=SHARE), _measured([*intra, *chance])),
        Panel(
            "Dimensions the first directions fill",
            x,
            Axis("rank of the v_L / layers (ratio)", range=(0.0, highest)),
            (*shown, *levels) if (shown := _measured(rank)) else (),
        ),
    ]
    return Figure(
        "phases",
        "Phases and verdicts",
        "A phase has the same name in every run, but as many layers as its run gives it; strokes are chance.",
        tuple(panel for panel in panels if panel.series),
    )


def _band_table(found: Comparison) -> Iterator[Element]:
    yield element("h2", "By bands of depth")
    yield element("p", f"Marked: interval of 95 % apart from that of {found.labels[0]}.", class_="faint")
    rows: list[Sequence[Any] | Element] = []
    for compared in found.compared:
        said = (compared.title, " ", element("small", compared.measure.axis.label))
        rows.append(element("tr", element("th", *said, colspan=str(found.bands + 1), scope="rowgroup")))
        for label, parts in zip(found.labels, compared.parts, strict=True):
            rows.append([label, *map(_cell, parts or (Part(None),) * found.bands)])
    yield table(("", *found.band_names), rows, "Figures by bands of depth", "bands")


def _cell(part: Part) -> Element:
    value = element("mark" if part.apart else "span", number(part.value))
    if part.interval is None:
        return value
    low, high = (number(end, ".3g") for end in part.interval)
    return element("div", value, element("small", f"{low} … {high}"))


def _phase_table(found: Comparison) -> Element:
    head = ("phase", "run", "layers", "|cos| within", "95 %", "chance", "p against drift", "rank / N", "95 %")
    rows = [
        [
            phase.row["phase"],
            found.labels[phase.run],
            phase.layers,
            *bounded(phase.row["intra"]),
            number(phase.row["intra"].get("null_mean")),
            number(phase.row.get("gap_p"), ".3f"),
            *bounded(relative_rank(phase.row)),
            _verdict(phase.row),
        ]
        for phase in found.phases
    ]
    return table((*head, "verdict"), rows, "Phases and verdicts", "verdicts")


def _verdict(row: dict[str, Any]) -> Element:
    if not row.get("verdict"):
        return element("span", "–")
    return element("span", element("span", row["verdict"], class_=row["verdict"]), f": {row['why']}")


def _points(name: str, places: list[float], found: list[dict[str, Any]], color: str) -> Series:
    values, bounds = [one["value"] for one in found], [one.get("interval") for one in found]
    return Series(name, places, values, color, "points", bounds=bounds)


def _measured(series: Iterable[Series]) -> tuple[Series, ...]:
    return tuple(one for one in series if any(value is not None for value in one.y))


def _listed(labels: Iterable[str]) -> str:
    *most, last = labels
    return f"{', '.join(most)} and {last}"
