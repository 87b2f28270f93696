"""The registry of per-layer statistics. A registration defines the JSON key, the interval, the column of
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

NEEDS = ("tokens", "spectrum", "view", "documents", "channels")  # in the order of the JSON
SCALES = ("linear", "log", "unit")  # see `t_interval`
_registered: dict[str, "Statistic"] = {}


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A statistic of one layer in one view.

    Attributes:
        name: its key in the JSON.
        function: computes it; the first paragraph of its docstring is its row of definitions.md.
        needs: argument and result of the function.
            `tokens`: a `TokenTable`, to one value per weighting, (B,); null if the table is unknown.
            `spectrum`: singular values, descending, (..., r), to (...).
            `view`: a `ViewData`, to a float, a list or None.
            `documents`: the same; left out without resampling.
            `channels`: a `ChannelTable`, to a float, a list or a dict; left out without a table.
        label: its name in words, starting in lower case.
        unit: the title of its axis.
        interval: the scale on which its error is about symmetric (`linear`, `log` for values above 0, `unit`
            for values in [0, 1]); None for no interval. Only statistics of tokens and spectrum have one.
        log: whether its axis is logarithmic and its mean over layers geometric.
        range: the lowest and the highest value; the highest may be a symbol or None.
        trap: caution for readers.
        source: the publication that defines it.
        figure: the figure that shows it: by default `norms` for statistics of tokens, else `ranks`; None
            keeps it out of charts, comparisons and the record of a control.
        panel: the title of its panel, which statistics may share; by default the label.
        column: its heading in the page's table of layers; empty: not in the table.
        first_of: the JSON list whose first entry it is, for a statistic without its own key.
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
        """Raises ValueError for a field with an impossible value."""
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
        """Its value in a row of the JSON; None if missing."""
        if self.first_of is None:
            return row.get(self.name)
        return next(iter(row.get(self.first_of) or ()), None)


def statistic(name: str, *, needs: str, **entry: Any) -> Callable[[AnyFunction], AnyFunction]:
    """Registers a function as a statistic of a layer; `entry` holds the other fields of `Statistic`.

    Raises:
        ValueError: a name that is taken, or a field with an impossible value.
    """
    entry.setdefault("figure", "norms" if needs == "tokens" else "ranks")

    def register(function: AnyFunction) -> AnyFunction:
        if name in _registered:
            raise ValueError(f"{name}: is registered already")
        new = Statistic(name, function, needs, **entry)
        _registered[name] = new if new.panel else dataclasses.replace(new, panel=new.title)
        return function

    return register


def registered(*needs: str) -> tuple[Statistic, ...]:
    """All statistics, or only those with the given needs, in the order of the JSON."""
    chosen = [entry for entry in _registered.values() if entry.needs in (needs or NEEDS)]
    return tuple(sorted(chosen, key=lambda entry: NEEDS.index(entry.needs)))


def shown(*figures: str) -> tuple[Statistic, ...]:
    """The statistics in these figures of the page; in each, columns of the table of layers come first."""
    chosen = [entry for entry in registered() if entry.figure in figures]
    return tuple(sorted(chosen, key=lambda entry: (figures.index(str(entry.figure)), not entry.column)))
