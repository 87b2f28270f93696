"""A layer's row of the JSON: the registered statistics of each of its views, with intervals."""

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
    """A layer's row: the raw view's statistics, the other views' under their names, the energy ledger."""
    row: dict[str, Any] = {"L": index, "phase": phase}
    several = {id(summary): summary for summary in layer.views.values()}  # without sinks masked is unmasked
    rows = dict(zip(several, view_rows([*several.values()], sample, k, hidden), strict=True))
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
    """The statistics of each view; views of the same tokens are computed together, which is faster."""
    counts = [np.bincount(sample.group_of_token[view.kept], minlength=sample.documents) for view in views]
    alike: dict[Any, list[int]] = {}
    for index, view in enumerate(views):
        alike.setdefault((counts[index].tobytes(), view.products is None), []).append(index)
    rows: dict[int, dict[str, Any]] = {}
    for indices in alike.values():
        these = _rows([views[index] for index in indices], sample, counts[indices[0]], k, hidden)
        rows |= zip(indices, these, strict=True)
    return [rows[index] for index in range(len(views))]


def _rows(
    views: Sequence[ViewSummary], sample: ResamplingGroups, counts: Int[np.ndarray, " G"], k: int, hidden: int
) -> list[dict[str, Any]]:
    """The statistics of views with these numbers of tokens in each group."""
    drawn = sample.intervals and np.count_nonzero(counts) > 1
    left_out = np.flatnonzero(counts) if drawn else np.zeros(0, int)  # groups, one at a time
    data = [_view_data(view, sample, left_out, k, hidden) for view in views]
    columns = _columns(data, _spectra(views, counts, left_out))
    values = records({name: column[:, 0] for name, column in columns.items()})
    intervals = _intervals(columns) if drawn else [{}] * len(views)
    documents = int(np.count_nonzero(counts))
    each = zip(data, values, intervals, strict=True)
    return [_row(view, computed, bounds, documents) for view, computed, bounds in each]


def _view_data(
    view: ViewSummary, sample: ResamplingGroups, left_out: Int[np.ndarray, " L"], k: int, hidden: int
) -> ViewData:
    """The view as statistics take it: all that they know of how spectra and text keep things."""
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
    """Singular values of the text, and without each group, energies then scaled to all tokens."""
    whole = np.stack([view.singular_values for view in views])[:, None]
    if not left_out.size:
        return whole
    scale = (counts.sum() / (counts.sum() - counts[left_out]))[:, None]
    without = [_without_groups(view)[left_out] * scale for view in views]
    return np.concatenate([whole, np.sqrt(np.stack(without))], axis=1)


def _without_groups(view: ViewSummary) -> Float64[np.ndarray, "G r"]:
    """σ² of the view without each group."""
    assert view.group_moments is not None and view.group_rest is not None
    return leave_one_out(view.singular_values, view.group_moments, view.group_rest)


def _columns(
    data: Sequence[ViewData], spectra: Float64[np.ndarray, "V B r"]
) -> dict[str, Float64[np.ndarray, "V B"]]:
    """The statistics of tokens and spectrum in every view: of the text, and without each group."""
    columns = {
        one.name: one.function(spectra if one.interval else spectra[:, :1]) for one in registered("spectrum")
    }
    tables = [view.tokens for view in data]
    if None not in tables:
        for one in registered("tokens"):
            columns[one.name] = np.stack([one.function(table) for table in tables])
    return columns


def _intervals(columns: dict[str, Float64[np.ndarray, "V B"]]) -> list[dict[str, list[float]]]:
    """95 % intervals of every view's statistics from their values without each group."""
    scales = {one.name: one.interval for one in registered() if one.interval and one.name in columns}
    values = np.stack([columns[name] for name in scales])
    bounds = t_interval(values[..., 0], values[..., 1:], [*scales.values()])
    return records(dict(zip(scales, np.stack(bounds, axis=-1), strict=True)))


def _row(
    view: ViewData, computed: dict[str, float], intervals: dict[str, list[float]], documents: int
) -> dict[str, Any]:
    """A view's entry of the JSON; null where tokens are unknown, without what nothing is given for."""
    row: dict[str, Any] = {}
    for one in registered():
        if one.needs in ("tokens", "spectrum"):
            if one.first_of is None:
                row[one.name] = computed.get(one.name)
        elif (given := view.given(one.needs)) is not None:
            row[one.name] = one.function(given)
    rank = numerical_rank(view.singular_values)
    if rank and intervals:
        row["intervals"] = intervals
    if notes := _notes(view, rank, documents):
        row["note"] = notes
    return row


def records(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns of a table, arrays, as entries of the JSON, one for each row."""
    lists = (np.asarray(column).tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _ledger(energies: dict[str, float]) -> dict[str, float]:
    """‖attention‖_F², ‖mlp‖_F², 2<attention, mlp>, ‖δ‖_F², and how far the first three miss the last."""
    parts = {name: energies[name] for name in ("attention", "mlp", "cross", "update")}
    missing = abs(parts["attention"] + parts["mlp"] + parts["cross"] - parts["update"])
    return parts | {"closure": float(missing / parts["update"]) if parts["update"] else 0.0}


def _notes(view: ViewData, rank: int, documents: int) -> str:
    """Why statistics are missing, or not what they should be."""
    left = view.sinks_left
    reasons = {
        "no token's own figures: the mean is known only when all tokens have passed": view.tokens is None,
        "owners of sigma1 unknown: v_1 differs from that of the text's beginning": view.sigma1_shares is None,
        "zero update: it has no directions": rank == 0,
        "one direction: no sigma2": rank == 1,
        f"rank {rank}: the directions beyond it are zero": 0
        < rank
        < min(view.top_k, len(view.singular_values)),
        f"only {view.n} token{'s' * (view.n != 1)}": view.n < 3,
        "one document: no halves, no intervals": documents == 1,
        f"{left} sink{'s' * (left != 1)} left in: not set aside in time": left > 0,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


class LayerRecord(NamedTuple):
    """What is kept of a layer while the others pass: its JSON row and the summaries of its compared views.

    `row` is empty where a statistic is not `finite`; `views` have no arrays of tokens or groups' moments;
    `certificate` is the largest of its spectra; `on_host`: NumPy computed one of them again.
    """

    row: dict[str, Any]
    views: dict[View, ViewSummary]
    finite: bool
    certificate: float
    on_host: bool


def layer_record(
    number: int, layer: LayerSummary, phases: Phases, sample: ResamplingGroups, k: int, hidden: int
) -> LayerRecord:
    """The record of a layer; the last layer normed comes after the last, in its place."""
    index = min(number, len(phases.of_layer) - 1)
    views = list(layer.views.values())
    finite = all(view.finite for view in views)
    return LayerRecord(
        layer_row(index, phases.of_layer[index], layer, sample, k, hidden) if finite else {},
        _for_comparison(layer.views),
        finite,
        max(float(view.certificate) for view in views),
        any(bool(view.on_host) for view in views),
    )


def _for_comparison(views: dict[View, ViewSummary]) -> dict[View, ViewSummary]:
    """The compared views; one object stays one: without sinks the masked view is the raw one."""
    lighter = {id(summary): summary.for_comparison() for summary in views.values()}
    return {view: lighter[id(summary)] for view, summary in views.items() if view in COMPARED_VIEWS}
