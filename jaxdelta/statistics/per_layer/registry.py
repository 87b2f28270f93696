"""The registry of per-layer statistics. From a registration follow the JSON key, the interval, the column of
`to_frame`, the panel of the page, the comparison of runs and the row of docs/definitions.md.

    @statistic(
        "stable_rank", needs="spectrum", label="stable rank", unit="number of directions", log=True,
        range=(1, "r"), source="Rudelson & Vershynin 2007",
    )
    def stable_rank(singular_values): ...
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Number = float | int
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

# What a statistic is a function of, in the order of the JSON; see `Statistic.needs`.
NEEDS = ("tokens", "spectrum", "view", "documents", "channels")
SCALES = ("linear", "log", "unit")  # of an interval, see `t_interval`
_registered: dict[str, "Statistic"] = {}


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A statistic of one layer in one view.

    Attributes:
        name: its key in the JSON.
        function: what computes it; the first paragraph of its docstring is the row of definitions.md.
        needs: what the function takes, and when the statistic is missing.
            `tokens`: a `TokenTable`, to one value per weighting, (B,); null where the table is unknown.
            `spectrum`: singular values, descending, (..., r), to (...).
            `view`: a `ViewData`, to a float, a list or None.
            `documents`: the same, left out where documents were not resampled.
            `channels`: a `ChannelTable`, to a float, a list or a dict; left out where there is no table.
        label: its name in words, which begins with a small letter.
        unit: the text of its axis.
        interval: the scale on which it is about symmetric (`linear`, `log` for values above 0, `unit` for
            values in [0, 1]); None for a statistic without interval, as all but those of tokens and
            spectrum are.
        log: whether its axis is logarithmic, and a mean over layers geometric.
        range: the lowest and the highest value; the highest may be a symbol, or None.
        trap: what to mind when reading it.
        source: who defined it.
        figure: the figure whose panels show it, `norms` (of tokens by default) or `ranks`; None keeps it
            out of charts, comparisons and the record of a control.
        panel: the title of its panel; statistics with the same one share a panel. By default the label.
        column: its heading in the page's table of layers, which leaves it out without one.
        first_of: for a statistic without a key of its own, the list whose first entry it is.
    """

    name: str
    function: Callable[..., Any]
    needs: str
    label: str
    unit: str = ""
    interval: str | None = None
    log: bool = False
    range: tuple[Number, Number | str | None] | None = None
    trap: str = ""
    source: str = ""
    figure: str | None = None
    panel: str = ""
    column: str = ""
    first_of: str | None = None

    def __post_init__(self) -> None:
        """Checks the registration.

        Raises:
            ValueError: an unknown word, or an interval of something that is not computed without each
                document.
        """
        if self.needs not in NEEDS:
            raise ValueError(f"{self.name}: needs must be one of {', '.join(NEEDS)}, not {self.needs!r}")
        if self.interval not in (None, *SCALES):
            raise ValueError(f"{self.name}: interval must be one of {', '.join(SCALES)} or None")
        if self.interval and self.needs not in ("tokens", "spectrum"):
            raise ValueError(f"{self.name}: only statistics of tokens or the spectrum have an interval")
        if not self.function.__doc__:
            raise ValueError(f"{self.name}: needs a docstring, its row of definitions.md")

    @property
    def title(self) -> str:
        """The label as a title."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def definition(self) -> str:
        """The first paragraph of the function's docstring, on one line."""
        paragraph = inspect.cleandoc(self.function.__doc__ or "").partition("\n\n")[0]
        return " ".join(paragraph.split()).removesuffix(".")

    def of(self, row: Mapping[str, Any]) -> Any:
        """Its value in a row of the JSON; None where the row has none."""
        if self.first_of is None:
            return row.get(self.name)
        return next(iter(row.get(self.first_of) or ()), None)


def statistic(name: str, *, needs: str, **entry: Any) -> Callable[[AnyFunction], AnyFunction]:
    """Registers a function as a statistic of a layer; `entry` are the other fields of `Statistic`.

    Raises:
        ValueError: the name is taken, or the registration makes no sense.
    """
    entry.setdefault("figure", "norms" if needs == "tokens" else "ranks")

    def register(function: AnyFunction) -> AnyFunction:
        if name in _registered:
            raise ValueError(f"{name}: is registered already")
        one = Statistic(name, function, needs, **entry)
        _registered[name] = one if one.panel else dataclasses.replace(one, panel=one.title)
        return function

    return register


def registered(*needs: str) -> tuple[Statistic, ...]:
    """All statistics, or those that need one of these; in the order of the JSON."""
    chosen = [one for one in _registered.values() if one.needs in (needs or NEEDS)]
    return tuple(sorted(chosen, key=lambda one: NEEDS.index(one.needs)))


def shown(*figures: str) -> tuple[Statistic, ...]:
    """The statistics of these figures of the page, those of its table of layers first."""
    found = (one for figure in figures for one in registered() if one.figure == figure)
    return tuple(sorted(found, key=lambda one: (figures.index(str(one.figure)), not one.column)))
