"""The report of a run as one HTML file: figures, tables, warnings and methods."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

from jaxdelta.report.charts.across_layers import phase_rows
from jaxdelta.report.charts.chart import Figure
from jaxdelta.report.charts.layers import figures, has_sinks
from jaxdelta.report.methods import methods
from jaxdelta.report.page_parts import (
    as_file,
    bounded,
    counted,
    document,
    element,
    figure_section,
    number,
    table,
    visible,
)
from jaxdelta.report.result import Result
from jaxdelta.report.tables import in_nats
from jaxdelta.spectra.views import view_of
from jaxdelta.statistics.across_layers.verdict import IN_WORDS
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.text.excerpt import context

LARGE_CLOSURE = 1e-2
FEW_TOKENS = 3  # per dimension


def page(analysis: Result) -> str:
    """The page as HTML."""
    drawn = figures(analysis)
    return document(f"{analysis.model} – jaxdelta", _body(analysis, drawn), drawn)


def page_file(analysis: Result) -> bytes:
    """The page as the bytes of its file."""
    return as_file(page(analysis))


def summary(analysis: Result) -> str:
    """A notebook's view of a run: facts, warnings, phases, verdict and the layers, folded.

    The tables have no style, so that the notebook's light or dark theme applies.
    """
    facts = table((_title(analysis), ""), list(_facts(analysis).items()), "Run")
    layers = element("details", element("summary", "Every layer in numbers"), _layer_table(analysis))
    whole = element("div", facts, *_warned(analysis), *_phase_tables(analysis), layers)
    return as_file(tostring(whole, "unicode", method="html")).decode()


def _body(analysis: Result, drawn: Sequence[Figure]) -> Iterator[Element]:
    after = {"ranks": _channel_table, "owners": _owner_table, "phases": _phase_tables}
    yield from _headline(analysis)
    for figure in drawn:
        yield figure_section(figure)
        yield from after.get(figure.name, lambda _: ())(analysis)
    yield element("h2", "Every layer in numbers")
    yield _layer_table(analysis)
    hint = element("p", "For a paper:", class_="faint")
    yield element("section", element("h2", "Methods"), hint, element("blockquote", methods(analysis)))


def _headline(analysis: Result) -> Iterator[Element]:
    yield element("h1", _title(analysis))
    box = element("dl", class_="facts")
    for name, fact in _facts(analysis).items():
        box.append(element("div", element("dt", name), element("dd", fact)))
    yield box
    yield from _warned(analysis)


def _title(analysis: Result) -> str:
    verb = "writes" if analysis.num_layers == 1 else "write"
    return f"What {counted(analysis.num_layers, 'layer')} of {analysis.model} {verb}"


def _facts(analysis: Result) -> dict[str, str]:
    run = analysis.run
    documents, flags = run.get("documents"), run.get("flags", {})
    adapter, measure = flags.get("adapter"), flags.get("measure", "all")
    return {
        "model": f"{analysis.model}, {counted(analysis.num_layers, 'layer')}, hidden size {analysis.hidden}",
        **({"adapter": str(adapter)} if adapter else {}),
        "text": f"“{visible(analysis.text['begins'])}…”" if analysis.text else "not kept in this file",
        "tokens": str(analysis.n_calib_tokens)
        + (f" in {counted(documents, 'document')}" if documents else "")
        + (f"; {run['text']['counted']} count (--measure={measure})" if measure != "all" else ""),
        "dtypes": f"weights {run.get('weights_dtype')}, products {run.get('compute_dtype')}, "
        f"stream {run.get('residual_dtype')}",
        "closure ‖h₀ + Σδ − h_N‖ / ‖h_N‖": f"{run['closure_error']:.1e}",
        "loss": in_nats(run),
        "last layer": f"state {'after' if run.get('last_state') == 'normed' else 'before'} the final norm",
        "device": str(run.get("device")),
    }


def _warned(analysis: Result) -> Iterator[Element]:
    if items := [element("li", warning) for warning in warnings(analysis)]:
        yield element("ul", *items, class_="warnings")


def warnings(analysis: Result) -> Iterator[str]:
    """Reasons to doubt the numbers."""
    run, first = analysis.run, analysis.per_layer[0]
    flags = run.get("flags", {})
    if flags.get("control"):
        yield f"This is a control ({flags['control']}, seed {flags['seed']}), not the model itself."
    if run["closure_error"] > LARGE_CLOSURE:
        yield "The closure is large: in this dtype the updates do not add up to the last state."
    if run.get("documents") == 1:
        yield "One document: no intervals, which need several."
    elif run.get("few_documents"):
        yield f"Only {run['documents']} documents: fewer than ten, intervals are rough."
    if first.get("n_over_d", FEW_TOKENS) < FEW_TOKENS:
        yield (
            f"Few tokens: {first['n_over_d']:.2g} for each of the {analysis.hidden} dimensions, so ranks are "
            "lower than on a longer text."
        )
    yield from (f"{note[:1].upper()}{note[1:]}." for note in run.get("notes", []))
    if again := run.get("rows_on_host"):
        yield f"Spectra recomputed on the host because the device's failed their check: rows {again}."
    if missing := list(_not_measured(analysis)):
        yield f"Not measured in this run: {'; '.join(missing)}."


def _not_measured(analysis: Result) -> Iterator[str]:
    rows = analysis.per_layer
    if not any(view_of(row, "masked") for row in rows):
        yield "the view without sinks (--views)"
    if not any(view_of(row, "attention") or view_of(row, "mlp") for row in rows):
        yield "attention and MLP apart (--views)"
    if not any("intervals" in row for row in rows):
        yield "intervals (--bootstrap, several documents)"
    if not analysis.run.get("flags", {}).get("null_draws") or not analysis.overlap:
        yield "chance (--null_draws)"


def _channel_table(analysis: Result) -> Iterator[Element]:
    rows = [
        [row["L"], row["phase"], *(_channels(channels[part]) for part in ("update", "state"))]
        for row in analysis.per_layer
        if (channels := row.get("massive_channels"))
    ]
    if rows:
        yield element("h3", "Channels with the most energy")
        head = ("layer", "phase", "share of ‖δ‖²", "share of the state after the layer")
        yield table(head, rows, "Massive channels")


def _channels(entries: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{c['channel']}: {number(c['share'], '.3f')} ({c['effect']})" for c in entries)


def _owner_table(analysis: Result) -> Iterator[Element]:
    for name in ["raw", "masked"] if has_sinks(analysis) else ["raw"]:
        rows = [
            [row["L"], row["phase"], number(view.get("sigma1_top_share"), ".4f"), _owners(view, analysis)]
            for row in analysis.per_layer
            if (view := view_of(row, name)) and view.get("sigma1_tokens")
        ]
        if rows:
            head = ("layer", "phase", "top 0.1 %", "share of σ₁² and text")
            yield element("h3", f"Owners of σ₁ in their text, {name}")
            yield table(head, rows, f"Owners of σ₁, {name}")


def _owners(view: dict[str, Any], analysis: Result) -> Element:
    lines = element("div")
    for owner in view["sigma1_tokens"]:
        before, after = (visible(text) for text in context(analysis.text, owner["position"]))
        code = element("code", before, element("mark", visible(owner["token"])), after)
        where = f"token {owner['position']}, document {owner['document']}"
        share = element("span", number(owner["share"], ".4f"), class_="share", title=where)
        lines.append(element("div", share, code, class_="owner"))
    return lines


def _phase_tables(analysis: Result) -> Iterator[Element]:
    for row in analysis.verdict or ():
        if row["prediction"]:
            said = f"Phase {row['phase']}: {IN_WORDS[row['prediction']]}: "
            verdict = element("span", row["verdict"], class_=row["verdict"])
            yield element("p", said, verdict, f" ({row['why']}).")
    if analysis.verdict:
        yield _verdict_table(analysis.verdict)
    else:
        yield element("p", "No verdict: it needs intervals and chance (--bootstrap, --null_draws).")
        head = ("phase", "layers", "mean |cos| within", "with all others")
        rows = [
            [row["phase"], row["layers"], *(number(row[key]["value"]) for key in ("intra", "cross"))]
            for row in phase_rows(analysis)
        ]
        yield table(head, rows, "Phases")


def _verdict_table(verdict: Iterable[dict[str, Any]]) -> Element:
    head = ("phase", "layers", "|cos| within", "95 %", "chance", "p", "p against drift", "rank of the v_L")
    rows = [
        [
            row["phase"],
            row["layers"],
            *bounded(row["intra"]),
            number(row["intra"].get("null_mean")),
            number(row["intra"].get("null_p"), ".3f"),
            number(row["gap_p"], ".3f"),
            *bounded(row["stacked_rank"]),
            row["dimensions_90"],
        ]
        for row in verdict
    ]
    return table((*head, "95 %", "90 % in"), rows, "Phases and verdict")


def _layer_table(analysis: Result) -> Element:
    columns = {entry.name: entry.column for entry in registered() if entry.column}
    masked = {"eff_rank": "masked rank", "top1_frac": "masked v₁"} if has_sinks(analysis) else {}
    rows = [
        [row["L"], row["phase"]]
        + [number(row[key]) for key in columns]
        + [number((view_of(row, "masked") or {}).get(key)) for key in masked]
        for row in analysis.per_layer
    ]
    return table(["layer", "phase", *columns.values(), *masked.values()], rows, "Layers")
