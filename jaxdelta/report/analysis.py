"""Analysis: a Result with charts and a view for notebooks."""

import dataclasses
from typing import TYPE_CHECKING

from jaxdelta.report.result import Result

if TYPE_CHECKING:
    from jaxdelta.report.notebook import Plot


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Analysis(Result):
    """A `Result`, which lists the fields, with charts (`plot`) and a view for notebooks."""

    @property
    def plot(self) -> "Plot":
        """The figures of the report by matplotlib: `plot.norms()`, `plot.ranks()`, …; see `Plot`.

        >>> norms, *_ = run.plot.norms()
        >>> norms.get_ylabel()
        'norm (activation units), log'
        """
        # Imported on use: charts depend on results, not the reverse.
        from jaxdelta.report.notebook import Plot

        return Plot(self)

    def _repr_html_(self) -> str:
        """The view of a notebook: facts, verdict and layers."""
        from jaxdelta.report.page import summary

        return summary(self)
