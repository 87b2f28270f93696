"""A layer's row: the figures of each of its views, with intervals, by the names they have in the JSON."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from jaxdelta.calibration import Tokens
from jaxdelta.figures import Groups
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

MAX_GROUPS = 40  # more documents are put together at random: what resampling keeps grows with their number
HALVINGS = 10
OWNERS = 5  # tokens named of those that own σ_1
OWNING_SHARE = 1e-3  # of all tokens: how much of σ_1² they own together

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

    `draws[b, g]` says how often group g is in draw b; there are none without intervals. `without[g]` is
    the draw that has all groups but g.
    """

    tokens: Tokens
    membership: Float64[np.ndarray, "G n"]
    draws: Float64[np.ndarray, "B G"]
    halves: Float64[np.ndarray, "R 2 G"]

    @classmethod
    def of(cls, tokens: Tokens, bootstrap: int, seed: int) -> "Sample":
        """Groups of the text's documents, `bootstrap` draws of them, and their divisions into halves."""
        owners = np.unique(tokens.documents[:, 1:], return_inverse=True)[1].reshape(-1)
        count = int(owners.max()) + 1
        if count > MAX_GROUPS:
            order = np.random.default_rng(seed).permutation(count)
            owners, count = order[owners] % MAX_GROUPS, MAX_GROUPS
        membership = (owners == np.arange(count)[:, None]).astype(np.float64)
        draws = cluster_weights(count, bootstrap, seed)
        return cls(tokens, membership, draws, half_weights(count, HALVINGS, seed))

    @property
    def groups(self) -> Groups:
        """What the device needs to know of it."""
        return Groups(self.membership, self.halves)

    @property
    def documents(self) -> int:
        """The number of documents, or groups of them."""
        return len(self.membership)

    @property
    def without(self) -> Float64[np.ndarray, "G G"]:
        return 1 - np.eye(self.documents)

    @property
    def intervals(self) -> bool:
        """Whether there is anything to draw: of one document there is not."""
        return len(self.draws) > 0 and self.documents > 1


def layer_row(
    layer: int, phase: str, figures: LayerFigures, sample: Sample, k: int, hidden: int
) -> dict[str, Any]:
    """The row of a layer: its raw figures, the other views' under their names, and its energy ledger."""
    row: dict[str, Any] = {"L": layer, "phase": phase}
    same: dict[int, dict[str, Any]] = {}  # without sinks, a masked view is the unmasked one
    for view, found in figures.views.items():
        place = row
        for name in view.path:
            place = place.setdefault(name, {})
        if id(found) not in same:
            same[id(found)] = view_row(found, sample, k, hidden)
        place |= same[id(found)]
    return row | ({"ledger": _ledger(figures.ledger)} if figures.ledger else {})


def view_row(figures: ViewFigures, sample: Sample, k: int, hidden: int) -> dict[str, Any]:
    """The figures of a view."""
    kept, values = figures.kept, figures.singular_values
    n, rank = int(kept.sum()), numerical_rank(values)
    documents = int(sample.membership[:, kept].any(axis=1).sum())
    point = _statistics(figures, np.ones((1, n)), np.square(values)[None])
    row: dict[str, Any] = {name: float(found[0]) for name, found in point.items() if name != "gamma"}
    row |= {
        "top_singvals": values[:k].tolist(),
        "roy_vetterli_rank": float(roy_vetterli_rank(values)),
        "participation_ratio": float(participation_ratio(values)),
        "stable_rank": float(stable_rank(values)),
        "sigma1_over_sigma2": float(values[0] / values[1]) if rank > 1 else None,
        "mean_share": _share(float(figures.found.mean_energy), row["frob"] ** 2),
        "n": n,
        "n_over_d": n / hidden,
    }
    if figures.found.resampled is not None:
        halves = figures.found.resampled.split_half
        halves = halves[np.isfinite(halves)]
        row["split_half_cos"] = float(halves.mean()) if rank and halves.size else None
        row |= _owners(figures, sample.tokens) if rank else {"sigma1_tokens": [], "sigma1_top_share": None}
    if sample.intervals and rank and documents > 1:
        row["intervals"] = _intervals(figures, sample, point)
    if notes := _notes(n, rank, documents):
        row["note"] = notes
    return row


def _statistics(
    figures: ViewFigures, weights: Float64[np.ndarray, "B kept"], energies: Float64[np.ndarray, "B r"]
) -> dict[str, Float64[np.ndarray, " B"]]:
    """Everything that has an interval, and the rest of the reference's figures, under weights of tokens."""
    values = np.sqrt(energies)
    shares = energy_shares(values)
    return {
        **token_statistics(figures.products, weights),
        "eff_rank": effective_rank(values),
        **{f"top{m}_frac": shares[:, :m].sum(axis=1) for m in (1, 3, 10)},
        "gamma": values[:, 0],
    }


def _intervals(
    figures: ViewFigures, sample: Sample, point: dict[str, Float64[np.ndarray, "1"]]
) -> dict[str, list[float]]:
    """95 % intervals by leaving out each document that has tokens here; energies scaled to all tokens."""
    assert figures.found.resampled is not None
    membership = sample.membership[:, figures.kept]
    there = membership.any(axis=1)
    weights = 1 - membership[there]
    energies = figures.found.resampled.without[there]
    energies = energies * (weights.shape[1] / weights.sum(axis=1, keepdims=True))
    without = _statistics(figures, weights, energies)
    found: dict[str, list[float]] = {}
    for scale in dict.fromkeys(SCALES.values()):
        names = [name for name in SCALES if SCALES[name] == scale]
        estimates, moved = (np.stack([of[name] for name in names]) for of in (point, without))
        bounds = t_interval(estimates[:, 0], moved, scale)
        found |= dict(zip(names, np.stack(bounds, axis=1).tolist(), strict=True))
    return {name: found[name] for name in SCALES}


def _owners(figures: ViewFigures, tokens: Tokens) -> dict[str, Any]:
    """The tokens with the largest shares u_i1² of σ_1², and the share of the top thousandth together."""
    shares, kept = figures.found.owned, np.flatnonzero(figures.kept)
    order = kept[np.argsort(-shares[kept], kind="stable")]
    together = shares[order[: int(np.ceil(OWNING_SHARE * len(kept)))]].sum()
    return {
        "sigma1_tokens": [_token(tokens, int(i)) | {"share": float(shares[i])} for i in order[:OWNERS]],
        "sigma1_top_share": float(together),
    }


def _token(tokens: Tokens, row: int) -> dict[str, Any]:
    """The token in this row of an update: windows one after the other, each without its first."""
    window, place = divmod(row, tokens.ids.shape[1] - 1)
    where: Int[np.ndarray, "2"] = np.array([window, place + 1])
    return {
        "token": tokens.text(*map(int, where)),
        "position": int(where @ [tokens.ids.shape[1], 1]),
        "document": int(tokens.documents[tuple(where)]),
    }


def _ledger(energies: dict[str, float]) -> dict[str, float]:
    """‖attention‖_F², ‖mlp‖_F², 2<attention, mlp>, ‖δ‖_F², and how far the first three miss the last."""
    parts = {name: energies[name] for name in ("attention", "mlp", "cross", "update")}
    missing = abs(parts["attention"] + parts["mlp"] + parts["cross"] - parts["update"])
    return parts | {"closure": _share(missing, parts["update"])}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _notes(n: int, rank: int, documents: int) -> str:
    """Why figures are missing."""
    reasons = {
        "zero update: it has no directions": rank == 0,
        "one direction: no sigma2": rank == 1,
        f"only {n} token{'s' * (n != 1)}": n < 3,
        "one document: no halves, no intervals": documents == 1,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)
