"""Means and deviations of token norms, relative steps and cosines."""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int


def token_statistics(
    products: tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]],
    groups: Int[np.ndarray, " n"],
    weights: Float64[np.ndarray, "draws G"],
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """The reference's statistics of tokens with these `token_products`, each counted as often as its group.

    frob: √Σ w_i‖δ_i‖². Means, and population deviations, of token_norm ‖δ_i‖; h_norm ‖h_i‖; rel_step
    ‖δ_i‖/max(‖h_i‖, 1e-8); cos_delta_h c_i = <δ_i, h_i>/max(‖δ_i‖‖h_i‖, 1e-8); parallel_frac |c_i|. On the
    host: three numbers a token are nothing, and compiling this took longer than all other figures.
    """
    delta_delta, h_h, delta_h = products
    delta_norm, h_norm = np.sqrt(delta_delta), np.sqrt(h_h)
    step = delta_norm / np.maximum(h_norm, 1e-8)
    cosine = delta_h / np.maximum(delta_norm * h_norm, 1e-8)

    def sums(figure: np.ndarray | None = None) -> Any:
        return weights @ np.bincount(groups, figure, weights.shape[1])

    total = sums()

    def mean(figure: np.ndarray) -> Any:
        return sums(figure) / total

    def deviation(figure: np.ndarray) -> Any:
        middle = figure.mean()  # near the mean, so that nothing cancels
        return np.sqrt(np.maximum(mean(np.square(figure - middle)) - np.square(mean(figure - middle)), 0))

    return {
        "frob": np.sqrt(sums(delta_delta)),
        "token_norm_mean": mean(delta_norm),
        "token_norm_std": deviation(delta_norm),
        "h_norm_mean": mean(h_norm),
        "rel_step_mean": mean(step),
        "rel_step_std": deviation(step),
        "parallel_frac": mean(np.abs(cosine)),
        "cos_delta_h_mean": mean(cosine),
    }
