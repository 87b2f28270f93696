"""The printed tables of a run; the first four have the reference's words and columns."""

from collections.abc import Iterator
from typing import Any

from jaxdelta.report.charts.layers import sinks_left
from jaxdelta.report.page_parts import number, spanned
from jaxdelta.report.result import Result
from jaxdelta.spectra.views import ALL, view_of
from jaxdelta.statistics.across_layers.verdict import IN_WORDS


def tables(analysis: Result) -> str:
    """All tables of a run."""
    reference = (layer_table, adjacent_table, phase_table, capture_table)
    layers = (view_table, ledger_table, owner_table, channel_table)
    judgement = (chance_table, control_table, verdict_table, checks)
    texts = ("\n".join(section(analysis)) for section in (*reference, *layers, *judgement))
    return "\n\n".join(text for text in texts if text)


def layer_table(analysis: Result) -> Iterator[str]:
    """Mean state and update norms, relative step, mean |cos(δ, h)| and effective rank of each layer."""
    if name := analysis.run["flags"].get("control"):
        yield f" control: {name} (seed {analysis.run['flags']['seed']}); not the model itself"
    for row in analysis.per_layer:
        yield (
            f" L={row['L']:>2} phase={row['phase']:>4} ||h||={row['h_norm_mean']:7.1f} "
            f"||δ||={row['token_norm_mean']:7.2f} rel={row['rel_step_mean']:.4f} "
            f"‖parallel‖={row['parallel_frac']:.4f} eff_rank={row['eff_rank']:6.2f}"
        )


def adjacent_table(analysis: Result) -> Iterator[str]:
    """|cos| between the first directions of neighbouring layers."""
    yield "=== Pairwise top-1 cos-sim (adjacent) ==="
    for layer, cosine in enumerate(analysis.top1_cos_adjacent):
        phase = analysis.per_layer[layer]["phase"]
        yield f" L={layer:>2}→{layer + 1:>2} phase={phase:>4} |cos|={abs(cosine):.4f}"


def phase_table(analysis: Result) -> Iterator[str]:
    """Mean |cos| within each phase and between it and the rest."""
    yield "=== Per-phase top-1 direction overlap ==="
    yield f"{'phase':>7} {'N':>3} {'intra_cos_mean':>14} {'cross_cos_mean':>14}"
    for row in analysis.phase_overlap:
        intra, cross = row["intra_cos_mean"], row["cross_cos_mean"]
        alone = "  one layer: 1 by definition" if row["layers"] == 1 else ""
        yield f"{row['phase']:>7} {row['layers']:>3} {intra:14.4f} {cross:14.4f}{alone}"


def capture_table(analysis: Result) -> Iterator[str]:
    """The share of each layer's first direction inside its phase's shared subspace."""
    yield "=== Block-shared subspace (rank-8) capture fraction per layer ==="
    for row in analysis.block_capture:
        yield f" phase={row['phase']:>4} L={row['L']:>2} v1 captured by block top-8: {row['capture']:.4f}"


def control_table(analysis: Result) -> Iterator[str]:
    """Statistics of layers and phases, run | control."""
    control = analysis.control
    if control is None:
        return
    losses = " | ".join(
        "none" if facts["calibration_loss"] is None else f"{facts['calibration_loss']:.4f}"
        for facts in (analysis.run, control)
    )
    yield f"=== Compared with the control: {control['name']} (seed {control['seed']}) ==="
    yield f" run | control; loss {losses} nats per token"
    yield f" {'':4} {'eff_rank':>17} {'top1_frac':>15} {'rel_step':>19} {'|cos| to next':>15}"
    neighbours = zip(analysis.top1_cos_adjacent, control["top1_cos_adjacent"], strict=True)
    for row, other in zip(analysis.per_layer, control["per_layer"], strict=True):
        cosines = next(neighbours, None)
        yield (
            f" L={row['L']:>2} {row['eff_rank']:7.2f} | {other['eff_rank']:7.2f} "
            f"{row['top1_frac']:6.4f} | {other['top1_frac']:6.4f} "
            f"{row['rel_step_mean']:8.4f} | {other['rel_step_mean']:8.4f} "
            + (f"{abs(cosines[0]):6.4f} | {abs(cosines[1]):6.4f}" if cosines else "")
        ).rstrip()
    yield f" {'phase':>5} {'intra_cos_mean':>15} {'cross_cos_mean':>15}"
    for row, other in zip(analysis.phase_overlap, control["phase_overlap"], strict=True):
        means = (f"{row[key]:6.4f} | {other[key]:6.4f}" for key in ("intra_cos_mean", "cross_cos_mean"))
        yield f" {row['phase']:>5} {' '.join(means)}"


def probed(run: dict[str, Any]) -> str:
    """`N tokens of `, the part of the text in the loss; empty if the file does not say."""
    return f"{run['loss_tokens']} tokens of " if "loss_tokens" in run else ""


def in_nats(run: dict[str, Any]) -> str:
    """The loss with its unit, or the reason why there is none."""
    loss = run["calibration_loss"]
    return f"none ({run.get('loss_reason')})" if loss is None else f"{loss:.4f} nats per token"


def checks(analysis: Result) -> Iterator[str]:
    """Closure and loss, and the last layer before and after the final norm."""
    run = analysis.run
    yield "=== Checks ==="
    yield f" closure  ‖h_0 + Σδ - h_N‖ / ‖h_N‖ = {run['closure_error']:.1e}"
    tokens = probed(run) if run["calibration_loss"] is not None else ""
    yield f" loss on {tokens}the calibration text = {in_nats(run)}"
    for name, row in (("before", analysis.last_layer_residual), ("after", analysis.last_layer_normed)):
        used = "shown above" if row in analysis.per_layer else "in the JSON"
        yield (
            f" last layer, state {name} the final norm: ||δ||={row['token_norm_mean']:.2f} "
            f"eff_rank={row['eff_rank']:.2f} ({used})"
        )


def view_table(analysis: Result) -> Iterator[str]:
    """Effective rank and share of energy along v_1 in all views that differ; sinks left in masked views."""
    rows, columns = analysis.per_layer, dict[str, list[str]]()
    for name in ALL:
        views = [view_of(row, name) for row in rows]
        cells = [f"{v['eff_rank']:8.2f} ({v['top1_frac']:.3f})" if v else f"{'-':>16}" for v in views]
        if views[0] and cells not in columns.values():
            columns[name] = cells
    left = [f"  {count} left in" if (count := sinks_left(row)) else "" for row in rows]
    if len(columns) < 2 and not any(left):
        return
    yield (
        "=== Views: eff_rank (top1_frac)" + ("; sinks that could not be masked" if any(left) else "") + " ==="
    )
    yield "     " + " ".join(f"{name:>16}" for name in columns)
    for row, *cells, sinks in zip(rows, *columns.values(), left, strict=True):
        yield f" L={row['L']:>2} {' '.join(cells)}{sinks}"


def ledger_table(analysis: Result) -> Iterator[str]:
    """Shares of ‖δ‖²: attention, MLP and their cross term 2⟨attention, mlp⟩; and the number of sinks."""
    if "ledger" not in analysis.per_layer[0]:
        return
    yield "=== Energy ‖δ‖² = ‖attention‖² + ‖mlp‖² + cross, as shares ==="
    for row in analysis.per_layer:
        whole = row["ledger"]["update"] or 1.0
        parts = [row["ledger"][name] / whole for name in ("attention", "mlp", "cross")]
        masked = view_of(row, "masked") or view_of(row, "masked.centred")
        sinks = f" sinks masked {row['n'] - masked['n']}" if masked else ""
        sinks += f", {left} left in" if (left := sinks_left(row)) else ""
        yield f" L={row['L']:>2} " + " + ".join(f"{part:6.3f}" for part in parts) + sinks


def owner_table(analysis: Result) -> Iterator[str]:
    """The tokens with the largest shares of σ_1², and the share of the top thousandth."""
    rows = [row for row in analysis.per_layer if row.get("sigma1_tokens")]
    if rows:
        yield "=== Who owns σ_1: tokens by share of σ_1² (position) ==="
    for row in rows:
        tokens = (f"{t['token']!r} {t['share']:.3f} ({t['position']})" for t in row["sigma1_tokens"][:3])
        yield f" L={row['L']:>2} top 0.1 %: {_number(row['sigma1_top_share'])}   " + ", ".join(tokens)


def channel_table(analysis: Result) -> Iterator[str]:
    """The channels with the largest shares of ‖δ‖² and of the state's energy after the layer."""
    rows = [row for row in analysis.per_layer if "massive_channels" in row]
    said = "share of ‖δ‖² (+ written, - removed), share of the state after the layer"
    if rows:
        yield f"=== Massive channels: {said} ==="
    for row in rows:
        signs = {"writes": "+", "removes": "-", "keeps": "="}
        update, state = row["massive_channels"]["update"], row["massive_channels"]["state"]
        written = (f"{signs[c['effect']]}{c['channel']} {c['share']:.3f}" for c in update)
        held = (f"{c['channel']} {c['share']:.3f}" for c in state)
        yield f" L={row['L']:>2} " + ", ".join(written) + "   state " + ", ".join(held)


def chance_table(analysis: Result) -> Iterator[str]:
    """Each phase's cosines and 95 % intervals, compared with directions of the same covariance."""
    views = analysis.overlap or {}
    same = views.get("masked") == views.get("raw")
    left = any(map(sinks_left, analysis.per_layer))
    masking = "sinks could not be masked" if left else "there are no sinks to mask"
    for view, relations in views.items():
        if view == "masked" and same:
            continue
        yield f"=== Phases compared with chance, {f'raw ({masking})' if same else view} ==="
        test = relations["phase_test"]
        yield (
            f" {'phase':>5} {'N':>3} {'intra |cos|':>22} {'chance':>7} {'p':>6} {'p(gap)':>7} "
            f"{'rank of v_L':>22} {'90 %':>5} {'left out':>9} {'chance':>7}"
        )
        for row, gap in zip(relations["phases"], test["phases"], strict=True):
            in_phase = (layer for layer in relations["layers"] if layer["phase"] == row["phase"])
            alone = [layer["leave_one_out"] for layer in in_phase]
            yield (
                f" {row['phase']:>5} {row['layers']:>3} {spanned(row['intra']):>22} "
                f"{_number(row['intra'].get('null_mean')):>7} {_number(row['intra'].get('null_p')):>6} "
                f"{_number(gap['p_value']):>7} {spanned(row['stacked_rank']):>22} "
                f"{row['dimensions_90']:>5} {_mean(alone, 'value'):>9} {_mean(alone, 'null_mean'):>7}"
            )
        orders = f"{'all' if test['exact'] else 'random'} {test['orders']} orders of the phases"
        yield f" phases against drift: gap {_number(test['gap'])}, p {_number(test['p_value'])} ({orders})"


def verdict_table(analysis: Result) -> Iterator[str]:
    """The predictions of the hypothesis, and the verdicts."""
    if not analysis.verdict:
        return
    yield "=== Verdict on h_{L+1} = h_L + T_shared(h_L) + γ_L·v_L·f(…) ==="
    for row in analysis.verdict:
        if row["prediction"]:
            said = IN_WORDS[row["prediction"]]
            yield f" phase {row['phase']}: {said}: {row['verdict']} ({row['why']})"
    if analysis.run["documents"] == 1:
        yield " one document: intervals need several"
    elif analysis.run["few_documents"]:
        yield f" {analysis.run['documents']} documents: fewer than ten, intervals are rough"


def _number(value: float | None) -> str:
    return number(value, ".3f")


def _mean(entries: list[dict[str, Any]], key: str) -> str:
    values = [entry[key] for entry in entries if key in entry]
    return _number(sum(values) / len(values) if values else None)
