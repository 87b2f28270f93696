"""Views of an update: whole or one sublayer's part, with or without sinks, about zero or about its mean.

A view's name is the path of its statistics in a layer's row: `masked`, `attention.centred`, ...; the row
itself is the raw view, the whole update with all tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxdelta.errors import UsageError

PARTS = ("update", "attention", "mlp")
DEFAULT_SINK_FACTOR = 10.0


class View(NamedTuple):
    """A part of a layer's update (one of PARTS), without sinks if `masked`, less its mean if `centred`."""

    part: str = "update"
    masked: bool = False
    centred: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        """The keys from a layer's row to this view's statistics; none for the raw view."""
        words = (self.part, "masked" * self.masked, "centred" * self.centred)
        return tuple(word for word in words if word and word != "update")

    @property
    def name(self) -> str:
        """`raw`, or the path with dots."""
        return ".".join(self.path) or "raw"


RAW, MASKED = View(), View(masked=True)
ALL = {
    view.name: view
    for view in (View(part, masked, c) for part in PARTS for masked in (False, True) for c in (False, True))
}
DEFAULT_VIEWS = "centred,masked,masked.centred,attention,attention.masked,mlp,mlp.masked"


def parse_views(text: str) -> tuple[View, ...]:
    """Reads `none`, `all`, or names separated by commas; the raw view always comes first.

    Raises:
        UsageError: a name is unknown.
    """
    if text == "all":
        return tuple(ALL.values())
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ALL]:
        raise UsageError(f"views: no view {unknown[0]!r}; there are none, all, {', '.join(ALL)}")
    return tuple(dict.fromkeys([RAW, *(ALL[name] for name in names)]))


def view_of(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The statistics of a view in a layer's row; None if the view was not computed."""
    for key in ALL[name].path:
        row = row.get(key, {})
    return row if "eff_rank" in row else None


def without_sinks(
    entering: Float[np.ndarray, " n"], leaving: Float[np.ndarray, " n"], factor: float
) -> Bool[np.ndarray, " n"]:
    """Mask of the tokens that are no sinks.

    The norms of their states entering and leaving the layer are at most `factor` times the median norm of the
    layer. Both count, since a sink dominates the update of the layer that makes it and of the one that ends
    it. The first token of a window, always a sink, is in no update. (Xiao et al. 2023, arXiv 2309.17453; Sun
    et al. 2024, arXiv 2402.17762: massive activations.)
    """
    return np.all([norms <= factor * np.median(norms) for norms in (entering, leaving)], axis=0)


class Selection(NamedTuple):
    """Weights, 0 or 1, of attention, MLP and centring in a view: one compiled function serves all views."""

    attention: Any
    mlp: Any
    centred: Any

    @classmethod
    def of(cls, view: View) -> "Selection":
        """The weights of a view."""
        return cls(*map(np.float32, (view.part != "mlp", view.part != "attention", view.centred)))


def parts_of_views(views: Sequence[View]) -> tuple[str, ...]:
    """The parts of an update that the views need."""
    return tuple(part for part in PARTS if any(view.part == part for view in views))
