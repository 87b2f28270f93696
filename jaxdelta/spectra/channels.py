"""Energies of updates and states by channel of the residual stream."""

import operator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64


class ChannelTable(NamedTuple):
    """Energies by channel j of the residual stream, summed over the tokens i of a view.

    Attributes:
        update: Σ_i δ_ij².
        entering: Σ_i h_ij², for the state before the layer.
        leaving: Σ_i (h + δ)_ij², for the state after it.
    """

    update: Float64[Any, "*layers d"]
    entering: Float64[Any, "*layers d"]
    leaving: Float64[Any, "*layers d"]

    def plus(self, delta: Float[Any, "s d"], h: Float[Any, "s d"]) -> "ChannelTable":
        """The table with more tokens, given by their updates and states."""
        return ChannelTable(*map(operator.add, self, channel_energies(delta, h)))


def channel_energies(delta: Float[Any, "n d"], h: Float[Any, "n d"]) -> ChannelTable:
    """The table of tokens with these updates and states; excluded tokens must have zeros in both."""
    delta, h = delta.astype(np.float64), h.astype(np.float64)
    return ChannelTable(*((x * x).sum(axis=0) for x in (delta, h, h + delta)))
