"""One HTML file that shows a run and opens from disk: its figures, tables, doubts and methods."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

from jaxdelta.report.charts.chart import Figure
from jaxdelta.report.charts.layers import figures, has_sinks
from jaxdelta.report.methods import methods
from jaxdelta.report.page_parts import (
    as_file,
    bounded,
    document,
    element,
    figure_section,
    number,
    table,
    visible,
)
from jaxdelta.report.result import Result
from jaxdelta.spectra.views import view_of
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.text.excerpt import context

SAID = {"shared": "v_L share few dimensions", "own": "every layer has its own v_L", None: "–"}
LARGE_CLOSURE = 1e-2
FEW_TOKENS = 3  # per dimension


def page(analysis: Result) -> str:
    """The page."""
    drawn = figures(analysis)
    return document(f"{analysis.model} – jaxdelta", _body(analysis, drawn), drawn)


def page_file(analysis: Result) -> bytes:
    """The page as the bytes of its file."""
    return as_file(page(analysis))


def summary(analysis: Result) -> str:
    """What a notebook shows of a run: the head of the page, phases and verdict, and the layers, folded.

    Plain tables without a style of their own: a notebook's is made for its light and its dark.
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
    hint = element("p", "For a paper, with what is needed to repeat the run:", class_="faint")
    yield element("section", element("h2", "Methods"), hint, element("blockquote", methods(analysis)))


def _headline(analysis: Result) -> Iterator[Element]:
    yield element("h1", _title(analysis))
    box = element("dl", class_="facts")
    for name, fact in _facts(analysis).items():
        box.append(element("div", element("dt", name), element("dd", fact)))
    yield box
    yield from _warned(analysis)


def _title(analysis: Result) -> str:
    return f"What {analysis.num_layers} layers of {analysis.model} write"


def _facts(analysis: Result) -> dict[str, str]:
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


def _warned(analysis: Result) -> Iterator[Element]:
    if found := list(warnings(analysis)):
        yield element("ul", *(element("li", warning) for warning in found), class_="warnings")


def warnings(analysis: Result) -> Iterator[str]:
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
        [row["L"], row["phase"], *(_channels(found[part]) for part in ("update", "state"))]
        for row in analysis.per_layer
        if (found := row.get("massive_channels"))
    ]
    if rows:
        yield element("h3", "Channels with the most energy")
        head = ("layer", "phase", "share of ‖δ‖²", "share of the state after the layer")
        yield table(head, rows, "Massive channels")


def _channels(found: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{c['channel']}: {number(c['share'], '.3f')} ({c['effect']})" for c in found)


def _owner_table(analysis: Result) -> Iterator[Element]:
    views = ["raw", "masked"] if has_sinks(analysis) else ["raw"]
    for view in views:
        rows = [
            [row["L"], row["phase"], number(found.get("sigma1_top_share"), ".4f"), _owners(found, analysis)]
            for row in analysis.per_layer
            if (found := view_of(row, view)) and found.get("sigma1_tokens")
        ]
        if rows:
            head = ("layer", "phase", "top 0.1 %", "share of σ₁² and text")
            yield element("h3", f"Owners of σ₁ in their text, {view}")
            yield table(head, rows, f"Owners of σ₁, {view}")


def _owners(found: dict[str, Any], analysis: Result) -> Element:
    lines = element("div")
    for owner in found["sigma1_tokens"]:
        before, behind = (visible(text) for text in context(analysis.text, owner["position"]))
        code = element("code", before, element("mark", visible(owner["token"])), behind)
        where = f"token {owner['position']}, document {owner['document']}"
        share = element("span", number(owner["share"], ".4f"), class_="share", title=where)
        lines.append(element("div", share, code, class_="owner"))
    return lines


def _phase_tables(analysis: Result) -> Iterator[Element]:
    for row in analysis.verdict or ():
        if row["prediction"]:
            verdict = element("span", row["verdict"], class_=row["verdict"])
            yield element(
                "p", f"Phase {row['phase']}: {SAID[row['prediction']]}: ", verdict, f" ({row['why']})."
            )
    if not analysis.verdict:
        yield element("p", "No verdict: it needs intervals and chance (--bootstrap, --null_draws).")
    if analysis.verdict:
        yield _verdict_table(analysis.verdict)
    else:
        head = ("phase", "layers", "mean |cos| within", "with all others")
        keys = ("intra_cos_mean", "cross_cos_mean")
        rows = [
            [row["phase"], row["layers"], *(number(row[key]) for key in keys)]
            for row in analysis.phase_overlap
        ]
        yield table(head, rows, "Phases")


def _verdict_table(verdict: Iterable[dict[str, Any]]) -> Element:
    head = ("phase", "layers", "|cos| within", "95 %", "chance", "p", "p against drift")
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
    return table((*head, "rank of the v_L", "95 %", "90 % in"), rows, "Phases and verdict")


def _layer_table(analysis: Result) -> Element:
    keys = {one.name: one.column for one in registered() if one.column}
    masked = {"eff_rank": "masked rank", "top1_frac": "masked v₁"} if has_sinks(analysis) else {}
    rows = [
        [row["L"], row["phase"]]
        + [number(row[key]) for key in keys]
        + [number((view_of(row, "masked") or {}).get(key)) for key in masked]
        for row in analysis.per_layer
    ]
    return table(["layer", "phase", *keys.values(), *masked.values()], rows, "Layers")
