"""The decay exponent of a spectrum."""

import numpy as np
from jaxtyping import Float, Float64

from jaxdelta.statistics.per_layer.registry import statistic

_LEAST = 1e-3  # of σ_1: smaller values depend on rounding


@statistic(
    "power_law_exponent",
    needs="spectrum",
    label="decay of the spectrum",
    unit="exponent α of λ_i ∝ i^−α",
    range=(0, None),
    trap="all ranks weigh alike, so those near n, which a short text cuts off, raise it",
    source="Stringer et al. 2019; Agrawal et al. 2022 (α-ReQ)",
)
def power_law_exponent(singular_values: Float[np.ndarray, "*sets r"]) -> Float64[np.ndarray, "*sets"]:
    """α of the least-squares line ln λ_i = c − α ln i over the σ above σ_1/1000.

    Zero with fewer than two such σ.
    """
    values = np.asarray(singular_values, np.float64)
    counted = values > _LEAST * values.max(axis=-1, keepdims=True)
    number = np.maximum(counted.sum(axis=-1, keepdims=True), 1)
    log_rank = np.log(np.arange(1, values.shape[-1] + 1))
    mean = np.where(counted, log_rank, 0).sum(axis=-1, keepdims=True) / number
    centred = np.where(counted, log_rank - mean, 0)
    log_energy = 2 * np.log(np.where(counted, values, 1))
    squares = np.square(centred).sum(axis=-1)
    slope = (centred * log_energy).sum(axis=-1) / np.where(squares > 0, squares, 1)
    return np.where(squares > 0, -slope, 0.0)
