"""The statistics compared between runs: registered ones, the ledger, and overlaps between layers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxdelta.report.charts.chart import SHARE, Axis, Number, Numbers
from jaxdelta.report.charts.layers import axis, ledger_share
from jaxdelta.report.result import Result
from jaxdelta.spectra.views import view_of
from jaxdelta.statistics.per_layer.registry import Statistic, shown

Bounds = tuple[Number, Number] | None
Value = tuple[Number, Number | None, Any]  # position in layers, value, interval or None


class Curve(NamedTuple):
    """Values and intervals of a run; place L is layer L, place L + 1/2 is between layers L and L + 1."""

    places: tuple[Number, ...]
    values: Numbers
    bounds: tuple[Bounds, ...]
    layers: int

    @property
    def depths(self) -> list[float]:
        """The places as relative depth, (L + 1/2)/N."""
        return [(place + 0.5) / self.layers for place in self.places]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A compared statistic: title and axis of its panel, and the name of its figure.

    `read` yields its values in a view of a run; nothing if the run or the view lacks it.
    """

    title: str
    axis: Axis
    figure: str
    read: Callable[[Result, str], Iterator[Value]]

    def curve(self, run: Result, view: str) -> Curve | None:
        """Its values in a view of a run; None if there are none."""
        entries = list(self.read(run, view))
        if all(value is None for _, value, _ in entries):
            return None
        places, values, bounds = zip(*entries, strict=True)
        pairs = tuple((pair[0], pair[1]) if pair else None for pair in bounds)
        return Curve(places, values, pairs, run.num_layers)


def _of_layers(statistic: Statistic) -> Callable[[Result, str], Iterator[Value]]:
    def read(run: Result, view: str) -> Iterator[Value]:
        for row in run.per_layer:
            values = view_of(row, view) or {}
            yield row["L"], statistic.of(values), values.get("intervals", {}).get(statistic.name)

    return read


def _of_ledger(part: str) -> Callable[[Result, str], Iterator[Value]]:
    def read(run: Result, view: str) -> Iterator[Value]:
        for row in run.per_layer:
            if "ledger" in row and view == "raw":
                yield row["L"], ledger_share(row, part), None

    return read


def _of_neighbours(run: Result, view: str) -> Iterator[Value]:
    for row in (run.overlap or {}).get(view, {}).get("adjacent", ()):
        yield row["L"] + 0.5, row["abs_cos"], row.get("interval")


def _of_captures(run: Result, view: str) -> Iterator[Value]:
    for row in (run.overlap or {}).get(view, {}).get("layers", ()):
        capture = row["leave_one_out"]
        yield row["L"], capture["value"], capture.get("interval")


_CAPTURE = Axis("share of ‖v_L‖² (no unit)", range=SHARE)
MEASURES = (
    *(Measure(s.title, axis(s), str(s.figure), _of_layers(s)) for s in shown("norms", "ranks")),
    Measure("Attention's energy", Axis("share of ‖δ‖²"), "ledger", _of_ledger("attention")),
    Measure("The MLP's energy", Axis("share of ‖δ‖²"), "ledger", _of_ledger("mlp")),
    Measure("Neighbouring layers", Axis("|cos| of L and L+1", range=SHARE), "across", _of_neighbours),
    Measure("v_L within its phase's other layers", _CAPTURE, "across", _of_captures),
)
