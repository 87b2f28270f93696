"""The tokens that hold most of σ_1²."""

from typing import Any

import numpy as np

from jaxdelta.statistics.per_layer.inputs import ViewData
from jaxdelta.statistics.per_layer.ranks import numerical_rank
from jaxdelta.statistics.per_layer.registry import statistic

NAMED = 5  # tokens
TOP_SHARE = 1e-3  # of all tokens


@statistic("sigma1_tokens", needs="documents", label="tokens that own σ₁", range=(0, 1), figure=None)
def sigma1_tokens(view: ViewData) -> list[dict[str, Any]] | None:
    """The five tokens with the largest u_i1², their share of σ_1²: text, position, document."""
    if not numerical_rank(view.singular_values):
        return []
    if view.sigma1_shares is None:
        return None
    shares, rows = view.sigma1_shares, np.flatnonzero(view.kept)
    largest = rows[np.argsort(-shares[rows], kind="stable")[:NAMED]]
    return [view.token_at(int(row)) | {"share": float(shares[row])} for row in largest]


@statistic(
    "sigma1_top_share",
    needs="documents",
    label="owned by the first thousandth",
    unit="share of σ₁²",
    range=(0, 1),
    figure="owners",
)
def sigma1_top_share(view: ViewData) -> float | None:
    """Σ u_i1² over the first thousandth of the tokens, at least one."""
    if view.sigma1_shares is None or not numerical_rank(view.singular_values):
        return None
    shares = view.sigma1_shares[view.kept]
    count = int(np.ceil(TOP_SHARE * len(shares)))
    return float(np.partition(shares, -count)[-count:].sum()) if count else 0.0
