"""Panels as Plotly's JSON, built from plain dictionaries, so that plotly.py is not imported.

Colours of text, grid and background are set by page.css, colours of the data here.
"""

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxdelta.report.charts.chart import DEPTH, GREY, MAP, Axis, Band, Heatmap, Panel, Series

DIGITS = 5
BAND = "rgba(128,128,128,{})"
LINES_HEIGHT, MAP_HEIGHT = 350, 450  # pixels


def chart(panel: Panel | Heatmap) -> dict[str, Any]:
    """{"data": …, "layout": …} of a panel."""
    return _map(panel) if isinstance(panel, Heatmap) else _lines(panel)


def rounded(values: Iterable[Any]) -> list[float | None]:
    """The values rounded to five digits; None for values that are not finite."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")
        for value in values
    ]


def escaped(text: str) -> str:
    """The text with HTML escaped, which Plotly would interpret in part."""
    return html.escape(text, quote=False)


def _lines(panel: Panel) -> dict[str, Any]:
    traces = [_trace(series, panel) for series in panel.series]
    if panel.depth:
        traces.append(_depth_scale(panel.depth))
    points = any(series.sizes for series in panel.series)
    layout = {
        **_frame(LINES_HEIGHT, panel.bands),
        "xaxis": _axis(panel.x) | {"unifiedhovertitle": {"text": panel.x.hover}},
        "yaxis": _axis(panel.y) | {"zeroline": not panel.y.log} | _log_ticks(panel),
        "showlegend": False,  # the page has its own legend, which wraps
        "hovermode": "closest" if panel.depth or points or panel.x.names else "x unified",
        "barmode": "relative",
        "shapes": [_shade(band, i) for i, band in enumerate(panel.bands)],
    }
    return {"data": traces, "layout": layout}


def _trace(series: Series, panel: Panel) -> dict[str, Any]:
    name = escaped(series.name)
    y = [None if value is not None and panel.y.log and value <= 0 else value for value in series.y]
    trace: dict[str, Any] = {"name": name, "x": rounded(series.x), "y": rounded(y)}
    if series.kind == "bars":
        marker = {"color": series.color}
        return trace | {"type": "bar", "marker": marker, "hovertemplate": f"{name} %{{y:.3f}}<extra></extra>"}
    trace |= {"type": "scatter", "cliponaxis": False, "marker": _marker(series)}
    dots = series.dash == "solid" and not panel.depth
    trace["mode"] = "markers" if series.kind == "points" else "lines+markers" if dots else "lines"
    trace["line"] = {"color": series.color, "width": 1.2 if panel.depth else 1.8, "dash": series.dash}
    index = "" if series.sizes or not panel.depth else ", i = %{x}"
    value = "layer %{x}, position %{y}" if series.sizes else "%{y:.4g}"
    more = ""
    if series.labels or any(series.bounds):
        more, trace["customdata"] = "%{customdata}", _hover_texts(series)
    trace["hovertemplate"] = f"{name}{index}: {value}{more}<extra></extra>"
    if any(series.bounds):
        trace["error_y"] = _error_bars(series)
    return trace


def _marker(series: Series) -> dict[str, Any]:
    color, solid = series.color, series.dash == "solid"
    if series.sizes:
        largest = max(series.sizes)
        sizes = [max(4.0, 22 * math.sqrt(size / largest)) for size in series.sizes]
        line = {"color": color, "width": 1}
        return {"color": color, "opacity": 0.55, "size": rounded(sizes), "line": line}
    if series.kind != "points":
        return {"color": color, "size": 4}
    # Chance is a wide stroke, so that a phase's value stays visible above or below it.
    size, symbol = (9, "circle") if solid else (22, "line-ew")
    line = {"color": color, "width": {"solid": 0, "dash": 2.5, "dot": 1}[series.dash]}
    return {"color": color, "size": size, "symbol": symbol, "line": line}


def _hover_texts(series: Series) -> list[str]:
    """The interval and the label of each point."""
    bounds = [f" [{pair[0]:.4g}, {pair[1]:.4g}]" if pair else "" for pair in series.bounds]
    separator = "<br>" if series.sizes else ", "
    labels = [separator + escaped(label) for label in series.labels]
    return ["".join(parts) for parts in itertools.zip_longest(bounds, labels, fillvalue="")]


def _error_bars(series: Series) -> dict[str, Any]:
    pairs = list(zip(series.y, series.bounds, strict=True))
    above = rounded(pair[1] - y if pair and y is not None else None for y, pair in pairs)
    below = rounded(y - pair[0] if pair and y is not None else None for y, pair in pairs)
    style = {"type": "data", "symmetric": False, "width": 0, "thickness": 1.5, "color": series.color}
    return style | {"array": above, "arrayminus": below}


def _depth_scale(layers: int) -> dict[str, Any]:
    """A trace without points for the colour scale of layers."""
    steps = [[i / (len(DEPTH) - 1), color] for i, color in enumerate(DEPTH)]
    scale = {"cmin": 0, "cmax": max(layers - 1, 1), "colorscale": steps, "showscale": True}
    marker = {"color": [0], **scale, "colorbar": _color_bar("layer")}
    trace = {"type": "scatter", "x": [None], "y": [None], "mode": "markers"}
    return trace | {"marker": marker, "hoverinfo": "skip"}


def _map(panel: Heatmap) -> dict[str, Any]:
    chance = "" if panel.chance is None else f"<br>random directions {panel.chance:.3f}"
    label = escaped(panel.label)
    trace = {
        "type": "heatmap",
        "z": [rounded(row) for row in panel.values.tolist()],
        "zmin": panel.range[0],
        "zmax": panel.range[1],
        "colorscale": MAP.capitalize(),
        "reversescale": panel.reverse,
        "hovertemplate": f"layers %{{y}} and %{{x}}<br>{label} %{{z:.3f}}{chance}<extra></extra>",
        "colorbar": _color_bar(label),
    }
    low, high = -0.5, len(panel.values) - 0.5
    x = _axis(Axis("layer", range=(low, high))) | {"constrain": "domain", "showgrid": False}
    layout = {
        **_frame(MAP_HEIGHT, panel.bands),
        "xaxis": x,
        "yaxis": x | {"range": [high, low], "scaleanchor": "x"},
        "shapes": _boundaries(panel.bands, low, high),
    }
    return {"data": [trace], "layout": layout}


def _color_bar(title: str) -> dict[str, Any]:
    text = {"text": title, "side": "right", "font": {"size": 13}}
    return {"title": text, "thickness": 10, "outlinewidth": 0}


def _frame(height: int, bands: Sequence[Band]) -> dict[str, Any]:
    """The layout of every chart, with the names of the phases above it."""
    name = {"y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    name["font"] = {"size": 11, "color": GREY}
    return {
        "height": height,
        "margin": {"l": 62, "r": 12, "t": 24, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "dragmode": False,
        "annotations": [
            {"text": escaped(str(phase)), "x": (first + last) / 2, **name} for first, last, phase in bands
        ],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    layout: dict[str, Any] = {"title": {"text": axis.title, "standoff": 8, "font": {"size": 13}}}
    if axis.log:
        layout |= {"type": "log", "exponentformat": "power"}
    if axis.range:
        layout["range"] = list(axis.range)
    if axis.names:
        layout |= {"tickvals": list(range(len(axis.names))), "ticktext": [*map(escaped, axis.names)]}
    return layout


def _log_ticks(panel: Panel) -> dict[str, Any]:
    """Powers of ten, with 2 and 5 between if there are few."""
    if not panel.y.log:
        return {}
    positive = [y for series in panel.series for y in series.y if y is not None and y > 0]
    decades = math.log10(max(positive) / min(positive)) if positive else 0
    return {"dtick": 1 if decades > 3 else "D2"}


def _shade(band: Band, number: int) -> dict[str, Any]:
    """A phase's background, alternately light and dark."""
    corners = {"x0": band[0] - 0.5, "x1": band[1] + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    fill = {"fillcolor": BAND.format((0.05, 0.14)[number % 2]), "line": {"width": 0}, "layer": "below"}
    return {"type": "rect", **corners, **fill}


def _boundaries(bands: Sequence[Band], low: float, high: float) -> list[dict[str, Any]]:
    """Lines between the phases of a map."""
    line = {"type": "line", "line": {"color": "rgba(255,255,255,0.85)", "width": 1.2}}
    edges = [first - 0.5 for first, _, _ in bands[1:]]
    down = [line | {"x0": edge, "x1": edge, "y0": low, "y1": high} for edge in edges]
    return down + [line | {"x0": low, "x1": high, "y0": edge, "y1": edge} for edge in edges]
