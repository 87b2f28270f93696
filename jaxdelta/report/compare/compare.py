"""Comparison of runs: settings, statistics by relative depth, phases and directions, as plain data.

Layer L of N lies at relative depth (L + 1/2)/N and covers [L/N, (L+1)/N]. Its weight in a band of depth is
the length of its part inside the band, so that every layer counts once, whatever N is.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxdelta.errors import UsageError
from jaxdelta.report.charts.across_layers import phase_rows
from jaxdelta.report.charts.chart import ORDER, Number, phase_bands
from jaxdelta.report.charts.layers import has_sinks
from jaxdelta.report.compare.metrics import MEASURES, Bounds, Curve, Measure
from jaxdelta.report.compare.settings import Setting, cautions, settings
from jaxdelta.report.result import Result, whole
from jaxdelta.statistics.across_layers.nulls import isotropic_cos_mean, isotropic_p_value
from jaxdelta.statistics.across_layers.overlap import principal_angles
from jaxdelta.statistics.across_layers.verdict import relative_rank

MOST_RUNS = len(ORDER)
MOST_BANDS = 10
Bands = tuple[tuple[float | None, Bounds], ...]  # mean and interval in each band


@dataclasses.dataclass(frozen=True)
class Part:
    """A statistic in a band of depth; `apart`: its interval does not overlap with the first run's."""

    value: float | None
    interval: Bounds = None
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Compared:
    """A statistic in a view, by layer and by band, of every run; None for a run that did not measure it."""

    measure: Measure
    view: str
    curves: tuple[Curve | None, ...]
    parts: tuple[tuple[Part, ...] | None, ...]

    @property
    def title(self) -> str:
        """The name of the statistic, and its view unless that is raw."""
        return self.measure.title + (f", {self.view}" if self.view != "raw" else "")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Directions of the first run (rows: its layers) and of run `other` (columns).

    Attributes:
        cosines: |⟨v_L, v_M⟩|.
        shared: mean cos² θ, θ the principal angles between the first k directions.
        angles: θ of layer L with layer L, in degrees, ascending.
        p: probability that random directions have at least the |cos| of L and L.
        cos_chance, shared_chance: E|cos| and mean cos² θ = k/d of random directions.
    """

    other: int
    k: int
    cosines: Float64[np.ndarray, "N N"]
    shared: Float64[np.ndarray, "N N"]
    angles: Float64[np.ndarray, "N k"]
    p: Float64[np.ndarray, " N"]
    cos_chance: float
    shared_chance: float


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run: its layers as text, and its row of the verdict, or of `phase_rows`."""

    run: int
    layers: str
    row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    `left_out` names the runs whose directions are not compared; `phases` are ordered by name, then run.
    """

    runs: tuple[Result, ...]
    labels: tuple[str, ...]
    bands: int
    settings: tuple[Setting, ...]
    cautions: tuple[str, ...]
    compared: tuple[Compared, ...]
    pairs: tuple[Pair, ...]
    left_out: str
    phases: tuple[Phase, ...]

    @property
    def band_names(self) -> list[str]:
        """Each band as `low–high`."""
        ends = [f"{end:.3g}" for end in np.linspace(0, 1, self.bands + 1)]
        return [f"{low}–{high}" for low, high in itertools.pairwise(ends)]


def compare(runs: Sequence[Result], labels: Sequence[str], bands: int | None = None) -> Comparison:
    """Compares two to five runs, with different labels, with the first of them.

    `bands` is the number of bands of depth: by default ten, at most the layers of the shallowest run.

    Raises:
        UsageError: too few or too many runs or bands, or missing or equal labels.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UsageError(f"two to {MOST_RUNS} runs can be compared, not {len(runs)}")
    if len(labels) != len(runs):
        raise UsageError(f"labels: {len(labels)} for {len(runs)} runs")
    if not all(labels) or len(set(labels)) < len(labels):
        raise UsageError(f"labels must all be there and differ: {', '.join(labels)}")
    shallowest = min(run.num_layers for run in runs)
    bands = min(MOST_BANDS, shallowest) if bands is None else bands
    if not 1 <= bands <= shallowest:
        name = labels[[run.num_layers for run in runs].index(shallowest)]
        raise UsageError(f"bands must be between 1 and {shallowest}, the layers of {name}, not {bands}")
    return Comparison(
        tuple(runs),
        tuple(labels),
        bands,
        settings(runs),
        cautions(runs, labels),
        tuple(_compared(runs, bands)),
        tuple(_pairs(runs)),
        _left_out(runs, labels),
        tuple(_phases(runs)),
    )


def load(path: Path) -> Result:
    """Reads a run, and checks the entries that a comparison needs.

    Raises:
        JaxDeltaError: a file is missing or damaged, or is not an analysis.
    """
    with whole(path):
        run = Result.load(path)
        _check(run)
        return run


def _check(run: Result) -> None:
    """Raises any error if sizes disagree, or an entry is missing or not a number."""
    layers, _, hidden = run.directions.shape
    if (run.num_layers, len(run.per_layer), run.hidden) != (layers, layers, hidden):
        raise ValueError(f"{run.num_layers} layers of {run.hidden}, {len(run.per_layer)} rows")
    for measure, view in itertools.product(MEASURES, ("raw", "masked")):
        if curve := measure.curve(run, view):
            in_bands(curve, 1, measure.axis.log)
    settings([run])
    cautions([run], [""])
    for phase in _phases([run]):
        relative_rank(phase.row)
    steadiness(run)


def labels_of(runs: Sequence[Result], paths: Sequence[Path]) -> list[str]:
    """The names of the models; if two are equal, of the files; if these are equal too, the paths."""
    choices = [Path(run.model).name for run in runs], [path.stem for path in paths], [*map(str, paths)]
    return next((names for names in choices if all(names) and len(set(names)) == len(names)), choices[-1])


def in_bands(curve: Curve, bands: int, log: bool) -> Bands:
    """The mean of a statistic in each of `bands` bands of depth, and an interval that covers at least 95 %.

    mean_b = g⁻¹(Σ_L w_bL g(x_L) / Σ_L w_bL), w_bL the length of layer L inside band b and g the logarithm if
    `log`, else the identity. Layers without a value are left out; the mean is None if no layer has one.

    The ends of the interval are the means of the layers' ends: conservative whatever the correlation of the
    layers' errors (Minkowski). The interval is None if a layer of the band has none.
    """
    ends = np.linspace(0.0, 1.0, bands + 1)
    return tuple(_in_band(curve, low, high, log) for low, high in itertools.pairwise(ends.tolist()))


def _in_band(curve: Curve, low: float, high: float, log: bool) -> tuple[float | None, Bounds]:
    inside: list[tuple[float, Number, Bounds]] = []
    half = 0.5 / curve.layers
    for depth, value, bounds in zip(curve.depths, curve.values, curve.bounds, strict=True):
        weight = min(high, depth + half) - max(low, depth - half)
        if value is not None and weight > 1e-9:  # more than rounding
            inside.append((weight, value, bounds))
    if not inside:
        return None, None
    total = math.fsum(weight for weight, _, _ in inside)
    shares = [weight / total for weight, _, _ in inside]

    def mean(values: Sequence[Number]) -> float:
        numbers = [_log(value) if log else value for value in values]
        average = sum(share * number for share, number in zip(shares, numbers, strict=True))
        return math.exp(average) if log else average

    value = mean([value for _, value, _ in inside])
    if (ends := [bounds for _, _, bounds in inside if bounds]) and len(ends) == len(inside):
        return value, (mean([low for low, _ in ends]), mean([high for _, high in ends]))
    return value, None


def steadiness(run: Result) -> list[float | None]:
    """Median |cos| of each layer's v_L with the v_L of other draws of documents; None if not measured.

    An upper limit of the |cos| to be expected from another run.
    """
    medians = {row["L"]: row["median"] for row in (run.overlap or {}).get("raw", {}).get("v1_stability", ())}
    return [medians.get(layer) for layer in range(run.num_layers)]


def _compared(runs: Sequence[Result], bands: int) -> list[Compared]:
    """Every statistic of any run, raw, and masked if sinks change it."""
    views = ("raw", "masked") if any(map(has_sinks, runs)) else ("raw",)
    compared: list[Compared] = []
    for measure in MEASURES:
        raw = tuple(measure.curve(run, "raw") for run in runs)
        for view in views:
            curves = tuple(measure.curve(run, view) for run in runs)
            if any(curves) and (view == "raw" or curves != raw):
                means = [curve and in_bands(curve, bands, measure.axis.log) for curve in curves]
                parts = tuple(_parts(mean, means[0]) for mean in means)
                compared.append(Compared(measure, view, curves, parts))
    return compared


def _parts(bands: Bands | None, first: Bands | None) -> tuple[Part, ...] | None:
    """The bands, marked if their interval does not overlap with the first run's (see `page.METHOD`)."""
    if bands is None:
        return None
    return tuple(
        Part(value, bounds, bool(bounds and other and (bounds[0] > other[1] or other[0] > bounds[1])))
        for (value, bounds), (_, other) in zip(bands, first or ((None, None),) * len(bands), strict=True)
    )


def _pairs(runs: Sequence[Result]) -> list[Pair]:
    """The first run with each run of the same shape, by the directions common to all of them."""
    same_shape = {i: run for i, run in enumerate(runs) if _same_shape(runs[0], run)}
    k = min(run.directions.shape[1] for run in same_shape.values())
    return [_pair(runs[0], run, other, k) for other, run in same_shape.items() if other]


def _pair(first: Result, run: Result, other: int, k: int) -> Pair:
    n, d = first.num_layers, first.hidden
    both = np.concatenate([first.directions[:, :k], run.directions[:, :k]])
    cosines = principal_angles(both[:, :1]).cosines[:n, n:, 0]
    principal_cosines = principal_angles(both).cosines[:n, n:]
    return Pair(
        other,
        k,
        cosines,
        np.square(principal_cosines).mean(axis=-1),
        np.degrees(np.arccos(np.diagonal(principal_cosines).T)),
        isotropic_p_value(np.diagonal(cosines), d),
        isotropic_cos_mean(d),
        k / d,
    )


def _same_shape(first: Result, run: Result) -> bool:
    return (first.hidden, first.num_layers) == (run.hidden, run.num_layers)


def _left_out(runs: Sequence[Result], labels: Sequence[str]) -> str:
    """A sentence on the runs whose directions are not compared; empty if all are."""
    others = [
        f"{label} ({run.num_layers} layers of hidden size {run.hidden})"
        for run, label in zip(runs, labels, strict=True)
        if not _same_shape(runs[0], run)
    ]
    if not others:
        return ""
    return (
        f"Directions of {', '.join(others)} are not compared with those of {labels[0]} "
        f"({runs[0].num_layers} of {runs[0].hidden}): they do not lie in the same space."
    )


def _phases(runs: Sequence[Result]) -> list[Phase]:
    by_name: dict[str, list[Phase]] = {}
    for i, run in enumerate(runs):
        for row in run.verdict or phase_rows(run):
            by_name.setdefault(row["phase"], []).append(Phase(i, _layers_of(run, row["phase"]), row))
    return [phase for phases in by_name.values() for phase in phases]


def _layers_of(run: Result, phase: str) -> str:
    return ", ".join(
        f"{first}–{last}" if last > first else str(first)
        for first, last, name in phase_bands(run)
        if name == phase
    )


def _log(value: Number) -> float:
    return math.log(value) if value > 0 else -math.inf
