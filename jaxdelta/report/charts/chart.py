"""Figures as plain data, built by `layers` and `across_layers` and drawn by Plotly or matplotlib."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxdelta.report.result import Result

# Okabe & Ito's palette: safe for colour-blind readers, visible on white and on black.
BLUE, ORANGE, GREEN, PURPLE, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
ORDER = (BLUE, ORANGE, GREEN, PURPLE, YELLOW)  # of compared runs
GREY = "#888888"  # chance and other references
DEPTH = (BLUE, PURPLE, YELLOW)  # from the first layer to the last
MAP = "viridis"  # perceptually uniform
SHARE = (0.0, 1.0)  # the range of a share or of a |cos|
Number = float | int  # beartype does not accept an int as a float
Numbers = Sequence[Number | None]
Band = tuple[int, int, str]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis: `label` with its unit, `names` of the positions 0, 1, … on a categorical axis.

    `hover` is the title of a hover box, with `%{x}` for the position.
    """

    label: str
    log: bool = False
    range: tuple[Number, Number] | None = None
    names: tuple[str, ...] = ()
    hover: str = "layer %{x}"

    @property
    def title(self) -> str:
        """The label, and the scale if it is logarithmic."""
        return self.label + (", log" if self.log else "")


@dataclasses.dataclass(frozen=True)
class Series:
    """Values along x. `kind` is line, points or bars (stacked); `bounds` are 95 % intervals.

    `sizes` are the relative areas of points; `labels` are shown on hover.
    """

    name: str
    x: Sequence[Number]
    y: Numbers
    color: str
    kind: str = "line"
    dash: str = "solid"
    bounds: Sequence[Sequence[Number] | None] = ()
    sizes: Sequence[Number] = ()
    labels: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """Series in one pair of axes; `bands`: phases, `depth`: number of layers encoded by the colour scale."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    depth: int | None = None

    @property
    def left_out(self) -> str:
        """A sentence on the zeros that a logarithmic axis cannot show; empty if there are none."""
        zeros = {
            f"{series.name} at {x:g}"
            for series in self.series
            for x, y in zip(series.x, series.y, strict=True)
            if self.y.log and y is not None and y <= 0
        }
        some = ", ".join(sorted(zeros)[:3]) + (f" and {len(zeros) - 3} more" if len(zeros) > 3 else "")
        return f"Not on the log axis of “{self.title}”, being 0: {some}." if zeros else ""


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """A value for every two layers; `chance`: of random directions; `reverse`: small values are bright."""

    title: str
    label: str
    values: np.ndarray
    range: tuple[Number, Number]
    chance: Number | None
    bands: tuple[Band, ...]
    reverse: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels under one title. `name` is that of its files; without panels, the caption gives the reason."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel | Heatmap, ...] = ()

    @property
    def text(self) -> str:
        """The caption, and the zeros missing on its axes."""
        left_out = (panel.left_out for panel in self.panels if isinstance(panel, Panel))
        return " ".join([self.caption, *filter(None, left_out)])


def phase_bands(analysis: Result) -> tuple[Band, ...]:
    """(first layer, last layer, name) of each run of layers of one phase."""
    runs = itertools.groupby(analysis.per_layer, key=lambda row: row["phase"])
    layers = ((name, [row["L"] for row in rows]) for name, rows in runs)
    return tuple((numbers[0], numbers[-1], name) for name, numbers in layers)


def bars(analysis: Result) -> str:
    """The end of a caption that explains intervals; empty for a run without them."""
    resampled = any("intervals" in row for row in analysis.per_layer)
    return "; bars are 95 % intervals over documents" if resampled else ""


def measured(series: Iterable[Series]) -> tuple[Series, ...]:
    """The series with at least one value."""
    return tuple(line for line in series if any(value is not None for value in line.y))


def by_layer(
    analysis: Result, title: str, y: Axis, series: Iterable[Series], hover: str = "layer %{x}"
) -> Panel:
    """A panel over all layers with the phases in the background; series without values are left out."""
    x = Axis("layer", range=(-0.5, analysis.num_layers - 0.5), hover=hover)
    return Panel(title, x, y, measured(series), phase_bands(analysis))


def depth_color(layer: int, layers: int) -> str:
    """The colour of a layer on the scale DEPTH."""
    scale = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in DEPTH])
    position = layer / max(layers - 1, 1) * (len(DEPTH) - 1)
    channels = [np.interp(position, range(len(DEPTH)), channel) for channel in scale.T]
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)
