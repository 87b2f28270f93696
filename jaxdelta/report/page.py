"""One HTML file that shows a run and opens from disk: its figures, tables, doubts and methods.

Whatever a run brings along (names, tokens) becomes text of an element tree, which escapes it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from string import Template
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from jaxdelta.excerpt import context
from jaxdelta.report.charts import Figure, Map, Number, Panel
from jaxdelta.report.contents import figures, has_sinks
from jaxdelta.report.interactive import chart
from jaxdelta.report.methods import methods
from jaxdelta.result import Analysis
from jaxdelta.views import view_of

SAID = {"shared": "v_L share few dimensions", "own": "every layer has its own v_L", None: "–"}
LARGE_CLOSURE = 1e-2
FEW_TOKENS = 3  # per dimension


def page(analysis: Analysis) -> str:
    """The page."""
    drawn = figures(analysis)
    charts = {f"{figure.name}-{i}": chart(panel) for figure in drawn for i, panel in enumerate(figure.panels)}
    # Plotly's JavaScript is all that is wanted of it; only here, since it takes a tenth of a second.
    from plotly.offline import get_plotlyjs

    return Template(_asset("page.html")).substitute(
        title=_markup(f"{analysis.model} – jaxdelta"),
        css=_asset("page.css"),
        js=_asset("page.js"),
        body="\n".join(tostring(part, "unicode", method="html") for part in _body(analysis, drawn)),
        charts=_embedded(charts),
        plotly=get_plotlyjs(),
    )


def page_file(analysis: Analysis) -> bytes:
    """The page as the bytes of its file."""
    return page(analysis).encode("utf-8", "xmlcharrefreplace")


def summary(analysis: Analysis) -> str:
    """What a notebook shows of a run: the head of the page, phases and verdict, and the layers, folded.

    Plain tables without a style of their own: a notebook's is made for its light and its dark.
    """
    facts = _table((_title(analysis), ""), list(_facts(analysis).items()), "Run")
    layers = _element("details", _element("summary", "Every layer in numbers"), _layer_table(analysis))
    whole = _element("div", facts, *_warned(analysis), *_phase_tables(analysis), layers)
    return tostring(whole, "unicode", method="html").encode("utf-8", "xmlcharrefreplace").decode()


def _body(analysis: Analysis, drawn: Sequence[Figure]) -> Iterator[Element]:
    after = {"owners": _owner_table, "phases": _phase_tables}
    yield from _headline(analysis)
    for figure in drawn:
        yield _figure(figure)
        yield from after.get(figure.name, lambda _: ())(analysis)
    yield _element("h2", "Every layer in numbers")
    yield _layer_table(analysis)
    hint = _element("p", "For a paper, with what is needed to repeat the run:", class_="faint")
    yield _element("section", _element("h2", "Methods"), hint, _element("blockquote", methods(analysis)))


def _headline(analysis: Analysis) -> Iterator[Element]:
    yield _element("h1", _title(analysis))
    box = _element("dl", class_="facts")
    for name, fact in _facts(analysis).items():
        box.append(_element("div", _element("dt", name), _element("dd", fact)))
    yield box
    yield from _warned(analysis)


def _title(analysis: Analysis) -> str:
    return f"What {analysis.num_layers} layers of {analysis.model} write"


def _facts(analysis: Analysis) -> dict[str, str]:
    run = analysis.run
    documents = run.get("documents")
    return {
        "model": f"{analysis.model}, {analysis.num_layers} layers, hidden size {analysis.hidden}",
        "text": f"“{visible(analysis.text['begins'])}…”" if analysis.text else "not kept in this file",
        "tokens": str(analysis.n_calib_tokens) + (f" in {documents} documents" if documents else ""),
        "dtypes": f"weights {run.get('weights_dtype')}, products {run.get('compute_dtype')}, "
        f"stream {run.get('residual_dtype')}",
        "closure ‖h₀ + Σδ − h_N‖ / ‖h_N‖": f"{run['closure_error']:.1e}",
        "loss": f"{run['calibration_loss']:.4f} nats per token",
        "last layer": f"state {'after' if run.get('last_state') == 'normed' else 'before'} the final norm",
        "device": str(run.get("device")),
    }


def _warned(analysis: Analysis) -> Iterator[Element]:
    if found := list(warnings(analysis)):
        yield _element("ul", *(_element("li", warning) for warning in found), class_="warnings")


def warnings(analysis: Analysis) -> Iterator[str]:
    """What a reader must know before believing a figure."""
    run, first = analysis.run, analysis.per_layer[0]
    flags = run.get("flags", {})
    if flags.get("control"):
        yield f"This is a control ({flags['control']}, seed {flags['seed']}), not the model's own figures."
    if run["closure_error"] > LARGE_CLOSURE:
        yield "The closure is large: the updates do not account for the last state in this dtype."
    if run.get("documents") == 1:
        yield "One document: there are no intervals, they need several."
    elif run.get("few_documents"):
        yield f"Only {run['documents']} documents: fewer than ten, intervals are rough."
    if first.get("n_over_d", FEW_TOKENS) < FEW_TOKENS:
        yield (
            f"Few tokens: {first['n_over_d']:.2g} for each of the {analysis.hidden} dimensions, so ranks "
            "read lower than on a longer text."
        )
    if again := run.get("rows_on_host"):
        yield f"Spectra done again on the host, since the device's failed their check: rows {again}."
    if missing := list(_not_measured(analysis)):
        yield f"Not measured in this run: {'; '.join(missing)}."


def _not_measured(analysis: Analysis) -> Iterator[str]:
    rows = analysis.per_layer
    if not any(view_of(row, "masked") for row in rows):
        yield "the view without sinks (--views)"
    if not any(view_of(row, "attention") or view_of(row, "mlp") for row in rows):
        yield "attention and MLP apart (--views)"
    if not any("intervals" in row for row in rows):
        yield "intervals (--bootstrap, several documents)"
    if not analysis.run.get("flags", {}).get("null_draws") or not analysis.overlap:
        yield "chance (--null_draws)"


def _figure(figure: Figure) -> Element:
    section = _element("figure", _element("h2", figure.title), _element("figcaption", figure.text))
    panels = SubElement(section, "div", {"class": "panels"})
    for i, panel in enumerate(figure.panels):
        place = _element("div", id=f"{figure.name}-{i}", class_="chart")
        parts = (_element("h3", panel.title), place, *_legend(panel))
        panels.append(_element("div", *parts, class_="panel map" if isinstance(panel, Map) else "panel"))
    return section


def _legend(panel: Panel | Map) -> Iterator[Element]:
    if isinstance(panel, Map) or panel.depth or len(panel.series) < 2:
        return
    legend = _element("div", class_="legend")
    for series in panel.series:
        sign = _element("i", class_=f"{series.kind} {series.dash}", style=f"color: {series.color}")
        legend.append(_element("span", sign, series.name))
    yield legend


def _owner_table(analysis: Analysis) -> Iterator[Element]:
    views = ["raw", "masked"] if has_sinks(analysis) else ["raw"]
    for view in views:
        rows = [
            [row["L"], row["phase"], _number(found.get("sigma1_top_share"), ".4f"), _owners(found, analysis)]
            for row in analysis.per_layer
            if (found := view_of(row, view)) and found.get("sigma1_tokens")
        ]
        if rows:
            head = ("layer", "phase", "top 0.1 %", "share of σ₁² and text")
            yield _element("h3", f"Owners of σ₁ in their text, {view}")
            yield _table(head, rows, f"Owners of σ₁, {view}")


def _owners(found: dict[str, Any], analysis: Analysis) -> Element:
    lines = _element("div")
    for owner in found["sigma1_tokens"]:
        before, behind = (visible(text) for text in context(analysis.text, owner["position"]))
        code = _element("code", before, _element("mark", visible(owner["token"])), behind)
        where = f"token {owner['position']}, document {owner['document']}"
        share = _element("span", _number(owner["share"], ".4f"), class_="share", title=where)
        lines.append(_element("div", share, code, class_="owner"))
    return lines


def _phase_tables(analysis: Analysis) -> Iterator[Element]:
    for row in analysis.verdict or ():
        if row["prediction"]:
            verdict = _element("span", row["verdict"], class_=row["verdict"])
            yield _element(
                "p", f"Phase {row['phase']}: {SAID[row['prediction']]}: ", verdict, f" ({row['why']})."
            )
    if not analysis.verdict:
        yield _element("p", "No verdict: it needs intervals and chance (--bootstrap, --null_draws).")
    if analysis.verdict:
        yield _verdict_table(analysis.verdict)
    else:
        head = ("phase", "layers", "mean |cos| within", "with all others")
        keys = ("intra_cos_mean", "cross_cos_mean")
        rows = [
            [row["phase"], row["layers"], *(_number(row[key]) for key in keys)]
            for row in analysis.phase_overlap
        ]
        yield _table(head, rows, "Phases")


def _verdict_table(verdict: Iterable[dict[str, Any]]) -> Element:
    head = ("phase", "layers", "|cos| within", "95 %", "chance", "p", "p against drift")
    rows = [
        [
            row["phase"],
            row["layers"],
            *_bounded(row["intra"]),
            _number(row["intra"].get("null_mean")),
            _number(row["intra"].get("null_p"), ".3f"),
            _number(row["gap_p"], ".3f"),
            *_bounded(row["stacked_rank"]),
            row["dimensions_90"],
        ]
        for row in verdict
    ]
    return _table((*head, "rank of the v_L", "95 %", "90 % in"), rows, "Phases and verdict")


def _layer_table(analysis: Analysis) -> Element:
    keys = {
        "h_norm_mean": "‖h‖",
        "token_norm_mean": "‖δ‖",
        "rel_step_mean": "‖δ‖/‖h‖",
        "cos_delta_h_mean": "cos(δ, h)",
        "eff_rank": "effective rank",
        "top1_frac": "along v₁",
    }
    masked = {"eff_rank": "masked rank", "top1_frac": "masked v₁"} if has_sinks(analysis) else {}
    rows = [
        [row["L"], row["phase"]]
        + [_number(row[key]) for key in keys]
        + [_number((view_of(row, "masked") or {}).get(key)) for key in masked]
        for row in analysis.per_layer
    ]
    return _table(["layer", "phase", *keys.values(), *masked.values()], rows, "Layers")


def _table(head: Iterable[str], rows: Iterable[Sequence[Any]], label: str) -> Element:
    """A table that scrolls in its box; a cell is text, a number or an element."""
    table = Element("table")
    table.append(_element("thead", _element("tr", *(_element("th", name) for name in head))))
    body = SubElement(table, "tbody")
    for row in rows:
        cells = (cell if isinstance(cell, Element) else str(cell) for cell in row)
        body.append(_element("tr", *(_element("td", cell) for cell in cells)))
    return _element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def _element(tag: str, *children: str | Element, **attributes: str) -> Element:
    """An element with its children in order; class_ is class, aria_label is aria-label."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    element, last = Element(tag, names), None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif last is None:
            element.text = (element.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return element


def visible(text: str) -> str:
    """Text whose line ends, tabs and unprintable characters are seen."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(c if c.isprintable() else signs.get(c) or f"\\x{ord(c):02x}" for c in text)


def _embedded(data: Any) -> str:
    """JSON that nothing in HTML can end before its end."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _markup(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _asset(name: str) -> str:
    return (resources.files("jaxdelta.report") / name).read_text(encoding="utf-8")


def _number(value: Number | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def _bounded(figure: dict[str, Any]) -> tuple[str, str]:
    """A figure and its interval."""
    interval = "{:.3f} … {:.3f}".format(*figure["interval"]) if "interval" in figure else "–"
    return _number(figure["value"]), interval
