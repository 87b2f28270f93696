"""Figures as Plotly takes them: plain dictionaries, so that nothing of plotly.py is imported to make them.

Colours of text, grid and background are the page's (page.css); only the data's are set here.
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
    """To five digits, which the eye cannot tell from more; what is no finite number becomes None."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")
        for value in values
    ]


def escaped(text: str) -> str:
    """Plotly reads a part of HTML in its texts."""
    return html.escape(text, quote=False)


def _lines(panel: Panel) -> dict[str, Any]:
    traces = [_trace(series, panel) for series in panel.series]
    if panel.depth:
        traces.append(_depth_scale(panel.depth))
    points = any(series.sizes for series in panel.series)
    layout = {
        **_frame(LINES_HEIGHT),
        "xaxis": _axis(panel.x) | {"unifiedhovertitle": {"text": panel.x.hover}},
        "yaxis": _axis(panel.y) | {"zeroline": not panel.y.log} | _log_ticks(panel),
        "showlegend": False,  # the page has its own, which wraps
        "hovermode": "closest" if panel.depth or points or panel.x.names else "x unified",
        "barmode": "relative",
        "shapes": _shades(panel.bands),
        "annotations": _band_names(panel.bands),
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
    said, trace["customdata"] = _said(series)
    if not trace["customdata"]:
        del trace["customdata"]
    place = "" if series.sizes or not panel.depth else ", i = %{x}"
    value = "layer %{x}, position %{y}" if series.sizes else "%{y:.4g}"
    trace["hovertemplate"] = f"{name}{place}: {value}{said}<extra></extra>"
    if any(series.bounds):
        trace["error_y"] = _error_bars(series)
    return trace


def _marker(series: Series) -> dict[str, Any]:
    if series.sizes:
        largest = max(series.sizes)
        sizes = [max(4.0, 22 * math.sqrt(size / largest)) for size in series.sizes]
        line = {"color": series.color, "width": 1}
        return {"color": series.color, "opacity": 0.55, "size": rounded(sizes), "line": line}
    if series.kind != "points":
        return {"color": series.color, "size": 4}
    # Points of chance are short strokes, open and bold, that a phase's own figure is seen above or below.
    symbols = {"solid": "circle", "dash": "line-ew", "dot": "line-ew"}
    width = {"solid": 0, "dash": 2.5, "dot": 1}[series.dash]
    return {
        "color": series.color,
        "size": 9 if series.dash == "solid" else 22,
        "symbol": symbols[series.dash],
        "line": {"color": series.color, "width": width},
    }


def _said(series: Series) -> tuple[str, list[str]]:
    """What a hover adds to the value: its interval and its label."""
    if not (series.labels or any(series.bounds)):
        return "", []
    bounds = [f" [{pair[0]:.4g}, {pair[1]:.4g}]" if pair else "" for pair in series.bounds]
    between = "<br>" if series.sizes else ", "
    labels = [between + escaped(label) for label in series.labels]
    return "%{customdata}", ["".join(said) for said in itertools.zip_longest(bounds, labels, fillvalue="")]


def _error_bars(series: Series) -> dict[str, Any]:
    pairs = list(zip(series.y, series.bounds, strict=True))
    above = [pair[1] - y if pair and y is not None else None for y, pair in pairs]
    below = [y - pair[0] if pair and y is not None else None for y, pair in pairs]
    return {
        "type": "data",
        "symmetric": False,
        "array": rounded(above),
        "arrayminus": rounded(below),
        "width": 0,
        "thickness": 1.5,
        "color": series.color,
    }


def _depth_scale(layers: int) -> dict[str, Any]:
    """A trace without points, whose colour bar tells the layers."""
    steps = [[i / (len(DEPTH) - 1), color] for i, color in enumerate(DEPTH)]
    marker = {
        "color": [0],
        "cmin": 0,
        "cmax": max(layers - 1, 1),
        "colorscale": steps,
        "showscale": True,
        "colorbar": _color_bar("layer"),
    }
    return {
        "type": "scatter",
        "x": [None],
        "y": [None],
        "mode": "markers",
        "marker": marker,
        "hoverinfo": "skip",
    }


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
    layers = len(panel.values)
    x = _axis(Axis("layer", range=(-0.5, layers - 0.5)))
    y = x | {"range": [layers - 0.5, -0.5], "scaleanchor": "x", "constrain": "domain"}
    layout = {
        **_frame(MAP_HEIGHT),
        "xaxis": x | {"constrain": "domain", "showgrid": False},
        "yaxis": y | {"showgrid": False},
        "shapes": _boundaries(panel.bands, layers),
        "annotations": _band_names(panel.bands),
    }
    return {"data": [trace], "layout": layout}


def _color_bar(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "side": "right", "font": {"size": 13}},
        "thickness": 10,
        "outlinewidth": 0,
    }


def _frame(height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 62, "r": 12, "t": 24, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "dragmode": False,
    }


def _axis(axis: Axis) -> dict[str, Any]:
    title = {"text": axis.title, "standoff": 8, "font": {"size": 13}}
    layout: dict[str, Any] = {"title": title}
    if axis.log:
        layout |= {"type": "log", "exponentformat": "power"}
    if axis.range:
        layout["range"] = list(axis.range)
    if axis.names:
        layout |= {"tickvals": list(range(len(axis.names))), "ticktext": [*map(escaped, axis.names)]}
    return layout


def _log_ticks(panel: Panel) -> dict[str, Any]:
    """Powers of ten, and where there are few of them 2 and 5 between."""
    if not panel.y.log:
        return {}
    seen = [y for series in panel.series for y in series.y if y is not None and y > 0]
    decades = math.log10(max(seen) / min(seen)) if seen else 0
    return {"dtick": 1 if decades > 3 else "D2"}


def _shades(bands: Sequence[Band]) -> list[dict[str, Any]]:
    """The phases, light and dark in turn, behind the data."""
    return [
        {
            "type": "rect",
            "yref": "paper",
            "x0": first - 0.5,
            "x1": last + 0.5,
            "y0": 0,
            "y1": 1,
            "fillcolor": BAND.format((0.05, 0.14)[i % 2]),
            "line": {"width": 0},
            "layer": "below",
        }
        for i, (first, last, _) in enumerate(bands)
    ]


def _boundaries(bands: Sequence[Band], layers: int) -> list[dict[str, Any]]:
    """Lines between the phases, over a map."""
    line = {"color": "rgba(255,255,255,0.85)", "width": 1.2}
    places = [first - 0.5 for first, _, _ in bands[1:]]
    ends = (-0.5, layers - 0.5)
    down = [{"type": "line", "x0": p, "x1": p, "y0": ends[0], "y1": ends[1], "line": line} for p in places]
    across = [{"type": "line", "x0": ends[0], "x1": ends[1], "y0": p, "y1": p, "line": line} for p in places]
    return down + across


def _band_names(bands: Sequence[Band]) -> list[dict[str, Any]]:
    return [
        {
            "text": escaped(str(name)),
            "x": (first + last) / 2,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": GREY},
        }
        for first, last, name in bands
    ]
