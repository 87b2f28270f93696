"""Effective ranks of a spectrum, by several definitions."""

from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from jaxdelta.spectra.spectrum import resolved


def energy_shares(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets r"]:
    """p_i = σ_i²/Σσ², the share of ‖δ‖_F² along each direction; zero for a zero spectrum."""
    energy = np.square(np.asarray(singular_values, np.float64))
    return _shares(energy)


def effective_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """exp(-Σ p ln p) over p > 1e-12, p = σ²/Σσ²: the matrix-based entropy rank; 0 for a zero spectrum.

    Giraldo et al. 2014; Skean et al. 2025 (arXiv 2502.02013). Not Roy & Vetterli's, whose p is σ/Σσ.
    """
    return _perplexity(energy_shares(singular_values))


def roy_vetterli_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """exp(-Σ p ln p), p = σ/Σσ: Roy & Vetterli's effective rank (EUSIPCO 2007; RankMe, arXiv 2210.02885).

    Over the σ that `numerical_rank` counts: a thousand that are rounding would move the fourth digit.
    """
    values = np.asarray(singular_values, np.float64)
    return _perplexity(_shares(np.where(resolved(values), values, 0)), floor=0.0)


def participation_ratio(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """(Σσ²)²/Σσ⁴ (Gao et al. 2017); 0 for a zero spectrum."""
    return _inverse(np.square(energy_shares(singular_values)).sum(axis=-1))


def stable_rank(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """‖δ‖_F²/‖δ‖_2² (Rudelson & Vershynin 2007); 0 for a zero spectrum."""
    return _inverse(energy_shares(singular_values).max(axis=-1))


def _shares(parts: Float64[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets r"]:
    return parts / np.maximum(parts.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def _perplexity(p: Float64[np.ndarray, "*sets r"], floor: float = 1e-12) -> Any:
    """exp of the entropy of all p above the floor; 0 where all are 0."""
    counted = np.where(p > floor, p, 1)
    return np.where(p.any(axis=-1), np.exp(-np.sum(counted * np.log(counted), axis=-1)), 0.0)


def _inverse(x: Any) -> Any:
    return np.where(x > 0, 1 / np.where(x > 0, x, 1), 0.0)


def numerical_rank(singular_values: Float[np.ndarray, " r"]) -> int:
    """How many singular values stand above float32's resolution, σ > ε σ_1."""
    return int(np.sum(resolved(np.asarray(singular_values))))
