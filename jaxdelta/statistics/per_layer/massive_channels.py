"""Channels of the residual stream that hold a large share of its energy: massive activations."""

from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxdelta.spectra.channels import ChannelTable
from jaxdelta.statistics.per_layer.registry import statistic

LARGEST = 3  # channels
_SUN = "Sun et al. 2024 (arXiv 2402.17762)"
_LARGEST: dict[str, Any] = {
    "needs": "channels",
    "unit": "share of the energy",
    "range": (0, 1),
    "source": _SUN,
    "panel": "Energy in the largest 3 channels",
}


@statistic(
    "channel_top3_frac",
    label="update's largest 3 channels",
    trap="3/d where all channels are alike",
    **_LARGEST,
)
def channel_top3_frac(channels: ChannelTable) -> float:
    """Share of ‖δ‖² in its three largest channels, by Σ_i δ_ij²."""
    return _held(channels.update)


@statistic(
    "state_channel_top3_frac",
    label="state's largest 3 channels",
    trap="a few sinks can hold nearly all of it: see `masked`",
    **_LARGEST,
)
def state_channel_top3_frac(channels: ChannelTable) -> float:
    """The same of the state after the layer, by Σ_i (h + δ)_ij²."""
    return _held(channels.leaving)


@statistic("massive_channels", needs="channels", label="massive channels", source=_SUN, figure=None)
def massive_channels(channels: ChannelTable) -> dict[str, list[dict[str, Any]]]:
    """These channels of `update` and `state`, largest first: number, share, and `effect` of the layer.

    `writes` where Σ_i (h + δ)_ij² > Σ_i h_ij², `removes` where it is less, `keeps` where it is the same.
    Channels without energy are left out.
    """
    return {"update": _largest(channels.update, channels), "state": _largest(channels.leaving, channels)}


def _largest(energy: Float64[np.ndarray, " d"], channels: ChannelTable) -> list[dict[str, Any]]:
    order = np.argsort(-energy, kind="stable")[:LARGEST]
    shares, effects = energy / max(energy.sum(), np.finfo(np.float64).tiny), _effects(channels)
    return [
        {"channel": int(j), "share": float(shares[j]), "effect": effects[j]} for j in order if energy[j] > 0
    ]


def _effects(channels: ChannelTable) -> list[str]:
    names = np.array(["removes", "keeps", "writes"])
    return names[np.sign(channels.leaving - channels.entering).astype(int) + 1].tolist()


def _held(energy: Float64[np.ndarray, " d"]) -> float:
    whole = energy.sum()
    return float(np.sort(energy)[-LARGEST:].sum() / whole) if whole > 0 else 0.0
