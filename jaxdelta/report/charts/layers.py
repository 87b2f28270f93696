"""The figures of a run: which numbers they show, their titles, captions and units. One place for all of it.

The page and the pictures draw the same data, see `charts`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxdelta.report.charts.across_layers import captures, overlaps, phases
from jaxdelta.report.charts.chart import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SHARE,
    YELLOW,
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

SPECTRUM_POINTS = 48


def figures(analysis: Result) -> list[Figure]:
    """All figures, in the order of the page."""
    builders = (norms, ranks, spectra, overlaps, ledger, owners, phases, captures)
    return [build(analysis) for build in builders]


def norms(analysis: Result) -> Figure:
    """Lengths of states and updates, and the step relative to the state."""
    lengths = [
        column(analysis, "h_norm_mean", "state ‖h‖", BLUE),
        column(analysis, "token_norm_mean", "update ‖δ‖", ORANGE),
    ]
    step = [column(analysis, "rel_step_mean", "run", BLUE), _control(analysis, "rel_step_mean")]
    first = column(analysis, "gamma", "σ₁", BLUE)
    first = dataclasses.replace(first, y=[row["top_singvals"][0] for row in analysis.per_layer])
    turn = [column(analysis, "cos_delta_h_mean", "cos(δ, h)", BLUE)]
    return Figure(
        "norms",
        "How much each layer writes",
        "The update's length beside the state's, their ratio, its size γ_L = σ₁ along the first direction, "
        "and whether a layer amplifies what is there (cosine above 0) or erases it (below 0); "
        f"means over tokens{bars(analysis)}.",
        (
            lengths_panel(analysis, lengths),
            by_layer(analysis, "Relative step", Axis("mean ‖δ‖ / ‖h‖ (ratio)", log=True), step),
            by_layer(analysis, "Along the first direction", Axis("σ₁ (activation units)", log=True), [first]),
            by_layer(analysis, "Along the state", Axis("mean cos(δ, h) (no unit)", range=(-1.0, 1.0)), turn),
        ),
    )


def lengths_panel(analysis: Result, series: Sequence[Series]) -> Panel:
    """Mean norms by layer."""
    return by_layer(analysis, "Norms", Axis("norm (activation units)", log=True), series)


def ranks(analysis: Result) -> Figure:
    """Effective ranks and energy fractions by view, and how steady v_1 is."""
    names = {"raw": BLUE} | ({"masked": ORANGE} if has_sinks(analysis) else {}) | {"centred": GREEN}

    def views(key: str) -> list[Series | None]:
        found = [column(analysis, key, name, color, view=name) for name, color in names.items()]
        return [*found, _control(analysis, key)]

    more = [
        column(analysis, f"top{m}_frac", f"first {m}, {name}", color, view=name, dash=dash)
        for m, color in ((3, PURPLE), (10, YELLOW))
        for name, dash in (("raw", "solid"), ("masked", "dash"))
        if name in names
    ]
    directions, share = Axis("effective rank (directions)", log=True), Axis("share of ‖δ‖²", range=SHARE)
    panels = [
        by_layer(analysis, "Effective rank", directions, views("eff_rank")),
        by_layer(analysis, "Energy along the first direction v_L", share, views("top1_frac")),
        by_layer(analysis, "Energy along the first 3 and 10 directions", share, more),
        by_layer(analysis, "How steady v_L is", Axis("|cos| (no unit)", range=SHARE), _steadiness(analysis)),
    ]
    return Figure(
        "ranks",
        "How many directions a layer writes",
        "A low rank and much energy along v_L mean that a layer writes one thing for all tokens; "
        f"{_masking(analysis)}{_steadiness_said(panels[-1])}{bars(analysis)}.",
        tuple(panel for panel in panels if panel.series),
    )


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
    shown = {"raw": BLUE} | ({"masked": ORANGE} if has_sinks(analysis) else {})
    top = [column(analysis, "sigma1_top_share", view, color, view=view) for view, color in shown.items()]
    points = [series for view, color in shown.items() if (series := _owning(analysis, view, color)).x]
    if not points:
        return Figure("owners", title, "Not measured: it needs --bootstrap or --null_draws.")
    places = Axis("position in the text (tokens)", range=(0.0, float(analysis.n_calib_tokens)))
    return Figure(
        "owners",
        title,
        "Near 1, a handful of tokens makes a layer's first direction, and it says little of the others; "
        "dots are the five largest owners, the larger the more of σ₁² they own.",
        (
            by_layer(analysis, "Owned by the first thousandth", Axis("share of σ₁²", range=SHARE), top),
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
    analysis: Result, key: str, name: str, color: str, *, view: str = "raw", dash: str = "solid"
) -> Series:
    """A figure of all layers in a view, with its intervals where there are any."""
    rows = [view_of(row, view) or {} for row in analysis.per_layer]
    layers = [row["L"] for row in analysis.per_layer]
    bounds = [row.get("intervals", {}).get(key) for row in rows]
    return Series(name, layers, [row.get(key) for row in rows], color, dash=dash, bounds=bounds)


def _control(analysis: Result, key: str) -> Series | None:
    control = analysis.control
    if control is None:
        return None
    rows = control["per_layer"]
    name = f"control: {control['name']}"
    return Series(name, [row["L"] for row in rows], [row[key] for row in rows], GREY, dash="dash")


def _steadiness_said(panel: Panel) -> str:
    return "; v_L is noise where its |cos| with that of another text is low" if panel.series else ""


def _masking(analysis: Result) -> str:
    if has_sinks(analysis):
        return "masked is without the sinks, which can make a rank look low"
    if all(view_of(row, "masked") for row in analysis.per_layer):
        return "no token is a sink, so the masked view is the raw one"
    return "sinks were not masked (--views)"


def _steadiness(analysis: Result) -> list[Series]:
    halves = column(analysis, "split_half_cos", "between two halves", BLUE)
    draws = (analysis.overlap or {}).get("raw", {}).get("v1_stability", [])
    bounds = [(row["low"], row["median"]) for row in draws]
    middle = Series(
        "other draws: median, 5 % point",
        [row["L"] for row in draws],
        [row["median"] for row in draws],
        GREEN,
        bounds=bounds,
    )
    return [halves, middle]


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
