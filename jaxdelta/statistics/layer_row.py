"""A layer's row: the figures of each of its views, with intervals, by the names they have in the JSON."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxdelta.spectra.view_summary import CROSSED, LayerFigures, ViewFigures
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
    layer: int, phase: str, figures: LayerFigures, sample: Sample, k: int, hidden: int
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
    return row | ({"ledger": _ledger(figures.ledger)} if figures.ledger else {})


def view_rows(views: Sequence[ViewFigures], sample: Sample, k: int, hidden: int) -> list[dict[str, Any]]:
    """The figures of each view; those of the same tokens together, for each by itself is little work."""
    counts = [np.bincount(sample.owners[view.kept], minlength=sample.documents) for view in views]
    alike: dict[Any, list[int]] = {}
    for place, view in enumerate(views):
        alike.setdefault((counts[place].tobytes(), view.found.products is None), []).append(place)
    rows: dict[int, dict[str, Any]] = {}
    for places in alike.values():
        found = _rows([views[place] for place in places], sample, counts[places[0]], k, hidden)
        rows |= zip(places, found, strict=True)
    return [rows[place] for place in range(len(views))]


def _rows(
    views: Sequence[ViewFigures], sample: Sample, counts: Int[np.ndarray, " G"], k: int, hidden: int
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
    view: ViewFigures,
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
        "mean_share": _share(float(view.found.mean_energy), row["frob"] ** 2),
        "n": n,
        "n_over_d": n / hidden,
    }
    if view.found.resampled is not None:
        halves = view.found.resampled.split_half
        halves = halves[np.isfinite(halves)]
        row["split_half_cos"] = float(halves.mean()) if rank and halves.size else None
        row |= _owners(view, sample) if rank else {"sigma1_tokens": [], "sigma1_top_share": None}
    if rank and intervals:
        row["intervals"] = intervals
    if notes := _notes(view, n, rank, int(np.count_nonzero(counts))):
        row["note"] = notes
    return row


def records(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns of a table, arrays, as entries of the JSON, one for each row."""
    lists = (np.asarray(column).tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _statistics(
    views: Sequence[ViewFigures],
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
        without = [view.found.resampled.without[there] * scale for view in views if view.found.resampled]
        weights = np.concatenate([weights, sample.without[there]])
        energies = np.concatenate([energies, np.stack(without)], axis=1)
    values = np.sqrt(energies)
    shares = energy_shares(values)
    tokenwise = {"frob": np.sqrt(energies.sum(axis=-1))}
    products = [(of, sample.owners[view.kept]) for view in views if (of := view.products) is not None]
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


def _notes(figures: ViewFigures, n: int, rank: int, documents: int) -> str:
    """Why figures are missing."""
    reasons = {
        "no token's own figures: the mean is known only when all tokens have passed": figures.products
        is None,
        "owners of sigma1 unknown: v_1 differs from that of the text's beginning": figures.found.owned
        is None,
        "zero update: it has no directions": rank == 0,
        "one direction: no sigma2": rank == 1,
        f"only {n} token{'s' * (n != 1)}": n < 3,
        "one document: no halves, no intervals": documents == 1,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


class Described(NamedTuple):
    """A layer's row, empty where a figure is not `finite`; its views that are compared, without what is of
    tokens or documents; the largest defect of its spectra, and whether NumPy had to do one again."""

    row: dict[str, Any]
    views: dict[View, ViewFigures]
    finite: bool
    defect: float
    on_host: bool


def described(
    layers: Iterable[LayerFigures], phases: Phases, sample: Sample, k: int, hidden: int
) -> Iterator[Described]:
    """Every layer, and the last one normed, which has the last one's place."""
    last = len(phases.of_layer) - 1
    for number, figures in enumerate(layers):
        index, every = min(number, last), list(figures.views.values())
        finite = all(view.finite for view in every)
        yield Described(
            layer_row(index, phases.of_layer[index], figures, sample, k, hidden) if finite else {},
            _compared(figures.views),
            finite,
            max(view.defect for view in every),
            any(view.on_host for view in every),
        )


def _compared(views: dict[View, ViewFigures]) -> dict[View, ViewFigures]:
    """What is one object stays one: without sinks the masked view is the raw one."""
    lighter: dict[int, ViewFigures] = {}
    for figures in views.values():
        found = figures.found._replace(products=None, owned=None, resampled=None)
        lighter[id(figures)] = replace(figures, found=found, kept=np.zeros(0, bool))
    return {view: lighter[id(figures)] for view, figures in views.items() if view in CROSSED}
