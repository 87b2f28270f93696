"""The inputs of per-layer statistics: a view's table of tokens, and the view as a whole.

NumPy on the host. Axes: n tokens, G groups of documents, B weightings of them, r singular values, d
channels of the residual stream.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from jaxdelta.spectra.channels import ChannelTable

_FLOOR = 1e-8  # the reference's smallest divisor


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Squared norms and inner products of every token, and weightings of the groups of tokens.

    Attributes:
        update_energy: ‖δ_i‖².
        state_energy: ‖h_i‖² of the state before the update.
        inner: ⟨δ_i, h_i⟩.
        groups: the token's group.
        weights: number of times that each weighting counts each group; once each in the first.
    """

    update_energy: Float64[np.ndarray, " n"]
    state_energy: Float64[np.ndarray, " n"]
    inner: Float64[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    weights: Float64[np.ndarray, "B G"]

    @cached_property
    def norm(self) -> Float64[np.ndarray, " n"]:
        """‖δ_i‖."""
        return np.sqrt(self.update_energy)

    @cached_property
    def state_norm(self) -> Float64[np.ndarray, " n"]:
        """‖h_i‖."""
        return np.sqrt(self.state_energy)

    @cached_property
    def step(self) -> Float64[np.ndarray, " n"]:
        """‖δ_i‖ / max(‖h_i‖, 1e-8)."""
        return self.norm / np.maximum(self.state_norm, _FLOOR)

    @cached_property
    def cosine(self) -> Float64[np.ndarray, " n"]:
        """⟨δ_i, h_i⟩ / max(‖δ_i‖‖h_i‖, 1e-8)."""
        return self.inner / np.maximum(self.norm * self.state_norm, _FLOOR)

    @cached_property
    def count(self) -> Float64[np.ndarray, " B"]:
        """Σ w_i."""
        return self.weights @ np.bincount(self.groups, minlength=self.weights.shape[1])

    def sum(self, values: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " B"]:
        """Σ w_i x_i, summed by group first: O(n + BG)."""
        return self.weights @ np.bincount(self.groups, values, self.weights.shape[1])

    def mean(self, values: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " B"]:
        """Σ w_i x_i / Σ w_i."""
        return self.sum(values) / self.count

    def deviation(self, values: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " B"]:
        """The population deviation √(Σ w_i (x_i - x̄)² / Σ w_i)."""
        centred = values - values.mean()  # avoids cancellation
        return np.sqrt(np.maximum(self.mean(np.square(centred)) - np.square(self.mean(centred)), 0))


@dataclasses.dataclass(frozen=True)
class ViewData:
    """Everything that a statistic of one view of one layer may depend on.

    Attributes:
        singular_values: all σ, descending.
        tokens: None if only sums over the text are known.
        channels: None if the view has no channel energies.
        mean_energy: ‖Σ_i δ_i‖²/n.
        n, hidden, top_k: number of tokens in the view, d, and number of singular values in the JSON.
        half_cosines: |⟨v_1, v_1'⟩| of halves of the documents, NaN if a half has no update; None without
            resampling.
        sigma1_shares: u_i1² of every token of the text; None if unknown.
        kept: mask of the text's tokens that are in the view.
        sinks_left: number of sinks that could not be removed from the view.
        token_at: the JSON entry of the token in a row: text, position and document.
    """

    singular_values: Float64[np.ndarray, " r"]
    tokens: TokenTable | None
    channels: ChannelTable | None
    mean_energy: float
    n: int
    hidden: int
    top_k: int
    half_cosines: Float64[np.ndarray, " R"] | None
    sigma1_shares: Float64[np.ndarray, " N"] | None
    kept: Bool[np.ndarray, " N"]
    sinks_left: int
    token_at: Callable[[int], dict[str, Any]]

    def given(self, needs: str) -> Any:
        """The argument of a statistic with these needs; None leaves the statistic out."""
        resampled = None if self.half_cosines is None else self
        return {"view": self, "documents": resampled, "channels": self.channels}[needs]
