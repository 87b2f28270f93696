"""The leading singular values, and the stability of the first direction v_1."""

from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from jaxdelta.statistics.per_layer.inputs import ViewData
from jaxdelta.statistics.per_layer.ranks import energy_shares, numerical_rank
from jaxdelta.statistics.per_layer.registry import statistic

_SHARE: dict[str, Any] = {
    "needs": "spectrum",
    "interval": "unit",
    "unit": "share of ‖δ‖²",
    "range": (0, 1),
}
_FURTHER = "Energy along the first 3 and 10 directions"


@statistic(
    "gamma",
    needs="spectrum",
    interval="log",
    label="along the first direction",
    unit="σ₁ (activation units)",
    log=True,
    range=(0, None),
    figure="norms",
    first_of="top_singvals",
)
def gamma(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """γ_L = σ_1; in the JSON the first of `top_singvals`, and `gamma` among the intervals."""
    return np.asarray(singular_values, np.float64)[..., 0]


@statistic("top1_frac", label="energy along the first direction v_L", column="along v₁", **_SHARE)
def top1_frac(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """p_1, p = λ/Σλ."""
    return _top(singular_values, 1)


@statistic("top3_frac", label="first 3 directions", panel=_FURTHER, **_SHARE)
def top3_frac(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """p_1 + p_2 + p_3."""
    return _top(singular_values, 3)


@statistic("top10_frac", label="first 10 directions", panel=_FURTHER, **_SHARE)
def top10_frac(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """p_1 + … + p_10."""
    return _top(singular_values, 10)


def _top(singular_values: Float[np.ndarray, "*sets r"], count: int) -> Float64[np.ndarray, "*sets"]:
    return energy_shares(singular_values)[..., :count].sum(axis=-1)


@statistic("top_singvals", needs="view", label="leading singular values", range=(0, None), figure=None)
def top_singvals(view: ViewData) -> list[float]:
    """The k largest σ."""
    return view.singular_values[: view.top_k].tolist()


@statistic(
    "sigma1_over_sigma2",
    needs="view",
    label="gap of the first direction",
    range=(1, None),
    trap="near 1, v_1 is noise: split-half .64 at 1.00, .97 at 1.05",
    figure=None,
)
def sigma1_over_sigma2(view: ViewData) -> float | None:
    """σ_1/σ_2."""
    values = view.singular_values
    return float(values[0] / values[1]) if numerical_rank(values) > 1 else None


@statistic(
    "split_half_cos",
    needs="documents",
    label="how steady v_L is, between two halves",
    unit="|cos| (no unit)",
    range=(0, 1),
    trap="halves are noisier than the whole",
    panel="How steady v_L is",
)
def split_half_cos(view: ViewData) -> float | None:
    """|⟨v_1, v_1'⟩| of two random halves of the documents, mean of 10 divisions."""
    if view.half_cosines is None or not numerical_rank(view.singular_values):
        return None
    finite = view.half_cosines[np.isfinite(view.half_cosines)]
    return float(finite.mean()) if finite.size else None
