"""A layer's row: the figures of each of its views, with intervals, by the names they have in the JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxdelta.spectra.group_moments import leave_one_out, split_half_cosines
from jaxdelta.spectra.view_summary import COMPARED_VIEWS, LayerSummary, ViewSummary
from jaxdelta.spectra.views import View
from jaxdelta.statistics.across_layers.phases import Phases
from jaxdelta.statistics.intervals import t_interval
from jaxdelta.statistics.per_layer.ranks import (
    effective_rank,
    energy_shares,
    numerical_rank,
    participation_ratio,
    roy_vetterli_rank,
    stable_rank,
)
from jaxdelta.statistics.per_layer.sigma1_owners import _owners
from jaxdelta.statistics.per_layer.token_norms import token_statistics
from jaxdelta.text.groups import Sample

# What is missing where a token's own figures are.
TOKENWISE = (
    "frob",
    "token_norm_mean",
    "token_norm_std",
    "h_norm_mean",
    "rel_step_mean",
    "rel_step_std",
    "parallel_frac",
    "cos_delta_h_mean",
)

# The figures with an interval, and the scale on which they are taken to be symmetric about it.
SCALES = {
    "token_norm_mean": "log",
    "h_norm_mean": "log",
    "rel_step_mean": "log",
    "cos_delta_h_mean": "linear",
    "parallel_frac": "unit",
    "eff_rank": "log",
    "top1_frac": "unit",
    "top3_frac": "unit",
    "top10_frac": "unit",
    "gamma": "log",
}


def layer_row(
    layer: int, phase: str, figures: LayerSummary, sample: Sample, k: int, hidden: int
) -> dict[str, Any]:
    """The row of a layer: its raw figures, the other views' under their names, and its energy ledger."""
    row: dict[str, Any] = {"L": layer, "phase": phase}
    several = {id(found): found for found in figures.views.values()}  # without sinks, masked is unmasked
    rows = dict(zip(several, view_rows([*several.values()], sample, k, hidden), strict=True))
    for view, found in figures.views.items():
        place = row
        for name in view.path:
            place = place.setdefault(name, {})
        place |= rows[id(found)]
        if view.masked:
            place["sinks_left"] = found.sinks_left or 0
    return row | {"ledger": _ledger(figures.energies)}


def view_rows(views: Sequence[ViewSummary], sample: Sample, k: int, hidden: int) -> list[dict[str, Any]]:
    """The figures of each view; those of the same tokens together, for each by itself is little work."""
    counts = [np.bincount(sample.owners[view.kept], minlength=sample.documents) for view in views]
    alike: dict[Any, list[int]] = {}
    for place, view in enumerate(views):
        alike.setdefault((counts[place].tobytes(), view.products is None), []).append(place)
    rows: dict[int, dict[str, Any]] = {}
    for places in alike.values():
        found = _rows([views[place] for place in places], sample, counts[places[0]], k, hidden)
        rows |= zip(places, found, strict=True)
    return [rows[place] for place in range(len(views))]


def _rows(
    views: Sequence[ViewSummary], sample: Sample, counts: Int[np.ndarray, " G"], k: int, hidden: int
) -> list[dict[str, Any]]:
    """The figures of views that have so many tokens of each group."""
    values = np.stack([view.singular_values for view in views])
    drawn = sample.intervals and np.count_nonzero(counts) > 1
    found = _statistics(views, values, sample, counts if drawn else None)
    figures = records(
        {name: of[:, 0] for name, of in found.items() if name != "gamma"}
        | {
            "top_singvals": values[:, :k],
            "roy_vetterli_rank": roy_vetterli_rank(values),
            "participation_ratio": participation_ratio(values),
            "stable_rank": stable_rank(values),
        }
    )
    intervals = _intervals(found) if drawn else [None] * len(views)
    each = zip(views, figures, intervals, strict=True)
    return [_row(view, of, bounds, sample, counts, hidden) for view, of, bounds in each]


def _row(
    view: ViewSummary,
    figures: dict[str, Any],
    intervals: dict[str, list[float]] | None,
    sample: Sample,
    counts: Int[np.ndarray, " G"],
    hidden: int,
) -> dict[str, Any]:
    values, n = view.singular_values, int(counts.sum())
    rank = numerical_rank(values)
    row: dict[str, Any] = dict.fromkeys(TOKENWISE)
    row |= figures
    row |= {
        "sigma1_over_sigma2": float(values[0] / values[1]) if rank > 1 else None,
        "mean_share": _share(float(view.mean_energy), row["frob"] ** 2),
        "n": n,
        "n_over_d": n / hidden,
    }
    if view.group_moments is not None:
        halves = split_half_cosines(view.group_moments, sample.halves)
        halves = halves[np.isfinite(halves)]
        row["split_half_cos"] = float(halves.mean()) if rank and halves.size else None
        row |= _owners(view, sample) if rank else {"sigma1_tokens": [], "sigma1_top_share": None}
    if rank and intervals:
        row["intervals"] = intervals
    if notes := _notes(view, n, rank, int(np.count_nonzero(counts)), len(figures["top_singvals"])):
        row["note"] = notes
    return row


def records(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns of a table, arrays, as entries of the JSON, one for each row."""
    lists = (np.asarray(column).tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _statistics(
    views: Sequence[ViewSummary],
    values: Float64[np.ndarray, "V r"],
    sample: Sample,
    counts: Int[np.ndarray, " G"] | None,
) -> dict[str, Float64[np.ndarray, "V B"]]:
    """Everything that has an interval, and the rest of the reference's figures: of the text, and then, where
    its groups' `counts` of tokens are given, without each group that has any, energies scaled to all tokens.
    """
    weights, energies = np.ones((1, sample.documents)), np.square(values)[:, None]
    if counts is not None:
        there = counts > 0
        scale = (counts.sum() / (counts.sum() - counts[there]))[:, None]
        without = [_without_groups(view)[there] * scale for view in views]
        weights = np.concatenate([weights, sample.without[there]])
        energies = np.concatenate([energies, np.stack(without)], axis=1)
    values = np.sqrt(energies)
    shares = energy_shares(values)
    tokenwise = {"frob": np.sqrt(energies.sum(axis=-1))}
    products = [(of, sample.owners[view.kept]) for view in views if (of := view.kept_products) is not None]
    if products:
        each = [token_statistics(of, owners, weights) for of, owners in products]
        tokenwise = {name: np.stack([of[name] for of in each]) for name in each[0]}
    return {
        **tokenwise,
        "eff_rank": effective_rank(values),
        **{f"top{m}_frac": shares[..., :m].sum(axis=-1) for m in (1, 3, 10)},
        "gamma": values[..., 0],
    }


def _intervals(found: dict[str, Float64[np.ndarray, "V B"]]) -> list[dict[str, list[float]]]:
    """95 % intervals of every view's figures from what they are without each document."""
    names = [name for name in SCALES if name in found]
    figures = np.stack([found[name] for name in names])
    bounds = t_interval(figures[..., 0], figures[..., 1:], [SCALES[name] for name in names])
    return records(dict(zip(names, np.stack(bounds, axis=-1), strict=True)))


def _ledger(energies: dict[str, float]) -> dict[str, float]:
    """‖attention‖_F², ‖mlp‖_F², 2<attention, mlp>, ‖δ‖_F², and how far the first three miss the last."""
    parts = {name: energies[name] for name in ("attention", "mlp", "cross", "update")}
    missing = abs(parts["attention"] + parts["mlp"] + parts["cross"] - parts["update"])
    return parts | {"closure": _share(missing, parts["update"])}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _without_groups(view: ViewSummary) -> Float64[np.ndarray, "G r"]:
    """σ² of the view without each group."""
    assert view.group_moments is not None and view.group_rest is not None
    return leave_one_out(view.singular_values, view.group_moments, view.group_rest)


def _notes(figures: ViewSummary, n: int, rank: int, documents: int, k: int) -> str:
    """Why figures are missing; k directions are kept."""
    left = figures.sinks_left or 0
    reasons = {
        "no token's own figures: the mean is known only when all tokens have passed": figures.products
        is None,
        "owners of sigma1 unknown: v_1 differs from that of the text's beginning": figures.sigma1_shares
        is None,
        "zero update: it has no directions": rank == 0,
        "one direction: no sigma2": rank == 1,
        f"rank {rank}: the directions beyond it are zero": 0 < rank < k,
        f"only {n} token{'s' * (n != 1)}": n < 3,
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
    number: int, layer: LayerSummary, phases: Phases, sample: Sample, k: int, hidden: int
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
