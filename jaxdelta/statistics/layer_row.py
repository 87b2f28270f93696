"""The JSON row of a layer: the registered statistics of its views, with intervals."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxdelta.spectra.group_moments import leave_one_out, split_half_cosines
from jaxdelta.spectra.view_summary import COMPARED_VIEWS, LayerSummary, ViewSummary
from jaxdelta.spectra.views import View
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.intervals import t_interval
from jaxdelta.statistics.per_layer.inputs import TokenTable, ViewData
from jaxdelta.statistics.per_layer.ranks import numerical_rank
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.text.groups import ResamplingGroups


def layer_row(
    index: int, phase: str, layer: LayerSummary, sample: ResamplingGroups, k: int, hidden: int
) -> dict[str, Any]:
    """The raw view's statistics, the other views' nested under their names, and the energy ledger."""
    row: dict[str, Any] = {"L": index, "phase": phase}
    summaries = {id(summary): summary for summary in layer.views.values()}  # views may share one
    rows = dict(zip(summaries, view_rows([*summaries.values()], sample, k, hidden), strict=True))
    for view, summary in layer.views.items():
        nested = row
        for name in view.path:
            nested = nested.setdefault(name, {})
        nested |= rows[id(summary)]
        if view.masked:
            nested["sinks_left"] = summary.sinks_left or 0
    return row | {"ledger": _ledger(layer.energies)}


def view_rows(
    views: Sequence[ViewSummary], sample: ResamplingGroups, k: int, hidden: int
) -> list[dict[str, Any]]:
    """The statistics of each view; views of the same tokens are batched for speed."""
    counts = [np.bincount(sample.group_of_token[view.kept], minlength=sample.documents) for view in views]
    batches: dict[Any, list[int]] = {}
    for index, view in enumerate(views):
        batches.setdefault((counts[index].tobytes(), view.products is None), []).append(index)
    rows: dict[int, dict[str, Any]] = {}
    for indices in batches.values():
        batch = _rows([views[index] for index in indices], sample, counts[indices[0]], k, hidden)
        rows |= zip(indices, batch, strict=True)
    return [rows[index] for index in range(len(views))]


def _rows(
    views: Sequence[ViewSummary], sample: ResamplingGroups, counts: Int[np.ndarray, " G"], k: int, hidden: int
) -> list[dict[str, Any]]:
    """Statistics of views that share the token counts of the groups."""
    documents = int(np.count_nonzero(counts))
    resampled = sample.intervals and documents > 1
    left_out = np.flatnonzero(counts) if resampled else np.zeros(0, int)  # groups, one at a time
    data = [_view_data(view, sample, left_out, k, hidden) for view in views]
    columns = _columns(data, _spectra(views, counts, left_out))
    values = records({name: column[:, 0] for name, column in columns.items()})
    intervals = _intervals(columns) if resampled else [{}] * len(views)
    return [_row(*of_view, documents) for of_view in zip(data, values, intervals, strict=True)]


def _view_data(
    view: ViewSummary, sample: ResamplingGroups, left_out: Int[np.ndarray, " L"], k: int, hidden: int
) -> ViewData:
    """The view in the form that statistics take."""
    tokens, half_cosines, kept = None, None, np.asarray(view.kept)
    if view.group_moments is not None:
        half_cosines = split_half_cosines(view.group_moments, sample.halves)
    if (products := view.kept_products) is not None:
        weights = np.concatenate([np.ones((1, sample.documents)), sample.without[left_out]])
        tokens = TokenTable(*products, sample.group_of_token[kept], weights)
    return ViewData(
        singular_values=view.singular_values,
        tokens=tokens,
        channels=view.channels,
        mean_energy=float(view.mean_energy),
        n=int(np.count_nonzero(kept)),
        hidden=hidden,
        top_k=k,
        half_cosines=half_cosines,
        sigma1_shares=view.sigma1_shares,
        kept=kept,
        sinks_left=view.sinks_left or 0,
        token_at=partial(_token_at, sample),
    )


def _token_at(sample: ResamplingGroups, row: int) -> dict[str, Any]:
    position, tokens = int(sample.places[row]), sample.tokens
    where = divmod(position, tokens.ids.shape[1])
    return {"token": tokens.text(*where), "position": position, "document": int(tokens.documents[where])}


def _spectra(
    views: Sequence[ViewSummary], counts: Int[np.ndarray, " G"], left_out: Int[np.ndarray, " L"]
) -> Float64[np.ndarray, "V B r"]:
    """Singular values of the text, then without each group, rescaled to the energy of all tokens."""
    whole = np.stack([view.singular_values for view in views])[:, None]
    if not left_out.size:
        return whole
    scale = (counts.sum() / (counts.sum() - counts[left_out]))[:, None]
    without = []
    for view in views:
        assert view.group_moments is not None and view.group_rest is not None
        energies = leave_one_out(view.singular_values, view.group_moments, view.group_rest)
        without.append(energies[left_out] * scale)
    return np.concatenate([whole, np.sqrt(np.stack(without))], axis=1)


def _columns(
    data: Sequence[ViewData], spectra: Float64[np.ndarray, "V B r"]
) -> dict[str, Float64[np.ndarray, "V _"]]:
    """Statistics of tokens and spectrum in every view, of the whole text and without each group."""
    columns = {}
    for entry in registered("spectrum"):
        columns[entry.name] = entry.function(spectra if entry.interval else spectra[:, :1])
    tables = [view.tokens for view in data]
    if None not in tables:
        for entry in registered("tokens"):
            columns[entry.name] = np.stack([entry.function(table) for table in tables])
    return columns


def _intervals(columns: dict[str, Float64[np.ndarray, "V _"]]) -> list[dict[str, list[float]]]:
    """95 % intervals of every view's statistics, by the jackknife over groups."""
    scales = {
        entry.name: entry.interval for entry in registered() if entry.interval and entry.name in columns
    }
    values = np.stack([columns[name] for name in scales])
    bounds = t_interval(values[..., 0], values[..., 1:], [*scales.values()])
    return records(dict(zip(scales, np.stack(bounds, axis=-1), strict=True)))


def _row(
    view: ViewData, computed: dict[str, float], intervals: dict[str, list[float]], documents: int
) -> dict[str, Any]:
    """The JSON entry of a view; statistics of unknown tokens are null."""
    row: dict[str, Any] = {}
    for entry in registered():
        if entry.needs in ("tokens", "spectrum"):
            if entry.first_of is None:
                row[entry.name] = computed.get(entry.name)
        elif (given := view.given(entry.needs)) is not None:
            row[entry.name] = entry.function(given)
    rank = numerical_rank(view.singular_values)
    if rank and intervals:
        row["intervals"] = intervals
    if notes := _notes(view, rank, documents):
        row["note"] = notes
    return row


def records(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table, given its columns as arrays."""
    lists = (np.asarray(column).tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _ledger(energies: dict[str, float]) -> dict[str, float]:
    """‖attention‖_F², ‖mlp‖_F², 2⟨attention, mlp⟩, ‖δ‖_F², and the relative error of their sum."""
    parts = {name: energies[name] for name in ("attention", "mlp", "cross", "update")}
    missing = abs(parts["attention"] + parts["mlp"] + parts["cross"] - parts["update"])
    return parts | {"closure": float(missing / parts["update"]) if parts["update"] else 0.0}


def _notes(view: ViewData, rank: int, documents: int) -> str:
    """Reasons why statistics are missing or unreliable."""
    left = view.sinks_left
    reasons = {
        "no per-token statistics: the mean is known only after the last token": view.tokens is None,
        "owners of sigma1 unknown: v_1 differs from that of the text's beginning": view.sigma1_shares is None,
        "zero update: it has no directions": rank == 0,
        "one direction: no sigma2": rank == 1,
        f"rank {rank}: the directions beyond it are zero": 1 < rank < min(view.top_k, view.n, view.hidden),
        f"only {view.n} token{'s' * (view.n != 1)}": view.n < 3,
        "one document: no halves, no intervals": documents == 1,
        f"{left} sink{'s' * (left != 1)} left in: not set aside in time": left > 0,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


class LayerRecord(NamedTuple):
    """The part of a layer that outlives its measurement: its JSON row and the summaries to be compared.

    Attributes:
        row: the JSON row, empty if a statistic is not finite.
        views: summaries of the compared views, without arrays of tokens or groups' moments.
        finite: whether all statistics are.
        certificate: the largest residual of its spectra.
        on_host: whether NumPy recomputed a spectrum.
    """

    row: dict[str, Any]
    views: dict[View, ViewSummary]
    finite: bool
    certificate: float
    on_host: bool


def layer_record(
    number: int, layer: LayerSummary, phases: Phases, sample: ResamplingGroups, k: int, hidden: int
) -> LayerRecord:
    """The record of a layer; number N is the last layer again, after the final norm."""
    index = min(number, len(phases.of_layer) - 1)
    summaries = layer.views.values()
    finite = all(summary.finite for summary in summaries)
    compared = {id(summary): summary.for_comparison() for summary in summaries}  # shared ones stay shared
    return LayerRecord(
        layer_row(index, phases.of_layer[index], layer, sample, k, hidden) if finite else {},
        {view: compared[id(summary)] for view, summary in layer.views.items() if view in COMPARED_VIEWS},
        finite,
        max(float(summary.certificate) for summary in summaries),
        any(bool(summary.on_host) for summary in summaries),
    )
