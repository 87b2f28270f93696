"""Runs over several texts of one model, put together as one run over all of them.

Axes: n tokens that count in all, G groups in all.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.analysis import Analysis
from jaxdelta.run.collect import collect
from jaxdelta.run.options import Options
from jaxdelta.run.provenance import document_facts
from jaxdelta.spectra.moments.files import RUN, load_layer, load_text
from jaxdelta.spectra.moments.summary import merge
from jaxdelta.spectra.view_summary import LayerSummary, MeasurementPlan
from jaxdelta.spectra.views import parse_views, parts_of_views
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.layer_row import layer_record
from jaxdelta.text.excerpt import excerpt
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import PADDING, Tokens

# Of a run's flags: what another must have the same to be put together with it.
SAME_FLAGS = (
    "top_k",
    "last_state",
    "compute_dtype",
    "residual_dtype",
    "phases",
    "views",
    "sink_factor",
    "revision",
    "control",
)


def merge_runs(directories: Sequence[Path]) -> Analysis:
    """The analysis of all these runs' texts together, from the moments that they kept.

    Equal to one run over all texts, but for what is drawn anew: groups are those of the runs.

    Args:
        directories: as `--keep_moments` wrote them.

    Raises:
        UsageError: fewer than two.
        JaxDeltaError: one is missing or damaged, or they do not belong together; it says why.
    """
    if len(directories) < 2:
        raise UsageError("runs: at least two are needed")
    runs = [Analysis.load(directory / RUN) for directory in directories]
    _check_alike(runs, directories)
    first = runs[0]
    options = Options(**first.run["flags"])
    sample = _sample([load_text(directory) for directory in directories], options)
    phases = Phases(tuple(row["phase"] for row in first.per_layer))
    layers = [
        layer_record(row, _layer(directories, row, options), phases, sample, options.top_k, first.hidden)
        for row in range(first.num_layers + 1)
    ]
    fields = collect(layers, phases, sample, options)
    return Analysis(
        model=first.model,
        num_layers=first.num_layers,
        hidden=first.hidden,
        n_calib_tokens=sum(run.n_calib_tokens for run in runs),
        text=excerpt(sample.tokens, fields["per_layer"]),
        run=_run_facts(runs, sample),
        **fields,
    )


def _check_alike(runs: Sequence[Analysis], directories: Sequence[Path]) -> None:
    def kind(run: Analysis) -> dict[str, Any]:
        own = {"model": run.model, "layers": run.num_layers, "hidden": run.hidden}
        return own | {name: run.run["flags"][name] for name in SAME_FLAGS}

    for run, directory in zip(runs[1:], directories[1:], strict=True):
        for name, value in kind(run).items():
            if value != (wanted := kind(runs[0])[name]):
                raise JaxDeltaError(f"{directory}: has {name} {value}, {directories[0]} has {wanted}")
    for (i, run), (j, other) in combinations(enumerate(runs), 2):
        if run.run["text_fingerprint"] == other.run["text_fingerprint"]:
            raise JaxDeltaError(f"{directories[j]}: is of the same text as {directories[i]}")


def _sample(texts: Sequence[tuple[Tokens, np.ndarray]], options: Options) -> ResamplingGroups:
    """All texts in one row, one after the other; documents and groups are numbered on."""
    tokens = [text for text, _ in texts]
    lengths = np.cumsum([0, *(text.ids.size for text in tokens)])
    documents = np.cumsum([0, *(int(text.documents.max()) + 1 for text in tokens)])
    groups = np.cumsum([0, *(int(owners.max()) + 1 for _, owners in texts)])

    def word(window: int, place: int) -> str:
        run = int(np.searchsorted(lengths, place, side="right")) - 1
        return tokens[run].text(0, place - int(lengths[run]))

    numbered = [
        np.where(text.documents == PADDING, PADDING, text.documents + start).astype(np.int32)
        for text, start in zip(tokens, documents, strict=False)
    ]
    whole = Tokens(
        np.concatenate([text.ids for text in tokens], axis=1),
        np.concatenate(numbered, axis=1),
        word,
        np.concatenate([text.positions for text in tokens], axis=1),
    )
    owners = np.concatenate([own + start for (_, own), start in zip(texts, groups, strict=False)])
    return ResamplingGroups.grouped(whole, owners, options.bootstrap, options.seed)


def _layer(directories: Sequence[Path], row: int, options: Options) -> LayerSummary:
    views = parse_views(options.views)
    parts = parts_of_views(views)
    merged = merge([load_layer(directory, row, parts) for directory in directories])
    return merged.summary(
        MeasurementPlan(options.top_k, options.svd, views, options.sink_factor, options.resampled)
    )


def _run_facts(runs: Sequence[Analysis], sample: ResamplingGroups) -> dict[str, Any]:
    """The first run's, with what holds of all texts: the worst closure, the mean loss."""
    facts = [run.run for run in runs]
    tokens = [run.run.get("loss_tokens", run.n_calib_tokens) for run in runs]
    return facts[0] | {
        "merged": [
            {key: run[key] for key in ("text_fingerprint", "text", "calibration_loss")} for run in facts
        ],
        "text_fingerprint": sample.tokens.fingerprint,
        "closure_error": max(run["closure_error"] for run in facts),
        "certificate": max(run["certificate"] for run in facts),
        "calibration_loss": float(np.average([run["calibration_loss"] for run in facts], weights=tokens)),
        "loss_tokens": sum(tokens),
        **document_facts(sample.tokens),
    }
