"""What a figure shows, as plain data: `contents` fills it, `interactive` and `figures` draw it."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdelta.report.result import Result

# Okabe & Ito's palette, told apart by the colour-blind; all of it is seen on white and on black.
BLUE, ORANGE, GREEN, PURPLE, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
ORDER = (BLUE, ORANGE, GREEN, PURPLE, YELLOW)  # of runs beside each other
GREY = "#888888"  # chance and other yardsticks
DEPTH = (BLUE, PURPLE, YELLOW)  # from the first layer to the last
MAP = "viridis"  # perceptually uniform
SHARE = (0.0, 1.0)  # the whole range of a share, or of a |cos|
Number = float | int  # beartype does not take an int for a float
Numbers = Sequence[Number | None]
Band = tuple[int, int, str]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis with its unit; `names` are those of the places 0, 1, … where they are not numbers.

    `place` is what a hover calls a place on it.
    """

    label: str
    log: bool = False
    range: tuple[Number, Number] | None = None
    names: tuple[str, ...] = ()
    place: str = "layer"

    @property
    def title(self) -> str:
        """The label, and that the axis is logarithmic."""
        return self.label + (", log" if self.log else "")


@dataclasses.dataclass(frozen=True)
class Series:
    """Numbers along x. `kind` is line, points or bars (stacked); `bounds` are 95 % intervals.

    `sizes` are the areas of points, as shares of the largest; `labels` what to say of each.
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
    """Series in one pair of axes; `bands` are the phases behind them, `depth` the layers told by colour."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    depth: int | None = None

    @property
    def left_out(self) -> str:
        """What a logarithmic axis cannot show; empty where it shows all."""
        lost = {
            f"{series.name} at {x:g}"
            for series in self.series
            for x, y in zip(series.x, series.y, strict=True)
            if self.y.log and y is not None and y <= 0
        }
        some = ", ".join(sorted(lost)[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        return f"Not on the log axis of “{self.title}”, being 0: {some}." if lost else ""


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """A value for every two layers; `chance` is what random directions give, `reverse` that small is much."""

    title: str
    label: str
    values: np.ndarray
    range: tuple[Number, Number]
    chance: Number | None
    bands: tuple[Band, ...]
    reverse: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """Panels under one title. `name` is that of its files; without panels the caption says why."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel | Heatmap, ...] = ()

    @property
    def text(self) -> str:
        """The caption, and what its axes leave out."""
        left_out = (panel.left_out for panel in self.panels if isinstance(panel, Panel))
        return " ".join([self.caption, *filter(None, left_out)])


def phase_bands(analysis: Result) -> tuple[Band, ...]:
    """(first layer, last layer, name) of every run of layers of one phase."""
    bands = []
    for name, rows in itertools.groupby(analysis.per_layer, key=lambda row: row["phase"]):
        layers = [row["L"] for row in rows]
        bands.append((layers[0], layers[-1], name))
    return tuple(bands)


def bars(analysis: Result) -> str:
    """What a caption says of the intervals, where there are any."""
    there = any("intervals" in row for row in analysis.per_layer)
    return "; bars are 95 % intervals over documents" if there else ""


def by_layer(analysis: Result, title: str, y: Axis, series: Sequence[Series | None], **options: Any) -> Panel:
    """A panel over all layers with the phases behind; series that are None, or all None, are left out."""
    shown = tuple(one for one in series if one and any(value is not None for value in one.y))
    x = Axis("layer", range=(-0.5, analysis.num_layers - 0.5))
    return Panel(title, x, y, shown, phase_bands(analysis), **options)


def depth_color(layer: int, layers: int) -> str:
    """The colour of a layer between DEPTH's."""
    scale = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in DEPTH])
    place = layer / max(layers - 1, 1) * (len(DEPTH) - 1)
    channels = [np.interp(place, range(len(DEPTH)), channel) for channel in scale.T]
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)
