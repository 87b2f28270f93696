"""Views of an update: whole or one sublayer's, with all tokens or without sinks, about zero or its mean.

A view's name is the path under which its figures nest in a layer's row: `masked`, `attention.centred`, ...;
the row itself is the raw view, the whole update of all tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxdelta.errors import UsageError

PARTS = ("update", "attention", "mlp")
DEFAULT_SINK_FACTOR = 10.0


class View(NamedTuple):
    """What of a layer's update is looked at."""

    part: str = "update"
    masked: bool = False
    centred: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        """The keys that lead from a layer's row to this view's figures; none for the raw view."""
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
    """Reads `none`, `all`, or names with commas; the raw view always comes first.

    Raises:
        UsageError: a name that no view has.
    """
    if text == "all":
        return tuple(ALL.values())
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ALL]:
        raise UsageError(f"views: no view {unknown[0]!r}; there are none, all, {', '.join(ALL)}")
    return tuple(dict.fromkeys([RAW, *(ALL[name] for name in names)]))


def view_of(row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The figures of a view in a layer's row, None where it was not computed."""
    for key in ALL[name].path:
        row = row.get(key, {})
    return row if "eff_rank" in row else None


def without_sinks(
    entering: Float[np.ndarray, " n"], leaving: Float[np.ndarray, " n"], factor: float
) -> Bool[np.ndarray, " n"]:
    """The tokens whose state is at most `factor` times the layer's median norm long, before it and after it.

    A sink owns the update of the layer that makes it and of the one that ends it: so both norms count. The
    windows' first tokens, sinks always, are in no update. (Xiao et al. 2023, arXiv 2309.17453; Sun et al.
    2024, arXiv 2402.17762: massive activations.)
    """
    return np.all([norms <= factor * np.median(norms) for norms in (entering, leaving)], axis=0)


class Selection(NamedTuple):
    """A view as numbers, so that one compiled function serves all views."""

    attention: Any
    mlp: Any
    centred: Any

    @classmethod
    def of(cls, view: View) -> "Selection":
        """A view as 1 for what is in it, attention, MLP, centring, and 0 for what is not."""
        numbers = (view.part != "mlp", view.part != "attention", view.centred)
        return cls(*(np.float32(number) for number in numbers))


def parts_of_views(views: Sequence[View]) -> tuple[str, ...]:
    """The parts of an update that any of the views is of."""
    return tuple(part for part in PARTS if any(view.part == part for view in views))
