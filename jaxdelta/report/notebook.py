"""`Analysis.plot`: the figures of a run in a notebook, by matplotlib."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdelta.errors import JaxDeltaError, UsageError, extra
from jaxdelta.report.charts import layers as contents
from jaxdelta.report.charts.chart import Figure, Heatmap, Panel
from jaxdelta.report.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Target = Axes | Iterable[Axes] | None
else:
    Target = Any


class Plot:
    """The figures of a run, drawn by matplotlib.

    Every method returns its axes, one for each panel. `panels` chooses panels by the beginnings of their
    titles (default: all); `ax`: axes to draw on, one for each panel (default: a new picture).

    >>> import matplotlib.pyplot as plt
    >>> picture, (left, right) = plt.subplots(1, 2)
    >>> (drawn,) = run.plot.overlaps("|cos|", ax=left)
    >>> drawn is left
    True
    >>> _ = run.plot.norms("relative step", ax=right)

    Raises:
        UsageError: an unknown panel, or a number of axes other than one per panel.
        JaxDeltaError: the run has no data for the figure, or matplotlib is not installed.
    """

    def __init__(self, analysis: Result) -> None:
        self._analysis = analysis

    def overview(self) -> "list[Axes]":
        """Norms, ranks and energy by layer, and |cos| between all layers, in one picture."""
        return _drawing().overview(self._analysis).axes[:4]

    def norms(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Norms of states and updates, the relative step, γ_L, and the cosine of update and state."""
        return self._draw(contents.norms, panels, ax)

    def ranks(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Effective ranks and energy fractions by view, and the steadiness of v_L."""
        return self._draw(contents.ranks, panels, ax)

    def spectra(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Singular values of all layers, and their cumulative energy."""
        return self._draw(contents.spectra, panels, ax)

    def overlaps(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Maps of |cos| and principal angles between all layers, and |cos| of neighbours with chance."""
        return self._draw(contents.overlaps, panels, ax)

    def ledger(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """The energy of the update, split into attention, MLP and their cross term."""
        return self._draw(contents.ledger, panels, ax)

    def owners(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """The share of σ_1² of the most influential tokens, and their positions."""
        return self._draw(contents.owners, panels, ax)

    def phases(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """|cos| within phases, and the number of dimensions spanned by their first directions."""
        return self._draw(contents.phases, panels, ax)

    def captures(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """The share of each layer's first direction in its phase's leading directions."""
        return self._draw(contents.captures, panels, ax)

    def _draw(self, build: Callable[[Result], Figure], names: Sequence[str], ax: Target) -> "list[Axes]":
        figure = build(self._analysis)
        if not figure.panels:
            raise JaxDeltaError(f"{figure.name}: {figure.caption}")
        panels = [_panel(figure, name) for name in names] or figure.panels
        if ax is None:
            return _drawing().on_new(panels)
        axes = list(np.ravel(np.asarray(ax, object)))
        if len(axes) != len(panels):
            raise UsageError(
                f"ax: {len(panels)} axes are needed, {len(axes)} given; name one of the panels "
                f"{_titles(figure)}, as in {figure.name}({figure.panels[0].title!r}, ax=ax)"
            )
        return _drawing().on_given(panels, axes)


def _panel(figure: Figure, name: str) -> Panel | Heatmap:
    for panel in figure.panels:
        if panel.title.lower().startswith(name.lower()):
            return panel
    raise UsageError(f"{figure.name}: no panel {name!r}; there are {_titles(figure)}")


def _titles(figure: Figure) -> str:
    return ", ".join(repr(panel.title) for panel in figure.panels)


def _drawing() -> Any:
    with extra("figures", "a figure"):
        from jaxdelta.report.charts import with_matplotlib as figures
    return figures
