"""What is measured of every layer, and the summary of a view that both makers return.

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
    """What is measured of every layer: `k` directions of each view, and where it is `resampled` what
    resampling and the comparison of layers need.

    `method`: `gram` or `full`, see `update_spectrum`; `sink_factor`: see `without_sinks`.
    """

    k: int
    method: str = "gram"
    views: tuple[View, ...] = (RAW,)
    sink_factor: float = DEFAULT_SINK_FACTOR
    resampled: bool = False

    def basis_size(self, n: int, d: int) -> int:
        """Number of directions computed; `bootstrap` explains why resampling needs half as many again."""
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
        products: <δ_i, δ_i>, <h_i, h_i> and <δ_i, h_i> of each token; None where they are unknown, as in the
            centred views of a long text.
        sigma1_shares: u_i1², each token's share of σ_1²; None where unknown.
        group_moments: A_g = V (Σ_{i in g} δ_i δ_iᵀ) Vᵀ for each group, V the q leading axes; None, as the
            next three, where nothing is resampled.
        group_rest: energy of each group outside of these axes.
        coupling: basis · Σ_{i in g} δ_i δ_iᵀ for each group; None, as the next, where layers of the view are
            not compared.
        factor: F with FᵀF = δᵀδ: δ itself, or, where it has more than FACTOR_ROWS rows, its leading
            FACTOR_ROWS directions times their σ.
        channels: energies by channel; of the whole update alone, not centred.
        kept: the tokens of the view: all, or those that are no sinks; set on the host, as the next two.
        on_host: the spectrum failed its certificate and was computed again by NumPy.
        sinks_left: sinks that a masked view still contains: their rows were not set aside in time.
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
        """Whether no token's products overflowed, and no singular value."""
        return all(bool(np.isfinite(part).all()) for part in (*(self.products or ()), self.singular_values))

    @property
    def kept_products(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """`products` of the kept tokens."""
        if self.products is None:
            return None
        first, second, third = (np.asarray(part)[self.kept] for part in self.products)
        return first, second, third

    def for_comparison(self) -> "ViewSummary":
        """The summary without its arrays of tokens and of groups' moments. Only its row has these."""
        return ViewSummary(
            *self[:4],  # singular_values, basis, certificate, mean_energy
            coupling=self.coupling,
            factor=self.factor,
        )


class LayerSummary(NamedTuple):
    """The summaries of a layer's views, and Σ over its tokens of each column of `state_products`."""

    views: dict[View, ViewSummary]
    energies: dict[str, float]


def resolved(values: Float[Any, "*sets r"]) -> Bool[Any, "*sets r"]:
    """Which singular values stand above float32's resolution, σ > ε σ_1; their number is the rank."""
    return values > float(np.finfo(np.float32).eps) * values.max(axis=-1, keepdims=True)
