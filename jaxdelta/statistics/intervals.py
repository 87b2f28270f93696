"""p-values and confidence intervals.

Axes: m draws of a null, G documents, B bootstrap draws.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

ROUNDING = 1e-12  # Sums of the same pairs in different orders may differ by this much.
_FLOOR = 1e-12  # stands for 0 on the unit scale
_LARGEST = 700.0  # exp of more is not finite
Scale = Callable[[Any], Any]


def p_value(
    observed: Float[np.ndarray, "*shape"] | float, null: Float[np.ndarray, "*shape m"]
) -> Float64[np.ndarray, "*shape"]:
    """(b+1)/(m+1), where b of the m draws are at least `observed`: never 0 (Phipson & Smyth 2010)."""
    reached = np.sum(null >= np.asarray(observed)[..., None], axis=-1)
    return np.asarray((reached + 1) / (null.shape[-1] + 1))


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Adjusted p-values, min over j ≥ i of p_(j) n/j: rejecting below q keeps the false discovery rate at q.

    Benjamini & Hochberg 1995, for independent or positively dependent tests.
    """
    n, order = len(p), np.argsort(p)
    scaled = np.asarray(p, np.float64)[order] * n / np.arange(1, n + 1)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted


def t_interval(
    estimate: Float[np.ndarray, "*shape"] | float,
    without: Float[np.ndarray, "*shape G"],
    scale: str | Sequence[str] = "linear",
    draws: Float[np.ndarray, "*shape B"] | None = None,
    level: float = 0.95,
) -> tuple[Float64[np.ndarray, "*shape"], Float64[np.ndarray, "*shape"]]:
    """Confidence interval of a statistic from its values without each of G documents.

    g⁻¹(g(estimate) ± t_ν s), t_ν Student's quantile. g is the identity (`linear`), log (`log`, positive
    statistics) or log x/(1-x) (`unit`, statistics in [0, 1]). s is the jackknife's standard error,
    √((G-1)/G Σ (y_g - ȳ)²) of y = g(without), or √(G/(G-1)) times the standard deviation of `draws`: the
    jackknife fails for discontinuous statistics, such as captures of subspaces without a gap (Efron 1982).
    ν = 2(G-1)/(κ-1), at most G-1, κ the kurtosis of y: if few documents dominate, s is less certain
    (Satterthwaite 1946; for clusters Carter, Schnepel & Steigerwald 2017). Equal values give an interval of
    zero width.

    Args:
        estimate: the statistic of all documents.
        without: the statistic without each document.
        scale: one scale for all, or one for each row.
        draws: the statistic in bootstrap draws of whole documents, with replacement (`cluster_weights`).
        level: the confidence level.

    Raises:
        ValueError: fewer than two documents, or an unknown scale.
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
    exact = spread <= ROUNDING * np.abs(middle[..., 0])
    low, high = np.minimum(bounds[..., 0], estimate), np.maximum(bounds[..., 1], estimate)
    return np.where(exact, estimate, low), np.where(exact, estimate, high)


def _degrees(values: Float64[np.ndarray, "*shape G"]) -> Float64[np.ndarray, "*shape"]:
    """2(G-1)/(κ-1), between 1 and G-1; κ is unbiased for normal values, and 3 for fewer than four values."""
    n = values.shape[-1]
    squares = np.square(values - values.mean(axis=-1, keepdims=True))
    variance = squares.mean(axis=-1)
    ratio = np.square(squares).mean(axis=-1) / np.square(np.where(variance > 0, variance, 1))
    excess = np.zeros_like(ratio)
    if n > 3:
        excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (ratio - 3) + 6)
    return np.asarray(np.clip(2 * (n - 1) / np.maximum(excess + 2, 1e-9), 1, n - 1))


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
    """The function of one scale for all of x, or of a scale for each row."""
    if isinstance(scale, str):
        return functions[scale](x)
    moved, names = np.empty_like(x), np.asarray(scale)
    for name in dict.fromkeys(scale):
        rows = names == name
        moved[rows] = functions[name](x[rows])
    return moved
