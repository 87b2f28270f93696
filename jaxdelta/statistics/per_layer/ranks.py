"""Effective ranks of a spectrum, by several definitions, with p = λ/Σλ, λ = σ².

For every spectrum stable rank ≤ participation ratio ≤ eff_rank ≤ Roy & Vetterli's ≤ number of nonzero values.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from jaxdelta.spectra.view_summary import resolved
from jaxdelta.statistics.per_layer.registry import statistic

_OTHERS = "Rank by other definitions"
_RANK: dict[str, Any] = {
    "needs": "spectrum",
    "unit": "number of directions",
    "log": True,
    "range": (1, "r"),
}


def energy_shares(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets r"]:
    """p_i = σ_i²/Σσ², the share of ‖δ‖_F² along each direction; zero for a zero spectrum."""
    return _shares(np.square(np.asarray(singular_values, np.float64)))


@statistic(
    "eff_rank",
    interval="log",
    label="effective rank",
    trap="not Roy & Vetterli's; grows with n",
    source="Giraldo et al. 2014; Skean et al. 2025 (arXiv 2502.02013)",
    column="effective rank",
    **_RANK,
)
def effective_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """exp(−Σ p ln p) over p > 1e-12, p = λ/Σλ.

    The matrix-based entropy rank; zero for a zero spectrum. Not Roy & Vetterli's, whose p is σ/Σσ.
    """
    return _perplexity(energy_shares(singular_values))


@statistic(
    "roy_vetterli_rank",
    label="Roy & Vetterli's rank",
    trap="on one spectrum 791 where `eff_rank` is 178",
    source="Roy & Vetterli 2007; RankMe (arXiv 2210.02885)",
    panel=_OTHERS,
    **_RANK,
)
def roy_vetterli_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """exp(−Σ p ln p), p = σ/Σσ.

    Only over the `resolved` σ: a thousand values of rounding error would change the fourth digit.
    """
    values = np.asarray(singular_values, np.float64)
    return _perplexity(_shares(np.where(resolved(values), values, 0)), floor=0.0)


@statistic(
    "participation_ratio", label="participation ratio", source="Gao et al. 2017", panel=_OTHERS, **_RANK
)
def participation_ratio(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """(Σλ)²/Σλ².

    Zero for a zero spectrum.
    """
    return _inverse(np.square(energy_shares(singular_values)).sum(axis=-1))


@statistic("stable_rank", label="stable rank", source="Rudelson & Vershynin 2007", panel=_OTHERS, **_RANK)
def stable_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """‖δ‖_F²/σ_1².

    Zero for a zero spectrum.
    """
    return _inverse(energy_shares(singular_values).max(axis=-1))


def _shares(parts: Float64[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets r"]:
    return parts / np.maximum(parts.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def _perplexity(p: Float64[np.ndarray, "*sets r"], floor: float = 1e-12) -> Any:
    """exp of the entropy of the p above the floor; 0 if all are 0."""
    counted = np.where(p > floor, p, 1)
    return np.where(p.any(axis=-1), np.exp(-np.sum(counted * np.log(counted), axis=-1)), 0.0)


def _inverse(x: Any) -> Any:
    return np.where(x > 0, 1 / np.where(x > 0, x, 1), 0.0)


def numerical_rank(singular_values: Float[np.ndarray, " r"]) -> int:
    """Number of singular values above float32's resolution, σ > ε σ_1."""
    return int(np.sum(resolved(np.asarray(singular_values))))
