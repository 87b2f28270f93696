"""A layer's row: the figures of each of its views, with intervals, by the names they have in the JSON."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int32

from jaxdelta.calibration import Tokens
from jaxdelta.documents import Groups
from jaxdelta.measure import LayerFigures, ViewFigures
from jaxdelta.significance import cluster_weights, half_weights, t_interval
from jaxdelta.spectrum import (
    effective_rank,
    energy_shares,
    numerical_rank,
    participation_ratio,
    roy_vetterli_rank,
    stable_rank,
    token_statistics,
)

LONG = 4096  # tokens that figures are taken of: of more, an update is not kept, see `pooling`
MAX_WINDOW_GROUPS = 10  # of a long text: each has moments of its own
MAX_GROUPS = 40  # more documents are put together at random: what resampling keeps grows with their number
HALVINGS = 10
OWNERS = 5  # tokens named of those that own σ_1
OWNING_SHARE = 1e-3  # of all tokens: how much of σ_1² they own together

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


@dataclasses.dataclass(frozen=True)
class Sample:
    """The tokens of every update: where they are from, and how their documents are drawn anew.

    `owners` are the tokens' groups: each a document, or several. `draws[b, g]` says how often group g is in
    draw b; there are none without intervals. `windows` are the windows' groups where the text is so long that
    its updates are not kept: then a group is windows that follow each other.
    """

    tokens: Tokens
    owners: Int[np.ndarray, " n"]
    draws: Float64[np.ndarray, "B G"]
    halves: Float64[np.ndarray, "R 2 G"]
    windows: Int32[np.ndarray, " W"] | None = None

    @classmethod
    def of(
        cls, tokens: Tokens, bootstrap: int, seed: int, resampled: bool = True, pooled: bool = False
    ) -> "Sample":
        """Groups of the text's documents, `bootstrap` draws of them, and their divisions into halves; a long
        text, or one to be `pooled` like that, is one group if it is not to be resampled."""
        counted, windows = tokens.counted, None
        owners: np.ndarray
        if pooled or counted.sum() > LONG:
            count = min(MAX_WINDOW_GROUPS, len(counted)) if resampled else 1
            windows = (np.arange(len(counted)) * count // len(counted)).astype(np.int32)
            owners = np.repeat(windows, counted.sum(axis=1))
        else:
            owners = np.unique(tokens.documents[counted], return_inverse=True)[1].reshape(-1)
            count = int(owners.max()) + 1
            if count > MAX_GROUPS:
                order = np.random.default_rng(seed).permutation(count)
                owners, count = order[owners] % MAX_GROUPS, MAX_GROUPS
        draws, halves = cluster_weights(count, bootstrap, seed), half_weights(count, HALVINGS, seed)
        return cls(tokens, owners, draws, halves, windows)

    @property
    def groups(self) -> Groups:
        """What the device needs to know of it."""
        return Groups(self.membership, self.halves)

    @property
    def documents(self) -> int:
        """The number of documents, or groups of them."""
        return self.halves.shape[2]

    @property
    def membership(self) -> Float64[np.ndarray, "G n"]:
        """1 where a token is in a group, else 0."""
        return (self.owners == np.arange(self.documents)[:, None]).astype(np.float64)

    @property
    def without(self) -> Float64[np.ndarray, "G G"]:
        """The draws that have all groups but one."""
        return 1 - np.eye(self.documents)

    @property
    def intervals(self) -> bool:
        """Whether there is anything to draw: of one document there is not."""
        return len(self.draws) > 0 and self.documents > 1

    @cached_property
    def places(self) -> Int[np.ndarray, " n"]:
        """Where the tokens of an update are among all of the text."""
        return np.flatnonzero(self.tokens.counted)


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


def _owners(figures: ViewFigures, sample: Sample) -> dict[str, Any]:
    """The tokens with the largest shares u_i1² of σ_1², and the share of the top thousandth together."""
    if figures.found.owned is None:
        return {"sigma1_tokens": None, "sigma1_top_share": None}
    shares, kept = np.asarray(figures.found.owned), np.flatnonzero(figures.kept)
    order = kept[np.argsort(-shares[kept], kind="stable")]
    together = shares[order[: int(np.ceil(OWNING_SHARE * len(kept)))]].sum()
    return {
        "sigma1_tokens": [_token(sample, int(i)) | {"share": float(shares[i])} for i in order[:OWNERS]],
        "sigma1_top_share": float(together),
    }


def _token(sample: Sample, row: int) -> dict[str, Any]:
    """The token in this row of an update."""
    position, tokens = int(sample.places[row]), sample.tokens
    where = divmod(position, tokens.ids.shape[1])
    return {"token": tokens.text(*where), "position": position, "document": int(tokens.documents[where])}


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
