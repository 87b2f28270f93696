"""The statistics by which runs are compared: the registered ones, the ledger, and relations of layers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxdelta.report.charts.chart import SHARE, Axis, Number, Numbers
from jaxdelta.report.charts.layers import axis
from jaxdelta.report.result import Result
from jaxdelta.spectra.views import view_of
from jaxdelta.statistics.per_layer.registry import Statistic, shown

Bounds = tuple[Number, Number] | None
Found = tuple[Number, Number | None, Any]  # place in layers, value, interval or None


class Curve(NamedTuple):
    """Values and intervals of a run's layers: place L is layer L, L + 1/2 between it and the next."""

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
    """A statistic that runs are compared by: the title and axis of its panel, and the page's figure it is in.

    `read` yields its values in a view of a run; none where the run or the view lacks it.
    """

    title: str
    axis: Axis
    figure: str
    read: Callable[[Result, str], Iterator[Found]]

    @property
    def log(self) -> bool:
        """Whether its axis is logarithmic, and a mean of it geometric."""
        return self.axis.log

    def curve(self, run: Result, view: str) -> Curve | None:
        """Its values of a run, None where there are none."""
        found = list(self.read(run, view))
        if all(value is None for _, value, _ in found):
            return None
        places, values, bounds = zip(*found, strict=True)
        pairs = tuple((pair[0], pair[1]) if pair else None for pair in bounds)
        return Curve(places, values, pairs, run.num_layers)


def _of_layers(statistic: Statistic) -> Callable[[Result, str], Iterator[Found]]:
    """A statistic of the layers' rows."""

    def read(run: Result, view: str) -> Iterator[Found]:
        for row in run.per_layer:
            values = view_of(row, view) or {}
            yield row["L"], statistic.of(values), values.get("intervals", {}).get(statistic.name)

    return read


def _of_ledger(part: str) -> Callable[[Result, str], Iterator[Found]]:
    """A sublayer's share of the energy; the ledger has no view but the raw one."""

    def read(run: Result, view: str) -> Iterator[Found]:
        for row in run.per_layer:
            if "ledger" in row and view == "raw":
                whole = row["ledger"]["update"]
                yield row["L"], row["ledger"][part] / whole if whole else None, None

    return read


def _of_neighbours(run: Result, view: str) -> Iterator[Found]:
    """|cos| of layers L and L+1, which lies between the two."""
    for row in (run.overlap or {}).get(view, {}).get("adjacent", ()):
        yield row["L"] + 0.5, row["abs_cos"], row.get("interval")


def _of_captures(run: Result, view: str) -> Iterator[Found]:
    for row in (run.overlap or {}).get(view, {}).get("layers", ()):
        found = row["leave_one_out"]
        yield row["L"], found["value"], found.get("interval")


MEASURES = (
    *(Measure(one.title, axis(one), str(one.figure), _of_layers(one)) for one in shown("norms", "ranks")),
    Measure("Attention's energy", Axis("share of ‖δ‖²"), "ledger", _of_ledger("attention")),
    Measure("The MLP's energy", Axis("share of ‖δ‖²"), "ledger", _of_ledger("mlp")),
    Measure("Neighbouring layers", Axis("|cos| of L and L+1", range=SHARE), "across", _of_neighbours),
    Measure(
        "v_L within its phase's other layers",
        Axis("share of ‖v_L‖² (no unit)", range=SHARE),
        "across",
        _of_captures,
    ),
)
