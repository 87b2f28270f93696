"""Merging runs of one model over several texts into one run over all of them."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxdelta.errors import JaxDeltaError, UsageError, plain_errors
from jaxdelta.report.analysis import Analysis
from jaxdelta.run.alike import differences, traits
from jaxdelta.run.collect import collect
from jaxdelta.run.options import Options
from jaxdelta.run.provenance import document_facts
from jaxdelta.spectra.moments.files import RUN, load_layer, load_text
from jaxdelta.spectra.moments.summary import merge
from jaxdelta.spectra.view_summary import LayerSummary, MeasurementPlan
from jaxdelta.spectra.views import parse_views, parts_of_views
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.layer_row import layer_record
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import PADDING, Tokens
from jaxdelta.utils.files import GivenPath, given_path

# What may differ between texts.
_OF_A_TEXT = ("layout", "seq_len", "n_calib_tokens", "text_fingerprint")


def merge_runs(given: Sequence[GivenPath]) -> Analysis:
    """The analysis of all texts together, from the moments in directories that --keep_moments wrote.

    The numbers are those of one run over all texts, except what resampling draws: groups are those of the
    runs.

    Raises:
        UsageError: fewer than two directories.
        JaxDeltaError: one is missing or damaged, or the runs do not match; the message says why.
    """
    directories = [given_path(directory, "runs") for directory in given]
    if len(directories) < 2:
        raise UsageError("runs: at least two are needed")
    runs = [Analysis.load(directory / RUN) for directory in directories]
    with plain_errors(directories[0], {(LookupError, TypeError, AttributeError): "{}: is damaged ({})"}):
        _check_alike(runs, directories)
    first = runs[0]
    options = Options(**first.run["flags"])
    sample = _sample([load_text(directory) for directory in directories], options)
    phases = Phases(tuple(row["phase"] for row in first.per_layer))
    layers = [
        layer_record(index, _layer(directories, index, options), phases, sample, options.top_k, first.hidden)
        for index in range(first.num_layers + 1)
    ]
    return Analysis(
        model=first.model,
        num_layers=first.num_layers,
        hidden=first.hidden,
        n_calib_tokens=sum(run.n_calib_tokens for run in runs),
        run=_run_facts(runs, sample),
        **collect(layers, phases, sample, options),
    )


def _check_alike(runs: Sequence[Analysis], directories: Sequence[Path]) -> None:
    def of_model(run: Analysis) -> dict[str, Any]:
        all_of_them = traits(run) | {"model": run.model, "control": run.run["flags"].get("control")}
        return {name: value for name, value in all_of_them.items() if name not in _OF_A_TEXT}

    for run, directory in zip(runs[1:], directories[1:], strict=True):
        if different := differences(of_model(run), of_model(runs[0])):
            raise JaxDeltaError(f"{directory}: is no run like {directories[0]}: {different}")
    for (i, run), (j, other) in combinations(enumerate(runs), 2):
        if run.run["text_fingerprint"] == other.run["text_fingerprint"]:
            raise JaxDeltaError(f"{directories[j]}: is of the same text as {directories[i]}")


def _sample(texts: Sequence[tuple[Tokens, np.ndarray]], options: Options) -> ResamplingGroups:
    """All texts joined in one row; documents and groups are numbered through."""
    tokens, groups = zip(*texts, strict=True)
    ends = np.cumsum([text.ids.size for text in tokens])

    def word(window: int, place: int) -> str:
        index = int(np.searchsorted(ends, place, side="right"))
        return tokens[index].text(0, place - int(ends[index]) + tokens[index].ids.size)

    whole = Tokens(
        np.concatenate([text.ids for text in tokens], axis=1),
        np.concatenate(_numbered([text.documents for text in tokens]), axis=1),
        word,
        np.concatenate([text.positions for text in tokens], axis=1),
        measured=_measured(tokens),
    )
    group_of_token = np.concatenate(_numbered(groups))
    return ResamplingGroups.grouped(whole, group_of_token, options.bootstrap, options.seed)


def _measured(texts: Sequence[Tokens]) -> np.ndarray | None:
    """The measured tokens of all texts, or None if all are."""
    if all(text.measured is None for text in texts):
        return None
    chosen = [np.ones_like(x.ids, bool) if x.measured is None else x.measured for x in texts]
    return np.concatenate(chosen, axis=1)


def _numbered(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The numbers of each part, those of all parts before it counted first; padding stays."""
    starts = np.cumsum([0, *(int(part.max()) + 1 for part in parts)])
    return [
        np.where(part == PADDING, PADDING, part + start).astype(part.dtype)
        for part, start in zip(parts, starts, strict=False)
    ]


def _layer(directories: Sequence[Path], index: int, options: Options) -> LayerSummary:
    views = parse_views(options.views)
    plan = MeasurementPlan(options.top_k, options.svd, views, options.sink_factor, options.resampled)
    return merge([load_layer(path, index, parts_of_views(views)) for path in directories]).summary(plan)


def _run_facts(runs: Sequence[Analysis], sample: ResamplingGroups) -> dict[str, Any]:
    """The first run's facts, with the worst closure and the mean loss of all texts."""
    facts = [run.run for run in runs]
    tokens = [run.run.get("loss_tokens", run.n_calib_tokens) for run in runs]
    return facts[0] | {
        "merged": [
            {key: run[key] for key in ("text_fingerprint", "text", "calibration_loss")} for run in facts
        ],
        **dict.fromkeys(("text_fingerprint", "original_text_fingerprint"), sample.tokens.fingerprint),
        "closure_error": max(run["closure_error"] for run in facts),
        "certificate": max(run["certificate"] for run in facts),
        "calibration_loss": _mean_loss([run["calibration_loss"] for run in facts], tokens),
        "loss_tokens": sum(tokens),
        **document_facts(sample.tokens),
    }


def _mean_loss(losses: Sequence[float | None], tokens: Sequence[int]) -> float | None:
    """The losses' mean over tokens; None for a model without a head."""
    found = [loss for loss in losses if loss is not None]
    return float(np.average(found, weights=tokens)) if len(found) == len(tokens) else None
