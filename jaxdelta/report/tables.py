"""The tables a run prints, in the reference's words and columns."""

from collections.abc import Iterator
from typing import Any

from jaxdelta.report import trust
from jaxdelta.result import Analysis


def tables(analysis: Analysis) -> str:
    """All tables of a run: the reference's; views, sinks, chance, a control's; verdict, checks."""
    sections = (
        layer_table,
        adjacent_table,
        phase_table,
        capture_table,
        trust.view_table,
        trust.ledger_table,
        trust.owner_table,
        trust.chance_table,
        control_table,
        trust.verdict_table,
        checks,
    )
    texts = ("\n".join(section(analysis)) for section in sections)
    return "\n\n".join(text for text in texts if text)


def layer_table(analysis: Analysis) -> Iterator[str]:
    """One line a layer: mean state and update norms, relative step, mean |cos(δ, h)|, effective rank."""
    if name := analysis.run["flags"].get("control"):
        yield f" control: {name} (seed {analysis.run['flags']['seed']}); not the model's own figures"
    for row in analysis.per_layer:
        yield (
            f" L={row['L']:>2} phase={row['phase']:>4} ||h||={row['h_norm_mean']:7.1f} "
            f"||δ||={row['token_norm_mean']:7.2f} rel={row['rel_step_mean']:.4f} "
            f"‖parallel‖={row['parallel_frac']:.4f} eff_rank={row['eff_rank']:6.2f}"
        )


def adjacent_table(analysis: Analysis) -> Iterator[str]:
    """|cos| between the first directions of neighbouring layers."""
    yield "=== Pairwise top-1 cos-sim (adjacent) ==="
    for layer, cosine in enumerate(analysis.top1_cos_adjacent):
        phase = analysis.per_layer[layer]["phase"]
        yield f" L={layer:>2}→{layer + 1:>2} phase={phase:>4} |cos|={abs(cosine):.4f}"


def phase_table(analysis: Analysis) -> Iterator[str]:
    """Mean |cos| within each phase and between it and the rest."""
    yield "=== Per-phase top-1 direction overlap ==="
    yield f"{'phase':>7} {'N':>3} {'intra_cos_mean':>14} {'cross_cos_mean':>14}"
    for row in analysis.phase_overlap:
        intra, cross = row["intra_cos_mean"], row["cross_cos_mean"]
        yield f"{row['phase']:>7} {row['layers']:>3} {intra:14.4f} {cross:14.4f}"


def capture_table(analysis: Analysis) -> Iterator[str]:
    """How much of each layer's first direction lies in its phase's shared subspace."""
    yield "=== Block-shared subspace (rank-8) capture fraction per layer ==="
    for row in analysis.block_capture:
        yield f" phase={row['phase']:>4} L={row['L']:>2} v1 captured by block top-8: {row['capture']:.4f}"


def control_table(analysis: Analysis) -> Iterator[str]:
    """Each layer's and each phase's figures, and after the bar the control's, where there is one."""
    control = analysis.control
    if control is None:
        return
    losses = f"{analysis.run['calibration_loss']:.4f} | {control['calibration_loss']:.4f}"
    yield f"=== Beside the control: {control['name']} (seed {control['seed']}) ==="
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
    """How much of the text the loss is of, where the file says it."""
    return f"{run['loss_tokens']} tokens of " if "loss_tokens" in run else ""


def checks(analysis: Analysis) -> Iterator[str]:
    """What tells that the figures can be believed, and the last layer in both conventions."""
    run = analysis.run
    yield "=== Checks ==="
    yield f" closure  ‖h_0 + Σδ - h_N‖ / ‖h_N‖ = {run['closure_error']:.1e}"
    yield f" loss on {probed(run)}the calibration text = {run['calibration_loss']:.4f} nats per token"
    for name, row in (("before", analysis.last_layer_residual), ("after", analysis.last_layer_normed)):
        used = "shown above" if row in analysis.per_layer else "in the JSON"
        yield (
            f" last layer, state {name} the final norm: ||δ||={row['token_norm_mean']:.2f} "
            f"eff_rank={row['eff_rank']:.2f} ({used})"
        )
