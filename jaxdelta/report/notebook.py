"""`Analysis.plot`: the figures of a run in a notebook. `contents` says what is in them, `figures` draws."""

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

    Every method returns the axes it drew on, one for each panel of its figure. `panels` are the beginnings of
    the titles of those that are wanted, all without any; `ax` is the axes to draw them on, one or as many as
    there are panels, and else a new picture is made.

    >>> import matplotlib.pyplot as plt
    >>> picture, (left, right) = plt.subplots(1, 2)
    >>> (drawn,) = run.plot.overlaps("|cos|", ax=left)
    >>> drawn is left
    True
    >>> _ = run.plot.norms("relative step", ax=right)

    Raises:
        UsageError: a panel that the figure has not, or more or fewer axes than panels.
        JaxDeltaError: the run did not measure what the figure shows, or matplotlib is not installed
            (`pip install 'jaxdelta[figures]'`).
    """

    def __init__(self, analysis: Result) -> None:
        self._analysis = analysis

    def overview(self) -> "list[Axes]":
        """One picture of a run: norms, ranks and energy by layer, and |cos| between all layers."""
        return _drawing().overview(self._analysis).axes[:4]

    def norms(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Lengths of states and updates, the relative step, γ_L, and the cosine of update and state."""
        return self._draw(contents.norms, panels, ax)

    def ranks(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Effective ranks and energy fractions by view, and how steady v_L is."""
        return self._draw(contents.ranks, panels, ax)

    def spectra(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """All singular values of all layers, and the energy they add up to."""
        return self._draw(contents.spectra, panels, ax)

    def overlaps(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Maps of |cos| and principal angles between all layers, and neighbours beside chance."""
        return self._draw(contents.overlaps, panels, ax)

    def ledger(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """The energy of an update, parted into attention's, the MLP's and their cross term."""
        return self._draw(contents.ledger, panels, ax)

    def owners(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """Whether few tokens make σ_1, and where they stand in the text."""
        return self._draw(contents.owners, panels, ax)

    def phases(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """|cos| within phases, and the number of dimensions their directions fill."""
        return self._draw(contents.phases, panels, ax)

    def captures(self, *panels: str, ax: Target = None) -> "list[Axes]":
        """How much of each layer's first direction lies in what its phase shares."""
        return self._draw(contents.captures, panels, ax)

    def _draw(self, build: Callable[[Result], Figure], names: Sequence[str], ax: Target) -> "list[Axes]":
        figure = build(self._analysis)
        if not figure.panels:
            raise JaxDeltaError(f"{figure.name}: {figure.caption}")
        panels = [_panel(figure, name) for name in names] or figure.panels
        if ax is None:
            return _drawing().on_new(panels)
        given = list(np.ravel(np.asarray(ax, object)))
        if len(given) != len(panels):
            raise UsageError(
                f"ax: {len(panels)} axes are needed, {len(given)} given; name one of the panels "
                f"{_titles(figure)}, as in {figure.name}({figure.panels[0].title!r}, ax=ax)"
            )
        return _drawing().on_given(panels, given)


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
