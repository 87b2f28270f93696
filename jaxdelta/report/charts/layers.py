"""The figures of a run: the statistics in each panel, titles and captions; words and units of statistics are
the registry's.

The page and the pictures draw the same data, see `charts`.
"""

import itertools
from collections.abc import Iterable, Sequence

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
from jaxdelta.spectra.views import view_of
from jaxdelta.statistics.per_layer.registry import Number, Statistic, shown

SPECTRUM_POINTS = 48


def figures(analysis: Result) -> list[Figure]:
    """All figures, in the order of the page."""
    builders = (norms, ranks, spectra, overlaps, ledger, owners, phases, captures)
    return [build(analysis) for build in builders]


def norms(analysis: Result) -> Figure:
    """Lengths of states and updates, and the step relative to the state."""
    return Figure(
        "norms",
        "How much each layer writes",
        "The update's length compared with the state's, their ratio, its size γ_L = σ₁ along the first "
        "direction, and whether a layer amplifies what is there (cosine above 0) or erases it (below 0); "
        f"means over tokens{bars(analysis)}.",
        _panels(analysis, "norms", {"raw": BLUE}),
    )


def ranks(analysis: Result) -> Figure:
    """How the energy of an update spreads over directions, by view."""
    views = {"raw": BLUE} | ({"masked": ORANGE} if has_sinks(analysis) else {}) | {"centred": GREEN}
    steady = "; v_L is noise where its |cos| with that of another text is low"
    measured = "split_half_cos" in analysis.per_layer[0]
    return Figure(
        "ranks",
        "How many directions a layer writes",
        "A low rank and much energy along v_L mean that a layer writes one thing for all tokens; "
        f"{_masking(analysis)}{steady if measured else ''}{bars(analysis)}.",
        _panels(analysis, "ranks", views),
    )


def axis(statistic: Statistic) -> Axis:
    """The axis of a registered statistic; a linear one shows its whole range, where that is known."""
    low, high = statistic.range or (None, None)
    if statistic.log or not (isinstance(low, Number) and isinstance(high, Number)):
        return Axis(statistic.unit, statistic.log)
    return Axis(statistic.unit, range=(low, high))


def _panels(analysis: Result, figure: str, views: dict[str, str]) -> tuple[Panel, ...]:
    """A panel for every registered statistic of a figure, one for those that share its title."""
    sharing: dict[str, list[Statistic]] = {}
    for statistic in shown(figure):
        sharing.setdefault(statistic.panel, []).append(statistic)
    panels = [
        by_layer(
            analysis,
            title,
            axis(some[0]),
            _together(analysis, some, views) if some[1:] else _by_view(analysis, some[0], views),
        )
        for title, some in sharing.items()
    ]
    return tuple(panel for panel in panels if panel.series)


def _by_view(analysis: Result, statistic: Statistic, views: dict[str, str]) -> list[Series | None]:
    """A statistic in several views, and the control's."""
    names = views if len(views) > 1 else {"run": BLUE}
    lines = [
        column(analysis, statistic, name, color, view=view)
        for (name, color), view in zip(names.items(), views, strict=True)
    ]
    more = _steadiness(analysis) if statistic.name == "split_half_cos" else []
    return [*lines, _control(analysis, statistic), *more]


def _together(analysis: Result, some: Sequence[Statistic], views: Iterable[str]) -> list[Series]:
    """Several statistics, each in a colour: raw, and dashed without sinks."""
    dashes = {view: dash for view, dash in (("raw", "solid"), ("masked", "dash")) if view in views}
    return [
        column(
            analysis,
            one,
            one.label + (f", {view}" if dashes.keys() > {"raw"} else ""),
            color,
            view=view,
            dash=dash,
        )
        for one, color in zip(some, itertools.cycle(ORDER), strict=False)
        for view, dash in dashes.items()
    ]


def spectra(analysis: Result) -> Figure:
    """All singular values of all layers, and the energy they add up to."""
    count = analysis.singular_values.shape[1]
    shown = np.unique(np.geomspace(1, count, SPECTRUM_POINTS).round().astype(int))
    values = analysis.singular_values.astype(np.float64)
    energy = np.square(values)
    added = np.cumsum(energy, axis=1)
    held = added / np.maximum(added[:, -1:], np.finfo(float).tiny)
    x = Axis("number i of the singular value", log=True)

    def lines(table: np.ndarray, positive: bool) -> tuple[Series, ...]:
        return tuple(
            Series(
                f"layer {layer}",
                shown.tolist(),
                [float(y) if y > 0 or not positive else None for y in row[shown - 1]],
                depth_color(layer, analysis.num_layers),
            )
            for layer, row in enumerate(table)
        )

    def panel(title: str, y: Axis, table: np.ndarray) -> Panel:
        return Panel(title, x, y, lines(table, y.log), depth=analysis.num_layers)

    zeros = int((values[:, shown - 1] <= 0).sum())
    return Figure(
        "spectra",
        "The spectrum of every layer's update",
        "A line a layer, coloured by depth: the steeper it falls, the fewer directions the layer writes "
        f"along; raw view, {len(shown)} of {count} values shown"
        + (f", {zeros} of them 0 and so not on the log axis." if zeros else "."),
        (
            panel("Singular values", Axis("σᵢ (activation units)", log=True), values),
            panel("Energy held by the first i", Axis("share of ‖δ‖²", range=SHARE), held),
        ),
    )


def ledger(analysis: Result) -> Figure:
    """The energy of an update, parted into attention's, the MLP's and their cross term."""
    title = "What attention writes and what the MLP writes"
    rows = analysis.per_layer
    if not all("ledger" in row for row in rows):
        return Figure("ledger", title, "Not measured: it needs a view of attention or of the MLP (--views).")
    parts = {"attention": BLUE, "mlp": ORANGE, "cross": GREEN}
    names = {"attention": "attention", "mlp": "MLP", "cross": "cross term 2⟨attention, MLP⟩"}

    def shares(part: str) -> list[float | None]:
        return [
            row["ledger"][part] / row["ledger"]["update"] if row["ledger"]["update"] else None for row in rows
        ]

    layers = [row["L"] for row in rows]
    shown = [Series(names[part], layers, shares(part), color, "bars") for part, color in parts.items()]
    lines = [
        Series(names.get(part, "update"), layers, [row["ledger"][part] for row in rows], color)
        for part, color in (parts | {"update": GREY}).items()
        if part != "cross"
    ]
    return Figure(
        "ledger",
        title,
        "‖δ‖² = ‖attention‖² + ‖MLP‖² + cross term: the bars of a layer add up to 1; below 0 the two cancel.",
        (
            by_layer(analysis, "Shares of the update's energy", Axis("share of ‖δ‖²"), shown),
            by_layer(analysis, "Energy", Axis("energy (activation units²)", log=True), lines),
        ),
    )


def owners(analysis: Result) -> Figure:
    """Whether few tokens make σ_1, and which."""
    title = "Who owns σ₁"
    views = {"raw": BLUE} | ({"masked": ORANGE} if has_sinks(analysis) else {})
    (share,) = shown("owners")
    top = [column(analysis, share, view, color, view=view) for view, color in views.items()]
    points = [series for view, color in views.items() if (series := _owning(analysis, view, color)).x]
    if not points:
        return Figure("owners", title, "Not measured: it needs --bootstrap or --null_draws.")
    places = Axis("position in the text (tokens)", range=(0.0, float(analysis.n_calib_tokens)))
    return Figure(
        "owners",
        title,
        "Near 1, a handful of tokens makes a layer's first direction, and it says little of the others; "
        "dots are the five largest owners, the larger the more of σ₁² they own.",
        (
            by_layer(analysis, share.title, axis(share), top),
            by_layer(analysis, "Where the owners stand", places, points),
        ),
    )


def has_sinks(analysis: Result) -> bool:
    """Whether a layer has a token that its masked view leaves out."""
    return any(
        (masked := view_of(row, "masked")) is not None and masked["n"] != row["n"]
        for row in analysis.per_layer
    )


def column(
    analysis: Result, statistic: Statistic, name: str, color: str, *, view: str = "raw", dash: str = "solid"
) -> Series:
    """A statistic of all layers in a view, with its intervals where there are any."""
    rows = [view_of(row, view) or {} for row in analysis.per_layer]
    layers = [row["L"] for row in analysis.per_layer]
    bounds = [row.get("intervals", {}).get(statistic.name) for row in rows]
    return Series(name, layers, [statistic.of(row) for row in rows], color, dash=dash, bounds=bounds)


def _control(analysis: Result, statistic: Statistic) -> Series | None:
    control = analysis.control
    if control is None:
        return None
    rows = control["per_layer"]
    name = f"control: {control['name']}"
    return Series(name, [row["L"] for row in rows], [statistic.of(row) for row in rows], GREY, dash="dash")


def _masking(analysis: Result) -> str:
    if has_sinks(analysis):
        return "masked is without the sinks, which can make a rank look low"
    if all(view_of(row, "masked") for row in analysis.per_layer):
        return "no token is a sink, so the masked view is the raw one"
    return "sinks were not masked (--views)"


def _steadiness(analysis: Result) -> list[Series]:
    """|cos| of v_L with that of other draws of documents, where it was measured."""
    draws = (analysis.overlap or {}).get("raw", {}).get("v1_stability", [])
    bounds = [(row["low"], row["median"]) for row in draws]
    layers, medians = [row["L"] for row in draws], [row["median"] for row in draws]
    name = "other draws: median, 5 % point"
    return [Series(name, layers, medians, PURPLE, bounds=bounds)] if draws else []


def _owning(analysis: Result, view: str, color: str) -> Series:
    found = [
        (row["L"], owner)
        for row in analysis.per_layer
        for owner in (view_of(row, view) or {}).get("sigma1_tokens") or []
    ]
    return Series(
        view,
        [layer for layer, _ in found],
        [owner["position"] for _, owner in found],
        color,
        "points",
        sizes=[owner["share"] for _, owner in found],
        labels=[f"{owner['token']!r} {owner['share']:.3f}" for _, owner in found],
    )
