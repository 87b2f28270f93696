"""The tokens that hold most of the first singular value."""

from typing import Any

import numpy as np

from jaxdelta.spectra.view_summary import ViewSummary
from jaxdelta.text.groups import Sample

OWNERS = 5  # tokens named of those that own σ_1
OWNING_SHARE = 1e-3  # of all tokens: how much of σ_1² they own together


def _owners(figures: ViewSummary, sample: Sample) -> dict[str, Any]:
    """The tokens with the largest shares u_i1² of σ_1², and the share of the top thousandth together."""
    if figures.sigma1_shares is None:
        return {"sigma1_tokens": None, "sigma1_top_share": None}
    shares, kept = np.asarray(figures.sigma1_shares), np.flatnonzero(np.asarray(figures.kept))
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
