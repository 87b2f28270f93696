"""Figures of a run. matplotlib is imported here and nowhere else (`pip install jaxdelta[figures]`)."""

import itertools
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from jaxdelta.result import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by the colour-blind.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def overview(analysis: Analysis) -> "Figure":
    """One page of a run: norms, effective rank and energy by layer, and |cos| between all layers."""
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.05])[0]
    norms, ranks = left.subplots(2, 1, sharex=True)
    plot_norms(analysis, norms)
    plot_ranks(analysis, ranks)
    plot_cosines(analysis, right.subplots())
    figure.suptitle(
        f"{analysis.model}: what {analysis.num_layers} layers write, {analysis.n_calib_tokens} tokens"
    )
    return figure


def plot_norms(analysis: Analysis, axes: "Axes") -> None:
    """Mean norms of states and updates, log scale."""
    axes.semilogy(_column(analysis, "h_norm_mean"), color=BLUE, label="state ‖h‖")
    axes.semilogy(_column(analysis, "token_norm_mean"), color=ORANGE, label="update ‖δ‖")
    axes.set_ylabel("mean norm over tokens")
    axes.legend(frameon=False, fontsize="small")
    _shade_phases(analysis, axes)


def plot_ranks(analysis: Analysis, axes: "Axes") -> None:
    """Effective rank (log scale), and the share of energy along the first direction."""
    axes.semilogy(_column(analysis, "eff_rank"), color=GREEN)
    axes.set_ylabel("effective rank of δ", color=GREEN)
    axes.set_xlabel("layer")
    share = axes.twinx()
    share.plot(_column(analysis, "top1_frac"), color=ORANGE)
    share.set_ylim(0, 1)
    share.set_ylabel("energy along v₁, share", color=ORANGE)
    _shade_phases(analysis, axes)


def plot_cosines(analysis: Analysis, axes: "Axes") -> None:
    """|cos| between the layers' first directions, with the phases' boundaries."""
    image = axes.imshow(np.abs(analysis.top1_cos), vmin=0, vmax=1, cmap="viridis")
    for first, _, _ in _phases(analysis)[1:]:
        axes.axhline(first - 0.5, color="white", linewidth=0.7)
        axes.axvline(first - 0.5, color="white", linewidth=0.7)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    axes.set_title("|cos| between first directions", fontsize="medium")
    axes.figure.colorbar(image, ax=axes, shrink=0.75)


def _column(analysis: Analysis, key: str) -> list[float]:
    return [row[key] for row in analysis.per_layer]


def _phases(analysis: Analysis) -> list[tuple[int, int, str]]:
    """(first layer, last layer, name) of every run of layers of one phase."""
    runs = []
    for name, rows in itertools.groupby(analysis.per_layer, key=lambda row: row["phase"]):
        layers = [row["L"] for row in rows]
        runs.append((layers[0], layers[-1], name))
    return runs


def _shade_phases(analysis: Analysis, axes: "Axes") -> None:
    for i, (first, last, name) in enumerate(_phases(analysis)):
        axes.axvspan(first - 0.5, last + 0.5, color="0.5", alpha=0.06 + 0.08 * (i % 2), linewidth=0)
        axes.text(
            (first + last) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8
        )
    axes.set_xlim(-0.5, analysis.num_layers - 0.5)
