"""The plan of measurements and the summary of a view, which rows and moments both return.

Axes: n tokens, d hidden size, r = min(n, d) singular values, c basis directions, q leading axes, G groups.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from jaxdelta.spectra.channels import ChannelTable
from jaxdelta.spectra.views import DEFAULT_SINK_FACTOR, MASKED, RAW, View

COMPARED_VIEWS = (RAW, MASKED)  # the views whose layers are compared
FACTOR_ROWS = 512


@dataclasses.dataclass(frozen=True)
class MeasurementPlan:
    """What is measured in every layer.

    Attributes:
        k: number of directions kept of each view.
        method: `gram` or `full`, see `decompose`.
        views: the views, RAW first.
        sink_factor: see `without_sinks`.
        resampled: whether the inputs of resampling and of the comparison of layers are computed.
    """

    k: int
    method: str = "gram"
    views: tuple[View, ...] = (RAW,)
    sink_factor: float = DEFAULT_SINK_FACTOR
    resampled: bool = False

    def basis_size(self, n: int, d: int) -> int:
        """Number c of directions computed; `bootstrap` explains why resampling needs half as many again."""
        return min(self.k + (self.k + 1) // 2 if self.resampled else self.k, n, d)

    def compares(self, view: View) -> bool:
        """Whether the layers of the view are compared."""
        return self.resampled and view in COMPARED_VIEWS


class ViewSummary(NamedTuple):
    """One view of a layer's update δ, from its rows or from its moments.

    Attributes:
        singular_values: all σ, descending.
        basis: the first c right singular vectors, the kept directions first; c ≥ k, see `basis_size`.
        certificate: see `spectrum.residual`.
        mean_energy: ‖Σ_i δ_i‖²/n, the energy of the mean update.
        products: <δ_i, δ_i>, <h_i, h_i> and <δ_i, h_i> of each token; None if unknown, as in the centred
            views of a long text.
        sigma1_shares: u_i1², each token's share of σ_1²; None if unknown.
        group_moments: A_g = V (Σ_{i in g} δ_i δ_iᵀ) Vᵀ for each group, V the q leading axes; None, like the
            next three, without resampling.
        group_rest: energy of each group outside these axes.
        coupling: basis · Σ_{i in g} δ_i δ_iᵀ for each group; None, like the next, if the layers of the view
            are not compared.
        factor: F with FᵀF = δᵀδ: δ itself or, for more than FACTOR_ROWS rows, its leading FACTOR_ROWS
            directions times their σ.
        channels: energies by channel, in COMPARED_VIEWS only.
        kept: mask of the tokens of the view (all, or all but sinks); set on the host, like the next two.
        on_host: whether the spectrum failed its certificate and NumPy computed it again.
        sinks_left: number of sinks in a masked view whose rows were not set aside in time.
    """

    singular_values: Float64[Any, "*layers r"]
    basis: Float64[Any, "*layers c d"]
    certificate: Float64[Any, "*layers"]
    mean_energy: Float64[Any, "*layers"]
    products: tuple[Any, Any, Any] | None = None
    sigma1_shares: Float64[Any, "*layers n"] | None = None
    group_moments: Float64[Any, "*layers G q q"] | None = None
    group_rest: Float64[Any, "*layers G"] | None = None
    coupling: Float32[Any, "*layers G c d"] | None = None
    factor: Float32[Any, "*layers R d"] | None = None
    channels: ChannelTable | None = None
    kept: Bool[Any, "*layers n"] | None = None
    on_host: bool | None = None
    sinks_left: int | None = None

    @property
    def finite(self) -> bool:
        """Whether all products and singular values are finite."""
        return all(bool(np.isfinite(part).all()) for part in (*(self.products or ()), self.singular_values))

    @property
    def kept_products(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """`products` of the kept tokens."""
        if self.products is None:
            return None
        updates, states, mixed = (np.asarray(part)[self.kept] for part in self.products)
        return updates, states, mixed

    def for_comparison(self) -> "ViewSummary":
        """The summary without arrays over tokens or groups, which only the layer's row needs."""
        return ViewSummary(*self[:4], coupling=self.coupling, factor=self.factor)


class LayerSummary(NamedTuple):
    """The summaries of a layer's views, and the sum over tokens of each column of `state_products`."""

    views: dict[View, ViewSummary]
    energies: dict[str, float]


def resolved(values: Float[Any, "*sets r"]) -> Bool[Any, "*sets r"]:
    """Mask of the singular values above float32's resolution, σ > ε σ_1; their number is the rank."""
    return values > float(np.finfo(np.float32).eps) * values.max(axis=-1, keepdims=True)
