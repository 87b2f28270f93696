"""What is measured of every layer, and the summaries of its views."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from jaxdelta.spectra.group_moments import FACTOR_ROWS, LEADING, Crossed, Resampled
from jaxdelta.spectra.spectrum import Spectrum
from jaxdelta.spectra.views import DEFAULT_SINK_FACTOR, MASKED, RAW, Selection, View
from jaxdelta.text.groups import Groups
from jaxdelta.utils.arrays import AnyArray

CROSSED = (RAW, MASKED)  # the views whose layers are compared


class Found(NamedTuple):
    """What the device finds of a view.

    `products`: see `token_products`; `owned`: each token's share of σ_1²; `mean_energy`: ‖Σ_i δ_i‖²/n;
    `resampled` and `crossed` where documents are drawn, the latter of the views that are compared. Of a long
    text some products and shares are unknown, see `pooling`.
    """

    spectrum: Spectrum
    products: tuple[AnyArray, AnyArray, AnyArray] | None
    owned: Float64[AnyArray, "*layers n"] | None
    mean_energy: Float64[AnyArray, "*layers"]
    resampled: Resampled | None = None
    crossed: Crossed | None = None


@dataclasses.dataclass(frozen=True)
class Design:
    """What is measured of every layer: `k` directions of each view, and, with `groups`, what resampling and
    the layers' comparison need. `method`: `gram` or `full`, see `update_spectrum`."""

    k: int
    method: str = "gram"
    views: tuple[View, ...] = (RAW,)
    sink_factor: float = DEFAULT_SINK_FACTOR
    groups: Groups | None = None

    @property
    def plain(self) -> bool:
        """Whether only the raw view is measured, and nothing beside it."""
        return self.views == (RAW,) and self.groups is None

    def selection(self, view: View) -> Selection | None:
        """The view as numbers; None where it is the only one."""
        return None if self.plain else Selection.of(view)

    def basis_size(self, n: int, d: int) -> int:
        """How many directions are computed: see `resampling` for why they are half as many again."""
        return min(self.k + (self.k + 1) // 2 if self.groups else self.k, n, d)

    def axes(self, view: View, n: int, d: int) -> int:
        """Of how many axes the vectors are found: resampling wants some, and a factor more."""
        wanted = FACTOR_ROWS if view in CROSSED and n > FACTOR_ROWS else LEADING
        return max(self.basis_size(n, d), min(wanted, n, d) if self.groups else 0)


@dataclasses.dataclass(frozen=True)
class ViewFigures:
    """`Found` of one view of one layer, on the host, and which tokens it kept.

    `on_host`: the spectrum failed its certificate and was computed again by NumPy.
    """

    found: Found
    k: int
    kept: Bool[np.ndarray, " n"]
    on_host: bool = False

    @property
    def crossed(self) -> Crossed | None:
        """What compares the view with other layers', where it is compared."""
        return self.found.crossed

    @property
    def singular_values(self) -> Float64[np.ndarray, " r"]:
        """All of them, descending."""
        return np.asarray(self.found.spectrum.singular_values)

    @property
    def directions(self) -> Float64[np.ndarray, "k d"]:
        """The first k right singular vectors."""
        return self.basis[: self.k]

    @property
    def basis(self) -> Float64[np.ndarray, "c d"]:
        """Those, and as many again where resampling needs them."""
        return np.asarray(self.found.spectrum.directions)

    @property
    def products(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The `token_products` of the tokens kept, where they are known."""
        if self.found.products is None:
            return None
        first, second, third = (np.asarray(part)[self.kept] for part in self.found.products)
        return first, second, third

    @property
    def defect(self) -> float:
        """The spectrum's certificate."""
        return float(self.found.spectrum.defect)

    @property
    def finite(self) -> bool:
        """Whether no token's figures overflowed."""
        return all(bool(np.isfinite(part).all()) for part in self.found.products or ())


class LayerFigures(NamedTuple):
    """A layer's figures by view, and, unless the design is plain, Σ over its tokens of `state_products`."""

    views: dict[View, ViewFigures]
    ledger: dict[str, float] | None
