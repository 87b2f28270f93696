"""Several runs by relative depth: what differs in the runs themselves, their figures in bands of depth, their
phases, and the directions of those that share a hidden size and a number of layers. Nothing is printed here.

Layer L of N lies at relative depth (L + 1/2)/N and fills the stretch [L/N, (L+1)/N]. A band of depth holds of
each layer the part of its stretch that lies in the band, so that every layer counts once, whatever N is.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.charts.chart import ORDER, Number, phase_bands
from jaxdelta.report.charts.layers import has_sinks
from jaxdelta.report.compare.metrics import MEASURES, Bounds, Curve, Measure
from jaxdelta.report.compare.settings import Setting, cautions, settings
from jaxdelta.report.result import Result
from jaxdelta.statistics.across_layers.nulls import isotropic_cos_mean, isotropic_p_value
from jaxdelta.statistics.across_layers.overlap import principal_angles

MOST_RUNS = len(ORDER)
MOST_BANDS = 10


@dataclasses.dataclass(frozen=True)
class Part:
    """A figure in a band of depth; `apart` where its interval and the first run's do not overlap."""

    value: float | None
    interval: Bounds = None
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Compared:
    """A figure in a view: every run's layers, and its bands; None where the run has not measured it."""

    measure: Measure
    view: str
    curves: tuple[Curve | None, ...]
    parts: tuple[tuple[Part, ...] | None, ...]

    @property
    def title(self) -> str:
        """The figure's name, and its view where that is not the raw one."""
        return self.measure.title + (f", {self.view}" if self.view != "raw" else "")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The directions of the first run and of run `other`, rows and columns being their layers.

    cosines: |<v_L, v_M>|; shared: mean cos² θ of the principal angles θ between the spans of their first k
    directions; angles: those of layer L with layer L, in degrees, ascending. Random directions give
    `cos_chance`, E|cos|, and `shared_chance`, k/d; `p` is P(|cos| of random directions >= that of L and L).
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
    """A phase of a run: its layers as text, and its row of the verdict, or what there is of it."""

    run: int
    layers: str
    row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found. `left_out` says why runs have no pair; `phases` are by name, then by run."""

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
        """The bands by their ends."""
        ends = [f"{end:.3g}" for end in np.linspace(0, 1, self.bands + 1)]
        return [f"{low}–{high}" for low, high in itertools.pairwise(ends)]


def compare(runs: Sequence[Result], labels: Sequence[str], bands: int | None = None) -> Comparison:
    """Lays runs beside each other; the first is the one that the others are compared with.

    Args:
        runs: two to five.
        labels: their names, all different.
        bands: of depth; without it ten, or as many as the shallowest run has layers.

    Raises:
        UsageError: too few or too many runs or bands, labels that are missing or the same.
    """
    _check(runs, labels)
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
    """Reads a run, and makes sure that it can be compared.

    Raises:
        JaxDeltaError: a file is missing or damaged, or is not an analysis.
    """
    run = Result.load(path)
    try:
        if not (len(run.per_layer), run.hidden) == (run.num_layers, run.directions.shape[2]):
            raise ValueError(f"{run.num_layers} layers of {run.hidden}, {len(run.per_layer)} rows")
        # With itself; one direction a layer is enough to see.
        compare([run, dataclasses.replace(run, directions=run.directions[:, :1])], ["a", "b"], 1)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise JaxDeltaError(f"{path}: is not an analysis ({error!r})") from error
    return run


def labels_of(runs: Sequence[Result], paths: Sequence[Path]) -> list[str]:
    """The models' names; where two are the same the files', and where these are too, their paths."""
    names = [Path(run.model).name for run in runs], [path.stem for path in paths], [*map(str, paths)]
    return next((each for each in names if all(each) and len(set(each)) == len(each)), names[-1])


def in_bands(curve: Curve, bands: int, log: bool) -> tuple[tuple[float | None, Bounds], ...]:
    """The mean of a figure in each of `bands` bands of depth, and an interval that covers at least 95 %.

    mean_b = g⁻¹(Σ_L w_bL g(x_L) / Σ_L w_bL), w_bL the length of layer L's stretch within band b and g the
    logarithm where the figure's axis is logarithmic (one layer may be a thousand times another: the mean is
    geometric), else the identity. Layers without the figure are left out; None where none has it.

    The layers' errors come from the same documents, and how they go together is not kept. The deviation of a
    weighted mean is at most the weighted mean of the deviations, whatever their correlation (Minkowski), so
    the weighted means of the intervals' ends make an interval that is too wide rather than too narrow. None
    where a layer of the band has no interval.
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
    shares = [weight / math.fsum(weight for weight, _, _ in inside) for weight, _, _ in inside]

    def mean(values: Sequence[Number]) -> float:
        numbers = [_log(value) if log else value for value in values]
        found = sum(share * number for share, number in zip(shares, numbers, strict=True))
        return math.exp(found) if log else found

    value = mean([value for _, value, _ in inside])
    if (ends := [bounds for _, _, bounds in inside if bounds]) and len(ends) == len(inside):
        return value, (mean([low for low, _ in ends]), mean([high for _, high in ends]))
    return value, None


def relative_rank(row: dict[str, Any]) -> dict[str, Any]:
    """The rank of a phase's stacked v_L over their number; one layer has none to tell of."""
    rank, layers = row.get("stacked_rank"), row["layers"]
    if rank is None or layers < 2:
        return {"value": None}
    divided = {"value": rank["value"] / layers}
    return divided | ({"interval": [end / layers for end in rank["interval"]]} if "interval" in rank else {})


def steadiness(run: Result) -> list[float | None]:
    """The median |cos| of every layer's v_L with that of other draws of documents, where it was measured.

    No other run can be expected to come closer to a v_L than another text does.
    """
    there = {row["L"]: row["median"] for row in (run.overlap or {}).get("raw", {}).get("v1_stability", ())}
    return [there.get(layer) for layer in range(run.num_layers)]


def _compared(runs: Sequence[Result], bands: int) -> list[Compared]:
    """Every figure that a run has; without sinks too, where a run has any and they change it."""
    found = []
    for measure in MEASURES:
        raw = [measure.curve(run, "raw") for run in runs]
        masked = [measure.curve(run, "masked") for run in runs] if any(map(has_sinks, runs)) else raw
        for view, curves in {"raw": raw, "masked": masked}.items():
            if any(curves) and not (view == "masked" and curves == raw):
                parts = [curve and in_bands(curve, bands, measure.log) for curve in curves]
                both = tuple(_parts(each, parts[0]) for each in parts)
                found.append(Compared(measure, view, tuple(curves), both))
    return found


def _parts(
    found: tuple[tuple[float | None, Bounds], ...] | None,
    first: tuple[tuple[float | None, Bounds], ...] | None,
) -> tuple[Part, ...] | None:
    """The bands, marked where their interval lies apart from the first run's.

    The deviation of a difference is at most the sum of the two deviations, so that intervals of 95 % that do
    not overlap mean a difference at 5 % or less, whatever the runs have in common: a text, weights, nothing.
    Equal figures are marked less often than that (Schenker & Gentleman 2001, Am. Stat. 55:182).
    """
    if found is None:
        return None
    beside = first or ((None, None),) * len(found)
    return tuple(
        Part(value, bounds, bool(bounds and other and (bounds[0] > other[1] or other[0] > bounds[1])))
        for (value, bounds), (_, other) in zip(found, beside, strict=True)
    )


def _pairs(runs: Sequence[Result]) -> list[Pair]:
    """The first run with all that are alike, by as many directions as all of them kept."""
    alike = {i: run for i, run in enumerate(runs) if _alike(runs[0], run)}
    k = min(run.directions.shape[1] for run in alike.values())
    return [_pair(runs[0], run, other, k) for other, run in alike.items() if other]


def _pair(first: Result, run: Result, other: int, k: int) -> Pair:
    """By the function that relates the layers of one run, given the layers of both."""
    n, d = first.num_layers, first.hidden
    both = np.concatenate([first.directions[:, :k], run.directions[:, :k]])
    cosines = principal_angles(both[:, :1]).cosines[:n, n:, 0]
    angles = principal_angles(both).cosines[:n, n:]
    own = np.arange(n)
    return Pair(
        other,
        k,
        cosines,
        np.square(angles).mean(axis=-1),
        np.degrees(np.arccos(angles[own, own])),
        isotropic_p_value(np.diagonal(cosines), d),
        isotropic_cos_mean(d),
        k / d,
    )


def _alike(first: Result, run: Result) -> bool:
    return (first.hidden, first.num_layers) == (run.hidden, run.num_layers)


def _left_out(runs: Sequence[Result], labels: Sequence[str]) -> str:
    """Why the directions of some runs are not compared; empty where all are."""
    others = [
        f"{label} ({run.num_layers} layers of hidden size {run.hidden})"
        for run, label in zip(runs, labels, strict=True)
        if not _alike(runs[0], run)
    ]
    if not others:
        return ""
    return (
        f"Directions of {', '.join(others)} are not compared with those of {labels[0]} "
        f"({runs[0].num_layers} of {runs[0].hidden}): they would have to live in one space, layer by layer."
    )


def _phases(runs: Sequence[Result]) -> list[Phase]:
    found: dict[str, list[Phase]] = {}
    for i, run in enumerate(runs):
        for row in run.verdict or map(_without_verdict, run.phase_overlap):
            found.setdefault(row["phase"], []).append(Phase(i, _layers_of(run, row["phase"]), row))
    return [phase for phases in found.values() for phase in phases]


def _without_verdict(row: dict[str, Any]) -> dict[str, Any]:
    """A phase of a run without resampling, in the words of the verdict."""
    intra = row["intra_cos_mean"] if row["layers"] > 1 else None
    return {"phase": row["phase"], "layers": row["layers"], "intra": {"value": intra}}


def _layers_of(run: Result, phase: str) -> str:
    return ", ".join(
        f"{first}–{last}" if last > first else str(first)
        for first, last, name in phase_bands(run)
        if name == phase
    )


def _log(value: Number) -> float:
    return math.log(value) if value > 0 else -math.inf


def _check(runs: Sequence[Result], labels: Sequence[str]) -> None:
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UsageError(f"two to {MOST_RUNS} runs can be compared, not {len(runs)}")
    if len(labels) != len(runs):
        raise UsageError(f"labels: {len(labels)} for {len(runs)} runs")
    if not all(labels) or len(set(labels)) < len(labels):
        raise UsageError(f"labels must all be there and differ: {', '.join(labels)}")
