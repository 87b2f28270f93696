"""Parts of a self-contained HTML page: elements, tables and sections of figures.

Names and tokens of a run become text of an element tree, which escapes them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from string import Template
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from jaxdelta.report.charts.chart import Figure, Heatmap, Number, Panel
from jaxdelta.report.charts.with_plotly import chart


def document(title: str, body: Iterable[Element], drawn: Iterable[Figure]) -> str:
    """A page with this title and body, which contains the sections of the figures `drawn`."""
    charts = {f"{figure.name}-{i}": chart(panel) for figure in drawn for i, panel in enumerate(figure.panels)}
    # Imported here: it takes a tenth of a second.
    from plotly.offline import get_plotlyjs

    return Template(_asset("page.html")).substitute(
        title=_escaped(title),
        css=_asset("page.css"),
        js=_asset("page.js"),
        body="\n".join(tostring(part, "unicode", method="html") for part in body),
        charts=_embedded(charts),
        plotly=get_plotlyjs(),
    )


def as_file(html: str) -> bytes:
    """The bytes of a page's file."""
    return html.encode("utf-8", "xmlcharrefreplace")


def figure_section(figure: Figure) -> Element:
    """A figure's title, caption, legends and empty elements for its charts."""
    section = element("figure", element("h2", figure.title), element("figcaption", figure.text))
    panels = SubElement(section, "div", {"class": "panels"})
    for i, panel in enumerate(figure.panels):
        chart_element = element("div", id=f"{figure.name}-{i}", class_="chart")
        parts = (element("h3", panel.title), chart_element, *_legend(panel))
        panels.append(element("div", *parts, class_="panel map" if isinstance(panel, Heatmap) else "panel"))
    return section


def _legend(panel: Panel | Heatmap) -> Iterator[Element]:
    if isinstance(panel, Heatmap) or panel.depth or len(panel.series) < 2:
        return
    legend = element("div", class_="legend")
    for series in panel.series:
        sign = element("i", class_=f"{series.kind} {series.dash}", style=f"color: {series.color}")
        legend.append(element("span", sign, series.name))
    yield legend


def table(
    head: Iterable[str], rows: Iterable[Sequence[Any] | Element], label: str, kind: str = ""
) -> Element:
    """A scrolling table; `label` is its name for screen readers, `kind` a class of page.css.

    A row is a sequence of cells (text, numbers or elements), or a finished element.
    """
    body = Element("tbody")
    for row in rows:
        if not isinstance(row, Element):
            cells = (cell if isinstance(cell, Element) else str(cell) for cell in row)
            row = element("tr", *(element("td", cell) for cell in cells))
        body.append(row)
    whole = element("table", element("thead", element("tr", *(element("th", name) for name in head))), body)
    classes = f"scroll {kind}".strip()
    return element("div", whole, class_=classes, tabindex="0", role="region", aria_label=label)


def element(tag: str, *children: str | Element, **attributes: str) -> Element:
    """An element with these children; `class_` stands for class, `aria_label` for aria-label."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    made, last = Element(tag, names), None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return made


def visible(text: str) -> str:
    """The text with visible signs for line ends, tabs and unprintable characters."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(c if c.isprintable() else signs.get(c) or f"\\x{ord(c):02x}" for c in text)


def number(value: Number | None, form: str = ".4g") -> str:
    """A number, or a dash for None."""
    return "–" if value is None else format(value, form)


def counted(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def bounded(entry: dict[str, Any]) -> tuple[str, str]:
    """An entry's value and its interval, as two cells of the page."""
    interval = "{:.3f} … {:.3f}".format(*entry["interval"]) if "interval" in entry else "–"
    return number(entry["value"]), interval


def spanned(entry: dict[str, Any]) -> str:
    """An entry's value and its interval, as one cell of a table on the terminal."""
    interval = " [{:.3f}, {:.3f}]".format(*entry["interval"]) if "interval" in entry else ""
    return number(entry["value"], ".3f") + interval


def _embedded(data: Any) -> str:
    """JSON that can stand inside an HTML script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _asset(name: str) -> str:
    return (resources.files("jaxdelta.report") / name).read_text(encoding="utf-8")
