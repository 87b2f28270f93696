"""The tables that say how far a run's figures can be trusted: views, sinks, chance, intervals, verdict."""

from collections.abc import Iterator
from typing import Any

from jaxdelta.report.markup import number, spanned
from jaxdelta.result import Analysis
from jaxdelta.views import ALL, view_of


def view_table(analysis: Analysis) -> Iterator[str]:
    """Effective rank and share of energy along v_1 in every view, if sinks or the mean change anything."""
    rows = analysis.per_layer
    names: list[str] = []
    seen = [[view_of(row, "raw") for row in rows]]
    for name in ALL:
        figures = [view_of(row, name) for row in rows]
        if figures[0] is not None and figures not in seen:
            names.append(name)
            seen.append(figures)
    if not names:
        return
    yield "=== Views: eff_rank (top1_frac) ==="
    yield "     " + " ".join(f"{name:>16}" for name in ["raw", *names])
    for row in rows:
        figures = [view_of(row, name) for name in ["raw", *names]]
        yield f" L={row['L']:>2} " + " ".join(
            f"{f['eff_rank']:8.2f} ({f['top1_frac']:.3f})" if f else f"{'-':>16}" for f in figures
        )


def ledger_table(analysis: Analysis) -> Iterator[str]:
    """Shares of ‖δ‖²: attention's, the MLP's, and their cross term 2<attention, mlp>; and the sinks."""
    if "ledger" not in analysis.per_layer[0]:
        return
    yield "=== Energy ‖δ‖² = ‖attention‖² + ‖mlp‖² + cross, as shares ==="
    for row in analysis.per_layer:
        whole = row["ledger"]["update"] or 1.0
        parts = [row["ledger"][name] / whole for name in ("attention", "mlp", "cross")]
        masked = view_of(row, "masked") or view_of(row, "masked.centred")
        sinks = f" sinks masked {row['n'] - masked['n']}" if masked else ""
        yield f" L={row['L']:>2} " + " + ".join(f"{part:6.3f}" for part in parts) + sinks


def owner_table(analysis: Analysis) -> Iterator[str]:
    """The tokens that own most of σ_1², and how much the first thousandth of all owns."""
    rows = [row for row in analysis.per_layer if row.get("sigma1_tokens")]
    if not rows:
        return
    yield "=== Who owns σ_1: tokens by share of σ_1² (position) ==="
    for row in rows:
        tokens = (f"{t['token']!r} {t['share']:.3f} ({t['position']})" for t in row["sigma1_tokens"][:3])
        yield f" L={row['L']:>2} top 0.1 %: {_number(row['sigma1_top_share'])}   " + ", ".join(tokens)


def chance_table(analysis: Analysis) -> Iterator[str]:
    """Each phase's cosines beside what its layers' covariance gives by chance, with 95 % intervals."""
    views = analysis.overlap or {}
    same = views.get("masked") == views.get("raw")
    for view, relations in views.items():
        if view == "masked" and same:
            continue
        yield f"=== Phases beside chance, {'raw (there are no sinks to mask)' if same else view} ==="
        test = relations["phase_test"]
        yield (
            f" {'phase':>5} {'N':>3} {'intra |cos|':>22} {'chance':>7} {'p':>6} {'p(gap)':>7} "
            f"{'rank of v_L':>22} {'90 %':>5} {'left out':>9} {'chance':>7}"
        )
        for row, gap in zip(relations["phases"], test["phases"], strict=True):
            alone = [each["leave_one_out"] for each in relations["layers"] if each["phase"] == row["phase"]]
            yield (
                f" {row['phase']:>5} {row['layers']:>3} {spanned(row['intra']):>22} "
                f"{_number(row['intra'].get('null_mean')):>7} {_number(row['intra'].get('null_p')):>6} "
                f"{_number(gap['p_value']):>7} {spanned(row['stacked_rank']):>22} "
                f"{row['dimensions_90']:>5} {_mean(alone, 'value'):>9} {_mean(alone, 'null_mean'):>7}"
            )
        orders = f"{'all' if test['exact'] else 'random'} {test['orders']} orders of the phases"
        yield f" phases against drift: gap {_number(test['gap'])}, p {_number(test['p_value'])} ({orders})"


def verdict_table(analysis: Analysis) -> Iterator[str]:
    """What the hypothesis predicts, and what the figures say."""
    if not analysis.verdict:
        return
    yield "=== Verdict on h_{L+1} = h_L + T_shared(h_L) + γ_L·v_L·f(…) ==="
    for row in analysis.verdict:
        if row["prediction"]:
            said = {"shared": "v_L share few dimensions", "own": "every layer has its own v_L"}
            yield f" phase {row['phase']}: {said[row['prediction']]}: {row['verdict']} ({row['why']})"
    if analysis.run["documents"] == 1:
        yield " one document: intervals need several"
    elif analysis.run["few_documents"]:
        yield f" {analysis.run['documents']} documents: fewer than ten, intervals are rough"


def _number(value: float | None) -> str:
    return number(value, ".3f")


def _mean(figures: list[dict[str, Any]], key: str) -> str:
    values = [figure[key] for figure in figures if key in figure]
    return _number(sum(values) / len(values) if values else None)
