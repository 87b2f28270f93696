"""Figures of a run by matplotlib, which only this module imports (`pip install jaxdelta[figures]`)."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from jaxdelta.report.charts import layers as contents
from jaxdelta.report.charts.chart import DEPTH, MAP, Axis, Figure, Heatmap, Numbers, Panel, Series
from jaxdelta.report.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".pdf")
CAPTIONS = "captions.md"
STYLES = {"solid": "-", "dash": "--", "dot": ":"}
WIDTH, PANEL_HEIGHT, MAP_HEIGHT = 11.0, 3.4, 4.6  # inches


def pictures(analysis: Result, directory: Path) -> dict[Path, bytes]:
    """The figures of a run as PNG and PDF, and captions.md: contents by path."""
    files, captions = {}, [f"# Figures of {analysis.model}"]
    for figure in contents.figures(analysis):
        if not figure.panels:
            continue
        picture = draw(figure)
        for ending in FORMATS:
            buffer = io.BytesIO()
            # Without a date, so that equal runs give equal files.
            picture.savefig(buffer, format=ending[1:], dpi=150, metadata=_METADATA[ending])
            files[directory / f"{figure.name}{ending}"] = buffer.getvalue()
        captions.append(f"## {figure.title}\n\n![{figure.title}]({figure.name}.png)\n\n{figure.text}")
    files[directory / CAPTIONS] = ("\n\n".join(captions) + "\n").encode("utf-8", "backslashreplace")
    return files


_METADATA: dict[str, dict[str, str | None]] = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}


def draw(figure: Figure) -> Picture:
    """A figure as a picture outside pyplot, which no notebook or window displays."""
    picture = Picture(layout="constrained")
    _fill(picture, figure.panels)
    return picture


def on_new(panels: Sequence[Panel | Heatmap]) -> "list[Axes]":
    """Axes of a new pyplot picture of these panels, which a notebook displays."""
    return _fill(plt.figure(layout="constrained"), panels)


def on_given(panels: Sequence[Panel | Heatmap], axes: "Sequence[Axes]") -> "list[Axes]":
    """Panels on existing axes, one for each."""
    for panel, panel_axes in zip(panels, axes, strict=True):
        draw_panel(panel, panel_axes, legend_below=False)
    return list(axes)


def _fill(picture: Picture, panels: Sequence[Panel | Heatmap]) -> "list[Axes]":
    """Draws panels in two columns, and sizes the picture."""
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    height = MAP_HEIGHT if any(isinstance(panel, Heatmap) for panel in panels) else PANEL_HEIGHT
    picture.set_size_inches(WIDTH * columns / 2, height * rows)
    axes = [picture.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
    for panel, panel_axes in zip(panels, axes, strict=True):
        draw_panel(panel, panel_axes)
    return axes


def overview(analysis: Result) -> Picture:
    """One picture of a run: norms, ranks and energy by layer, and |cos| between all layers."""
    lengths, *_ = contents.norms(analysis).panels
    directions, energy, *_ = contents.ranks(analysis).panels
    cosines, *_ = contents.overlaps(analysis).panels
    picture = plt.figure(figsize=(WIDTH, 7.4), layout="constrained")
    left, right = picture.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.05])[0]
    for panel, axes in zip((lengths, directions, energy), left.subplots(3, 1, sharex=True), strict=True):
        draw_panel(panel, axes, legend_below=False)
        axes.label_outer()
    draw_panel(cosines, right.subplots())
    picture.suptitle(
        f"{analysis.model}: what {analysis.num_layers} layers write, {analysis.n_calib_tokens} tokens",
        parse_math=False,
    )
    return picture


def draw_panel(panel: Panel | Heatmap, axes: "Axes", legend_below: bool = True) -> None:
    """A panel with its title, axes, legend and phases."""
    axes.set_title(panel.title, fontsize="medium", pad=18, loc="left")
    if isinstance(panel, Heatmap):
        _draw_map(panel, axes)
        return
    for series in panel.series:
        _draw_series(series, panel, axes)
    _set_axis(axes, "x", panel.x)
    _set_axis(axes, "y", panel.y)
    axes.spines[["top", "right"]].set_visible(False)
    for i, (first, last, _) in enumerate(panel.bands):
        axes.axvspan(first - 0.5, last + 0.5, color="0.5", alpha=0.05 + 0.09 * (i % 2), linewidth=0, zorder=0)
    _name_phases(panel, axes)
    if panel.depth:
        _depth_scale(panel.depth, axes)
    elif len(panel.series) > 1:
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.22), "borderaxespad": 0, "ncols": 2}
        axes.legend(frameon=False, fontsize="small", **(below if legend_below else {"ncols": 2}))


def _draw_series(series: Series, panel: Panel, axes: "Axes") -> None:
    x, y = np.asarray(series.x, float), _numbers(series.y)
    if panel.y.log:
        y = np.where(y > 0, y, np.nan)
    if series.kind == "bars":
        _stack(series.name, series.color, x, y, axes)
    elif series.sizes:
        sizes = np.asarray(series.sizes)
        axes.scatter(x, y, 120 * sizes / sizes.max() + 4, series.color, alpha=0.55, label=series.name)
    elif series.kind == "points":
        marker, size = ("o", 6) if series.dash == "solid" else ("_", 18)
        width = 2.5 if series.dash == "dash" else 1.0
        axes.plot(x, y, marker, color=series.color, ms=size, mew=width, label=series.name, clip_on=False)
    else:
        style = ("o" if series.dash == "solid" and not panel.depth else "") + STYLES[series.dash]
        width = 0.8 if panel.depth else 1.4
        axes.plot(x, y, style, color=series.color, lw=width, ms=2.5, label=series.name)
    if any(series.bounds):
        low, high = np.array([pair or (np.nan, np.nan) for pair in series.bounds], float).T
        axes.vlines(x, low, high, color=series.color, lw=1.3)


def _stack(name: str, color: str, x: np.ndarray, y: np.ndarray, axes: "Axes") -> None:
    """Stacks bars on the bars already drawn, positive values upwards and negative ones downwards."""
    y, base = np.nan_to_num(y), np.zeros(len(y))
    for bars in axes.containers:
        heights = np.array([bar.get_height() for bar in bars])
        base += np.where(np.sign(heights) == np.sign(y), heights, 0)
    axes.bar(x, y, 0.8, base, color=color, label=name)


def _draw_map(panel: Heatmap, axes: "Axes") -> None:
    colors = MAP + "_r" * panel.reverse
    image = axes.imshow(panel.values, vmin=panel.range[0], vmax=panel.range[1], cmap=colors)
    for first, _, _ in panel.bands[1:]:
        axes.axhline(first - 0.5, color="white", linewidth=0.8)
        axes.axvline(first - 0.5, color="white", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="layer")
    _name_phases(panel, axes)
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)), label=panel.label)
    if panel.chance is not None:
        bar.ax.axhline(panel.chance, color="white", linewidth=1.5)


def _name_phases(panel: Panel | Heatmap, axes: "Axes") -> None:
    style: Any = {"ha": "center", "va": "bottom", "fontsize": 8, "color": "0.4", "parse_math": False}
    for first, last, name in panel.bands:
        axes.text((first + last) / 2, 1.01, str(name), transform=axes.get_xaxis_transform(), **style)


def _set_axis(axes: "Axes", which: str, axis: Axis) -> None:
    scale = {f"{which}scale": "log"} if axis.log else {}
    limits = {f"{which}lim": axis.range} if axis.range else {}
    axes.set(**{f"{which}label": axis.title}, **scale, **limits)
    if axis.log:
        where = axes.xaxis if which == "x" else axes.yaxis
        where.set_major_formatter(StrMethodFormatter("{x:g}"))
        where.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if axis.names:
        ticks = axes.set_xticks if which == "x" else axes.set_yticks
        ticks(range(len(axis.names)), axis.names, parse_math=False)


def _depth_scale(layers: int, axes: "Axes") -> None:
    colors = LinearSegmentedColormap.from_list("depth", DEPTH)
    scale = ScalarMappable(Normalize(0, max(layers - 1, 1)), colors)
    axes.figure.colorbar(scale, ax=axes, label="layer")


def _numbers(values: Numbers) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
