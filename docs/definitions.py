"""Writes the table of statistics in docs/definitions.md, from their registrations.

python docs/definitions.py
"""

from pathlib import Path

from jaxdelta.statistics.per_layer.registry import Statistic, registered

PAGE = Path(__file__).with_suffix(".md")
BEGIN = "<!-- statistics: written by python docs/definitions.py -->"
END = "<!-- end of statistics -->"
HEAD = ("JSON", "definition", "range", "interval", "read it with care because", "source")


def table() -> str:
    """A row for each statistic, in the order of the JSON."""
    rows = [HEAD, ("---",) * len(HEAD), *map(_cells, registered())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def with_table(page: str) -> str:
    """The page with the current table between its two marks; ValueError if it has no marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _cells(statistic: Statistic) -> tuple[str, ...]:
    limits, interval = _range(statistic), statistic.interval or ""
    texts = (statistic.definition, limits, interval, statistic.trap, statistic.source)
    return (f"`{statistic.name}`", *(text.replace("|", r"\|") for text in texts))


def _range(statistic: Statistic) -> str:
    low, high = statistic.range or (None, None)
    if low is None:
        return ""
    least = str(low).replace("-", "−")
    return f"≥ {least}" if high is None else f"{least} … {high}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
