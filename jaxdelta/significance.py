"""Whether an overlap is more than chance, and how far another sample of documents would move a figure.

Axes: N layers, P phases, m draws of a null, G documents, B bootstrap draws.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped

_ROUNDING = 1e-12  # The same pairs summed in another order may differ by this much.
_FLOOR = 1e-12  # stands for 0 on the log and the unit scale
_LARGEST = 700.0  # exp of more is not finite

Scale = Callable[[Any], Any]  # of arrays and of scalars
Segment = tuple[str, int]  # a run of layers: its phase, how many


@dataclasses.dataclass(frozen=True)
class SegmentTest:
    """Are layers of one phase closer than layers of different phases at the same distance?

    `gap` is the mean over pairs within a phase of |cos_ij| minus the mean |cos| of the pairs across phases
    at the same lag |i - j|; `phase_gap` is `lag_matched_gap`. `p_value` is the share of the `orders` of the
    segments whose gap is as large; it cannot go below 1/orders (1/(orders + 1) where not `exact`). A phase's
    p-value is the share of the places to which these orders move it where its gap is as large. Where nothing
    can be compared, gap and p-value are NaN.
    """

    gap: float
    p_value: float
    orders: int
    exact: bool
    phase_gap: Float64[np.ndarray, " P"]
    phase_p_value: Float64[np.ndarray, " P"]


def isotropic_cos_mean(d: int) -> float:
    """E|cos| of two random directions in d dimensions, Γ(d/2)/(√π Γ((d+1)/2)): about √(2/(πd)).

    Cai, Fan & Jiang, JMLR 2013.
    """
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def isotropic_p_value(cosines: Float[np.ndarray, "*shape"], d: int) -> Float64[np.ndarray, "*shape"]:
    """P(|cos| ≥ c) of two random directions in d dimensions: cos² ~ Beta(1/2, (d-1)/2).

    Cai, Fan & Jiang, JMLR 2013.
    """
    import scipy.special  # here: importing it takes 0.4 s

    squares = np.minimum(np.square(np.asarray(cosines, np.float64)), 1)
    return scipy.special.betaincc(0.5, (d - 1) / 2, squares) if d > 1 else np.ones_like(squares)


def p_value(
    observed: Float[np.ndarray, "*shape"] | float, null: Float[np.ndarray, "*shape m"]
) -> Float64[np.ndarray, "*shape"]:
    """(b+1)/(m+1), b of the m draws being at least `observed`: never 0 (Phipson & Smyth 2010)."""
    reached = np.sum(null >= np.asarray(observed)[..., None], axis=-1)
    return np.asarray((reached + 1) / (null.shape[-1] + 1))


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Adjusted p-values, min over j ≥ i of p_(j) n/j: those below q hold a share of at most q false ones.

    Benjamini & Hochberg 1995, for independent or positively dependent tests.
    """
    n, order = len(p), np.argsort(p)
    scaled = np.asarray(p, np.float64)[order] * n / np.arange(1, n + 1)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted


def lag_matched_gap(
    overlap: Float64[np.ndarray, "N N"], members: Bool[np.ndarray, "P N"]
) -> Float64[np.ndarray, " P"]:
    """How much closer a phase's layers are to each other than to others equally far away.

    Mean over pairs within the phase of |cos_ij| - (mean |cos| of the pairs with one layer in the phase at the
    same lag |i - j|); pairs without such partners are left out, and it is NaN where none remain. Overlap
    that only decays with distance leaves no gap.
    """
    return _gap(overlap, lambda a, b: (a & b, a ^ b), members)


def segment_test(
    overlap: Float64[np.ndarray, "N N"], phases: Sequence[str], orders: int = 2000, seed: int = 0
) -> SegmentTest:
    """SegmentTest of |cos| between layers, by reordering the phases' segments.

    A segment is a run of layers of one phase; a phase may have several. Reordered, segments keep their
    sizes: smooth drift over the layers looks alike in every order (shuffled layers would look rougher than
    it is, and be rejected always). All orders that differ are tried if there are at most `orders`, the
    observed one among them; else that many random ones. p cannot go below one over their number.

    Of 2000 random walks on the sphere over 28 layers, in the default phases, 5 % have p ≤ .05 whatever
    their step. A phase at either end has fewer pairs to compare with: up to 9 % of its p-values are ≤ .05.
    """
    segments = [(name, len(list(run))) for name, run in itertools.groupby(phases)]
    names = list(dict.fromkeys(phases))
    repeats = math.prod(math.factorial(count) for count in Counter(segments).values())
    exact = math.factorial(len(segments)) // repeats <= orders
    tried = _distinct(segments) if exact else _shuffled(segments, orders, seed)
    labels = np.array([_labels(order, names) for order in [segments, *tried]])
    observed, *gaps = _gap(overlap, lambda a, b: (a == b, a != b), labels)
    chance = _share(observed, np.array(gaps), added=not exact)
    by_phase = [_moved(overlap, np.unique(labels == p, axis=0), labels[0] == p) for p in range(len(names))]
    phase_gap, phase_chance = np.array(by_phase).T
    return SegmentTest(float(observed), chance, len(gaps), exact, phase_gap, phase_chance)


def t_interval(
    estimate: Float[np.ndarray, "*shape"] | float,
    without: Float[np.ndarray, "*shape G"],
    scale: str | Sequence[str] = "linear",
    draws: Float[np.ndarray, "*shape B"] | None = None,
    level: float = 0.95,
) -> tuple[Float64[np.ndarray, "*shape"], Float64[np.ndarray, "*shape"]]:
    """Confidence interval of a figure from its values without each of G documents.

    g⁻¹(g(estimate) ± t_ν s), t_ν Student's quantile; g is the identity (`linear`), log (`log`, positive
    figures) or log x/(1-x) (`unit`, figures in [0, 1]), one for all or one for each row. s is the
    jackknife's, √((G-1)/G Σ (y_g - ȳ)²) of y = g(without), or, where draws of whole documents with
    replacement are given (`cluster_weights`), √(G/(G-1)) times their deviation: the jackknife fails for
    figures that jump, as captures of subspaces without a gap do (Efron 1982). ν = 2(G-1)/(κ-1), at most G-1,
    κ the kurtosis of y: the fewer documents decide on a figure, the less is known of s (Satterthwaite 1946;
    for clusters Carter, Schnepel & Steigerwald 2017). Values that are all the same leave the estimate itself.

    Raises:
        ValueError: fewer than two documents, which tell nothing about others, or an unknown scale.
    """
    import scipy.special  # here: importing it takes 0.4 s

    documents = without.shape[-1]
    scales = [scale] if isinstance(scale, str) else scale
    if documents < 2 or not set(scales) <= set(_SCALES):
        raise ValueError(
            f"t_interval needs at least 2 documents and one of {list(_SCALES)}: {documents}, {scale!r}"
        )
    estimate = np.asarray(estimate, np.float64)
    every = np.concatenate([estimate[..., None], without, *([] if draws is None else [draws])], axis=-1)
    middle, moved, drawn = np.split(_by_row(_SCALES, scale, every), [1, documents + 1], axis=-1)
    if draws is None:
        spread = moved.std(axis=-1) * math.sqrt(documents - 1)
    else:
        spread = drawn.std(axis=-1, ddof=1) * math.sqrt(documents / (documents - 1))
    half = scipy.special.stdtrit(_degrees(moved), (1 + level) / 2) * spread
    bounds = _by_row(_INVERSE, scale, middle + half[..., None] * [-1, 1])
    known = spread <= _ROUNDING * np.abs(middle[..., 0])
    low, high = np.minimum(bounds[..., 0], estimate), np.maximum(bounds[..., 1], estimate)
    return np.where(known, estimate, low), np.where(known, estimate, high)


def _degrees(values: Float64[np.ndarray, "*shape G"]) -> Float64[np.ndarray, "*shape"]:
    """2(G-1)/(κ-1), between 1 and G-1; κ is unbiased for normal values, and theirs for fewer than four."""
    n = values.shape[-1]
    squares = np.square(values - values.mean(axis=-1, keepdims=True))
    variance = squares.mean(axis=-1)
    ratio = np.square(squares).mean(axis=-1) / np.square(np.where(variance > 0, variance, 1))
    excess = np.zeros_like(ratio)
    if n > 3:
        excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (ratio - 3) + 6)
    return np.asarray(np.clip(2 * (n - 1) / np.maximum(excess + 2, 1e-9), 1, n - 1))


def cluster_weights(groups: int, draws: int, seed: int) -> Float64[np.ndarray, "B G"]:
    """How often each of G documents is drawn when G are drawn with replacement, B times."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)


def half_weights(groups: int, repeats: int, seed: int) -> Float64[np.ndarray, "R 2 G"]:
    """Which documents are in the first and which in the second half, R random times; none if G < 2.

    The second half has one more where G is odd.
    """
    rng = np.random.default_rng(seed)
    first = np.tile(np.arange(groups) < groups // 2, (repeats if groups > 1 else 0, 1))
    first = rng.permuted(first, axis=1)
    return np.stack([first, ~first], axis=1).astype(np.float64)


def _gap(
    overlap: Float64[np.ndarray, "N N"],
    compared: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    labels: Shaped[np.ndarray, "R N"],
) -> Float64[np.ndarray, " R"]:
    """Σ_lag n (mean |cos| within - mean |cos| crossing) / Σ_lag n, n pairs within; for each row of labels.

    `compared` tells from two layers' labels whether they are a pair within, and whether one crossing. Lags
    without both kinds are left out.
    """
    total, weight = np.zeros((2, len(labels)))
    for lag in range(1, len(overlap)):
        values = np.abs(overlap.diagonal(lag))
        within, crossing = compared(labels[:, :-lag], labels[:, lag:])
        n, m = within.sum(axis=1), crossing.sum(axis=1)
        matched = (n > 0) & (m > 0)
        difference = within @ values - crossing @ values * n / np.maximum(m, 1)
        total, weight = total + matched * difference, weight + matched * n
    return np.where(weight > 0, total / np.maximum(weight, 1), np.nan)


def _moved(
    overlap: Float64[np.ndarray, "N N"], places: Bool[np.ndarray, "R N"], observed: Bool[np.ndarray, " N"]
) -> tuple[float, float]:
    """The gap of the phase `observed`, and its p-value among all its distinct places.

    Each place counts once: weighed by how many orders have it, a phase at an end could never be significant.
    """
    gap = lag_matched_gap(overlap, observed[None])[0]
    return float(gap), _share(gap, lag_matched_gap(overlap, places), added=False)


def _share(observed: float, gaps: Float64[np.ndarray, " R"], added: bool) -> float:
    """The share of the gaps that reach the observed one, itself `added` where it is not among them."""
    gaps = gaps[np.isfinite(gaps)]
    reached = np.sum(gaps >= observed - _ROUNDING)
    return float((reached + added) / (len(gaps) + added)) if np.isfinite(observed) else math.nan


def _distinct(segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
    """All orders that differ."""
    if not segments:
        yield ()
    for first in dict.fromkeys(segments):
        rest = list(segments)
        rest.remove(first)
        yield from ((first, *order) for order in _distinct(rest))


def _shuffled(segments: Sequence[Segment], orders: int, seed: int) -> Iterator[list[Segment]]:
    rng = np.random.default_rng(seed)
    return ([segments[i] for i in rng.permutation(len(segments))] for _ in range(orders))


def _labels(order: Sequence[Segment], names: Sequence[str]) -> np.ndarray:
    """Each layer's phase, as its place among the names."""
    return np.repeat([names.index(name) for name, _ in order], [size for _, size in order])


def _log(x: Any) -> Any:
    return np.log(np.maximum(x, np.finfo(np.float64).tiny))


def _exp(x: Any) -> Any:
    return np.exp(np.clip(x, -_LARGEST, _LARGEST))


def _logit(x: Any) -> Any:
    inside = np.clip(x, _FLOOR, 1 - _FLOOR)
    return np.log(inside / (1 - inside))


def _expit(x: Any) -> Any:
    return 1 / (1 + _exp(-x))


_SCALES: dict[str, Scale] = {"linear": np.asarray, "log": _log, "unit": _logit}
_INVERSE: dict[str, Scale] = {"linear": np.asarray, "log": _exp, "unit": _expit}


def _by_row(
    functions: dict[str, Scale], scale: str | Sequence[str], x: Float64[np.ndarray, "*shape b"]
) -> Float64[np.ndarray, "*shape b"]:
    """One function of all of x, or of each of its rows that of the row's own scale."""
    if isinstance(scale, str):
        return functions[scale](x)
    moved, names = np.empty_like(x), np.asarray(scale)
    for name in dict.fromkeys(scale):
        rows = names == name
        moved[rows] = functions[name](x[rows])
    return moved
