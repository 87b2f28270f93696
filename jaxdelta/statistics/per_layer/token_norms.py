"""Norms of updates and states, relative steps and cosines: means and deviations over tokens."""

from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxdelta.statistics.per_layer.inputs import TokenTable, ViewData
from jaxdelta.statistics.per_layer.registry import statistic

ByWeighting = Float64[np.ndarray, " B"]
_SIZE: dict[str, Any] = {"needs": "tokens", "range": (0, None)}
_MEAN = _SIZE | {"interval": "log", "log": True}
_NORM = _MEAN | {"unit": "norm (activation units)", "panel": "Norms"}
_DEVIATION = _SIZE | {"figure": None}
_CSORDAS = "Csordás et al. 2025"


@statistic("h_norm_mean", label="state ‖h‖", column="‖h‖", **_NORM)
def h_norm_mean(tokens: TokenTable) -> ByWeighting:
    """Mean ‖h_i‖."""
    return tokens.mean(tokens.state_norm)


@statistic(
    "token_norm_mean",
    label="update ‖δ‖",
    column="‖δ‖",
    trap="norms grow up to 2,700 times over the layers",
    **_NORM,
)
def token_norm_mean(tokens: TokenTable) -> ByWeighting:
    """Mean ‖δ_i‖."""
    return tokens.mean(tokens.norm)


@statistic("token_norm_std", label="deviation of ‖δ‖", **_DEVIATION)
def token_norm_std(tokens: TokenTable) -> ByWeighting:
    """Population deviation of ‖δ_i‖."""
    return tokens.deviation(tokens.norm)


@statistic(
    "rel_step_mean",
    label="relative step",
    unit="mean ‖δ‖ / ‖h‖ (ratio)",
    source=_CSORDAS,
    column="‖δ‖/‖h‖",
    **_MEAN,
)
def rel_step_mean(tokens: TokenTable) -> ByWeighting:
    """Mean ‖δ_i‖ / max(‖h_i‖, 1e-8)."""
    return tokens.mean(tokens.step)


@statistic("rel_step_std", label="deviation of the relative step", source=_CSORDAS, **_DEVIATION)
def rel_step_std(tokens: TokenTable) -> ByWeighting:
    """Population deviation of ‖δ_i‖ / max(‖h_i‖, 1e-8)."""
    return tokens.deviation(tokens.step)


@statistic(
    "cos_delta_h_mean",
    needs="tokens",
    interval="linear",
    label="along the state",
    unit="mean cos(δ, h) (no unit)",
    range=(-1, 1),
    trap="below 0 a layer erases, above 0 it amplifies",
    source=_CSORDAS,
    column="cos(δ, h)",
)
def cos_delta_h_mean(tokens: TokenTable) -> ByWeighting:
    """Mean c_i = ⟨δ_i, h_i⟩ / max(‖δ_i‖‖h_i‖, 1e-8)."""
    return tokens.mean(tokens.cosine)


@statistic(
    "parallel_frac",
    needs="tokens",
    interval="unit",
    label="parallel to the state",
    range=(0, 1),
    figure=None,
)
def parallel_frac(tokens: TokenTable) -> ByWeighting:
    """Mean |c_i|."""
    return tokens.mean(np.abs(tokens.cosine))


@statistic("frob", needs="view", label="size of the whole update", range=(0, None), figure=None)
def frob(view: ViewData) -> float:
    """‖δ‖_F = √Σ ‖δ_i‖² = √Σ σ_i²."""
    if view.tokens is None:
        return float(np.sqrt(np.square(view.singular_values).sum()))
    return float(np.sqrt(view.tokens.sum(view.tokens.update_energy)[0]))


@statistic(
    "mean_share",
    needs="view",
    label="energy of the mean update",
    unit="share of ‖δ‖²",
    range=(0, 1),
    trap="near 1, v_1 is the mean update: see `centred`",
)
def mean_share(view: ViewData) -> float:
    """‖mean δ‖² / mean ‖δ‖²."""
    whole = frob(view) ** 2
    return view.mean_energy / whole if whole else 0.0
