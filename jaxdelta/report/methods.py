"""A paragraph on the methods of a run, for a paper."""

import hashlib
from collections.abc import Iterator

from jaxdelta.report.charts.chart import phase_bands
from jaxdelta.report.charts.layers import sinks_left_in
from jaxdelta.report.page_parts import counted
from jaxdelta.report.result import Result
from jaxdelta.report.tables import in_nats, probed
from jaxdelta.spectra.views import view_of


def methods(analysis: Result) -> str:
    """The paragraph."""
    parts = (_subject, _text, _numbers, _views, _uncertainty, _checks)
    return " ".join(sentence for part in parts for sentence in part(analysis))


def _subject(analysis: Result) -> Iterator[str]:
    run = analysis.run
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    flags = run.get("flags", {})
    revision, adapter = flags.get("revision"), flags.get("adapter")
    model = analysis.model + (f" (revision {revision})" if revision else "")
    model += f" with the adapter {adapter}" if adapter else ""
    yield (
        f"We measured with {versions or 'jaxdelta'} what each of the {analysis.num_layers} layers of {model} "
        f"(hidden size {analysis.hidden}, weights {run.get('weights_dtype', 'of unknown dtype')}) writes "
        "into the residual stream: its update δ_L = h_{L+1} − h_L, the sum of attention's and the MLP's."
    )
    if control := run.get("flags", {}).get("control"):
        yield f"The run is a control ({control}), not the model itself."


def _text(analysis: Result) -> Iterator[str]:
    documents = analysis.run.get("documents")
    origin = f" of {counted(documents, 'document')}" if documents else ""
    fingerprint = analysis.run.get("text_fingerprint")
    digest = f" (SHA-256 of its tokens, documents and positions {fingerprint})" if fingerprint else ""
    yield f"The text had {counted(analysis.n_calib_tokens, 'token')}{origin}{digest}."
    yield "Its first token, an attention sink, was left out of all statistics."
    number = analysis.run.get("text", {}).get("counted")
    if (measure := analysis.run.get("flags", {}).get("measure", "all")) != "all":
        yield f"Statistics are of the {counted(number, 'token')} that --measure={measure} chooses."


def _numbers(analysis: Result) -> Iterator[str]:
    run = analysis.run
    methods = {"gram": "Gram matrices", "full": "a full SVD"}
    method = methods.get(run.get("flags", {}).get("svd", ""), "an SVD")
    last = {"residual": "before", "normed": "after"}.get(run.get("last_state", ""), "before or after")
    yield (
        f"Products were computed in {run.get('compute_dtype', 'an unknown dtype')}, the stream was kept in "
        f"{run.get('residual_dtype', 'an unknown dtype')}, and spectra were computed in float64 from "
        f"{method}; the last layer's update was measured {last} the final norm."
    )
    yield (
        "The effective rank is exp(−Σ p ln p) with p = σ²/Σσ² (Giraldo et al. 2014), v_L the first right "
        "singular vector of layer L's update, and its relative step the mean of ‖δ_i‖/‖h_i‖ over tokens "
        "(Csordás et al. 2025)."
    )


def _views(analysis: Result) -> Iterator[str]:
    masked = [view for row in analysis.per_layer if (view := view_of(row, "masked"))]
    if masked:
        most = max(row["n"] - view["n"] for row, view in zip(analysis.per_layer, masked, strict=True))
        factor = analysis.run.get("flags", {}).get("sink_factor", 10)
        yield (
            f"In masked views, tokens with a state norm above {factor:g} times the layer's median were left "
            f"out as sinks (at most {most} in a layer)."
        )
    if left := sinks_left_in(analysis):
        yield f"Some sinks could not be masked ({left})."


def _uncertainty(analysis: Result) -> Iterator[str]:
    flags = analysis.run.get("flags", {})
    if any("intervals" in row for row in analysis.per_layer):
        yield (
            "95 % intervals treat documents as the unit: a jackknife for statistics of a layer, "
            f"{flags['bootstrap']} bootstrap draws for statistics across layers."
        )
    if analysis.overlap and flags.get("null_draws"):
        yield (
            f"Chance is estimated by {flags['null_draws']} draws of directions from the pooled covariance of "
            "the compared layers; p = (b+1)/(m+1) (Phipson & Smyth 2010); the JSON file also has p adjusted "
            "over layers after Benjamini & Hochberg (1995)."
        )
    if "seed" in flags:
        yield f"The seed was {flags['seed']}."
    bands = (
        f"{name} {first}" + (f"–{last}" if last > first else "")
        for first, last, name in phase_bands(analysis)
    )
    yield f"Phases by layer: {', '.join(bands)}."


def _checks(analysis: Result) -> Iterator[str]:
    run = analysis.run
    closure = f"The updates add up to the last state with relative error {run['closure_error']:.1e}"
    if run["calibration_loss"] is None:
        yield f"{closure}; there is no loss ({run.get('loss_reason')})."
    else:
        yield f"{closure}; the loss on {probed(run)}the text was {in_nats(run)}."
    digest = hashlib.sha256(analysis.arrays_file()).hexdigest()
    yield f"The SHA-256 of the run's .safetensors file is {digest}."
