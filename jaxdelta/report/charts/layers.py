"""The figures of a run: panels, titles and captions. Labels and units come from the registry."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxdelta.report.charts.across_layers import captures, overlaps, phases
from jaxdelta.report.charts.chart import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    ORDER,
    PURPLE,
    SHARE,
    Axis,
    Figure,
    Panel,
    Series,
    bars,
    by_layer,
    depth_color,
)
from jaxdelta.report.result import Result
from jaxdelta.spectra.views import ALL, view_of
from jaxdelta.statistics.per_layer.registry import Number, Statistic, shown

SPECTRUM_POINTS = 48
MOST_NAMED = 4  # largest number of layers named in a sentence


def figures(analysis: Result) -> list[Figure]:
    """All figures, in the order of the page."""
    builders = (norms, ranks, spectra, overlaps, ledger, owners, phases, captures)
    return [build(analysis) for build in builders]


def norms(analysis: Result) -> Figure:
    """Norms of states and updates, the relative step, γ_L, and the cosine of update and state."""
    return Figure(
        "norms",
        "How much each layer writes",
        "Norms of update and state, their ratio, the update's strength along its first direction, σ₁ (γ_L of "
        "the hypothesis), and whether a layer amplifies the state (cosine above 0) or erases it (below 0); "
        f"means over tokens{bars(analysis)}.",
        _panels(analysis, "norms", {"raw": BLUE}),
    )


def ranks(analysis: Result) -> Figure:
    """Effective ranks and energy fractions by view, and the steadiness of v_L."""
    views = {"raw": BLUE} | ({"masked": ORANGE} if has_sinks(analysis) else {}) | {"centred": GREEN}
    resampled = "split_half_cos" in analysis.per_layer[0]
    steady = "; v_L is noise if its |cos| with the v_L of another text is low" if resampled else ""
    return Figure(
        "ranks",
        "How many directions a layer writes",
        "With a low effective rank the updates of all tokens lie along few directions. If the energy of the "
        "mean update is high too, the first direction is one vector added to every token; "
        f"{_masking(analysis)}{steady}{bars(analysis)}.",
        _panels(analysis, "ranks", views),
    )


def axis(statistic: Statistic) -> Axis:
    """The axis of a registered statistic; a linear one shows the whole range, if it is bounded."""
    low, high = statistic.range or (None, None)
    if statistic.log or not (isinstance(low, Number) and isinstance(high, Number)):
        return Axis(statistic.unit, statistic.log)
    return Axis(statistic.unit, range=(low, high))


def _panels(analysis: Result, figure: str, views: dict[str, str]) -> tuple[Panel, ...]:
    """The panels of the registered statistics of a figure."""
    statistics: dict[str, list[Statistic]] = {}
    for statistic in shown(figure):
        statistics.setdefault(statistic.panel, []).append(statistic)
    panels = []
    for title, [first, *more] in statistics.items():
        series = _together(analysis, [first, *more], views) if more else _by_view(analysis, first, views)
        panels.append(by_layer(analysis, title, axis(first), series))
    return tuple(panel for panel in panels if panel.series)


def _by_view(analysis: Result, statistic: Statistic, views: dict[str, str]) -> list[Series]:
    """A statistic in several views and of the control."""
    names = views if len(views) > 1 else {"run": BLUE}
    lines = [
        _column(analysis.per_layer, statistic, name, color, view)
        for (name, color), view in zip(names.items(), views, strict=True)
    ]
    if control := analysis.control:
        name = f"control: {control['name']}"
        lines.append(_column(control["per_layer"], statistic, name, GREY, dash="dash"))
    return lines + (_steadiness(analysis) if statistic.name == "split_half_cos" else [])


def _together(analysis: Result, some: Sequence[Statistic], views: Iterable[str]) -> list[Series]:
    """Several statistics, each in a colour: raw, and dashed without sinks."""
    dashes = {"raw": "solid"} | ({"masked": "dash"} if "masked" in views else {})
    series = []
    for statistic, color in zip(some, itertools.cycle(ORDER), strict=False):
        for view, dash in dashes.items():
            name = statistic.label + (f", {view}" if len(dashes) > 1 else "")
            series.append(_column(analysis.per_layer, statistic, name, color, view, dash))
    return series


def spectra(analysis: Result) -> Figure:
    """Singular values of all layers, and their cumulative energy."""
    count = analysis.singular_values.shape[1]
    shown = np.unique(np.geomspace(1, count, SPECTRUM_POINTS).round().astype(int))
    values = analysis.singular_values.astype(np.float64)
    energy = np.cumsum(np.square(values), axis=1)
    held = energy / np.maximum(energy[:, -1:], np.finfo(float).tiny)
    x = Axis("number i of the singular value", log=True)

    def panel(title: str, y: Axis, table: np.ndarray) -> Panel:
        lines = []
        for layer, row in enumerate(table[:, shown - 1].tolist()):
            points = [value if value > 0 or not y.log else None for value in row]
            color = depth_color(layer, analysis.num_layers)
            lines.append(Series(f"layer {layer}", shown.tolist(), points, color))
        return Panel(title, x, y, tuple(lines), depth=analysis.num_layers)

    zeros = int((values[:, shown - 1] <= 0).sum())
    return Figure(
        "spectra",
        "The spectrum of every layer's update",
        "One line per layer, coloured by depth: the steeper it falls, the fewer directions the layer writes "
        f"along; raw view, {len(shown)} of {count} values shown"
        + (f", {zeros} of them 0 and so not on the log axis." if zeros else "."),
        (
            panel("Singular values", Axis("σᵢ (activation units)", log=True), values),
            panel("Energy held by the first i", Axis("share of ‖δ‖²", range=SHARE), held),
        ),
    )


def ledger(analysis: Result) -> Figure:
    """The energy of the update, split into attention, MLP and their cross term."""
    title = "What attention writes and what the MLP writes"
    rows = analysis.per_layer
    if not all("ledger" in row for row in rows):
        return Figure("ledger", title, "Not measured: it needs a view of attention or of the MLP (--views).")
    parts = {
        "attention": ("attention", BLUE),
        "mlp": ("MLP", ORANGE),
        "cross": ("cross term 2⟨attention, MLP⟩", GREEN),
        "update": ("update", GREY),
    }
    layers = [row["L"] for row in rows]
    shares, energies = [], []
    for part, (name, color) in parts.items():
        if part != "update":
            shares.append(Series(name, layers, [ledger_share(row, part) for row in rows], color, "bars"))
        if part != "cross":
            energies.append(Series(name, layers, [row["ledger"][part] for row in rows], color))
    return Figure(
        "ledger",
        title,
        "‖δ‖² = ‖attention‖² + ‖MLP‖² + cross term: the bars of a layer add up to 1; below 0 the two cancel.",
        (
            by_layer(analysis, "Shares of the update's energy", Axis("share of ‖δ‖²"), shares),
            by_layer(analysis, "Energy", Axis("energy (activation units²)", log=True), energies),
        ),
    )


def ledger_share(row: dict[str, Any], part: str) -> float | None:
    """A part's share of the update's energy; None for a zero update."""
    whole = row["ledger"]["update"]
    return row["ledger"][part] / whole if whole else None


def owners(analysis: Result) -> Figure:
    """The share of σ_1² of the most influential tokens, and their positions."""
    title = "Who owns σ₁"
    views = {"raw": BLUE} | ({"masked": ORANGE} if has_sinks(analysis) else {})
    (share,) = shown("owners")
    top = [_column(analysis.per_layer, share, view, color, view) for view, color in views.items()]
    points = [series for view, color in views.items() if (series := _owning(analysis, view, color)).x]
    if not points:
        return Figure("owners", title, "Not measured: it needs --bootstrap or --null_draws.")
    positions = Axis("position in the text (tokens)", range=(0.0, float(analysis.n_calib_tokens)))
    return Figure(
        "owners",
        title,
        "Share of σ₁² of the most influential tokens. Near 1, the first direction describes a few tokens and "
        "not the text. Dots: the five most influential tokens, area proportional to share.",
        (
            by_layer(analysis, share.title, axis(share), top),
            by_layer(analysis, "Where the owners stand", positions, points),
        ),
    )


def has_sinks(analysis: Result) -> bool:
    """Whether a token is missing from the masked view of any layer."""
    return any((view := view_of(row, "masked")) and view["n"] != row["n"] for row in analysis.per_layer)


def sinks_left(row: dict[str, Any]) -> int:
    """The number of sinks left in the masked views of a layer."""
    return max((view_of(row, name) or {}).get("sinks_left", 0) for name, view in ALL.items() if view.masked)


def sinks_left_in(analysis: Result) -> str:
    """`sinks left in: 3 in layer 0, 1 in layer 5`; empty if there are none."""
    counts = [f"{count} in layer {row['L']}" for row in analysis.per_layer if (count := sinks_left(row))]
    more = f" and some in {len(counts) - MOST_NAMED} more layers" if len(counts) > MOST_NAMED else ""
    return f"sinks left in: {', '.join(counts[:MOST_NAMED])}{more}" if counts else ""


def _column(
    rows: list[dict[str, Any]],
    statistic: Statistic,
    name: str,
    color: str,
    view: str = "raw",
    dash: str = "solid",
) -> Series:
    """A statistic of all layers in a view, with its intervals if it has any."""
    views = [view_of(row, view) or {} for row in rows]
    bounds = [row.get("intervals", {}).get(statistic.name) for row in views]
    values = [statistic.of(row) for row in views]
    return Series(name, [row["L"] for row in rows], values, color, dash=dash, bounds=bounds)


def _masking(analysis: Result) -> str:
    if not all(view_of(row, "masked") for row in analysis.per_layer):
        return "sinks were not masked (--views)"
    left = sinks_left_in(analysis)
    if has_sinks(analysis):
        but = f" ({left})" if left else ""
        return f"masked is without the sinks, which can make a rank look low{but}"
    if left:
        return f"no sink was masked, so the masked view is the raw one ({left})"
    return "no token is a sink, so the masked view is the raw one"


def _steadiness(analysis: Result) -> list[Series]:
    """|cos| of v_L with the v_L of other draws of documents, if measured."""
    draws = (analysis.overlap or {}).get("raw", {}).get("v1_stability", [])
    bounds = [(row["low"], row["median"]) for row in draws]
    layers, medians = [row["L"] for row in draws], [row["median"] for row in draws]
    name = "other draws: median, 5 % point"
    return [Series(name, layers, medians, PURPLE, bounds=bounds)] if draws else []


def _owning(analysis: Result, view: str, color: str) -> Series:
    """The positions of the tokens with the largest shares of σ_1²."""
    tokens = [
        token | {"layer": row["L"]}
        for row in analysis.per_layer
        for token in (view_of(row, view) or {}).get("sigma1_tokens") or []
    ]
    layers, positions, shares = ([token[key] for token in tokens] for key in ("layer", "position", "share"))
    labels = [f"{token['token']!r} {token['share']:.3f}" for token in tokens]
    return Series(view, layers, positions, color, "points", sizes=shares, labels=labels)
