"""A text summarised from its rows and from its moments: the memory plan may choose either."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import summarise_from
from stopped_runs import differing, run

from jaxdelta import Analysis
from jaxdelta.statistics.across_layers import table
from jaxdelta.statistics.across_layers.nulls import layer_draws

# Of tokens by themselves, once their mean is subtracted: known from rows alone.
TOKENWISE = {
    "token_norm_mean",
    "token_norm_std",
    "h_norm_mean",
    "rel_step_mean",
    "rel_step_std",
    "cos_delta_h_mean",
    "parallel_frac",
    "note",
}


def symmetric(factor: np.ndarray) -> np.ndarray:
    """(FᵀF)^½, of all F with this FᵀF the one that does not depend on how it was found."""
    energies, vectors = np.linalg.eigh(factor.astype(np.float64).T @ factor)
    return ((vectors * np.sqrt(np.maximum(energies, 0))) @ vectors.T).astype(np.float32)


def summarised_from(maker: str, model: Path) -> Analysis:
    """The text is 13 documents in windows of 64. Nulls are random draws times a factor."""
    with pytest.MonkeyPatch.context() as patched:
        summarise_from(patched, maker)
        patched.setattr(
            table, "layer_draws", lambda factors, *rest: layer_draws([*map(symmetric, factors)], *rest)
        )
        return run(model, None)[0]


@pytest.fixture(scope="module")
def differences(tiny_checkpoint: Path) -> dict[str, float]:
    return differing(*(summarised_from(maker, tiny_checkpoint) for maker in ("rows", "moments")))


def test_numbers_agree(differences: dict[str, float]) -> None:
    """Statistics, nulls and intervals; of tokens' shares of σ_1² moments know those within a frame."""
    known = {place: x for place, x in differences.items() if math.isfinite(x)}
    assert len(known) > 4000
    assert {place for place, x in known.items() if x > 1e-6 and "sigma1_t" not in place} == set()
    assert max(known.values()) < 1e-3


def test_what_only_rows_know(differences: dict[str, float]) -> None:
    missing = [place for place, x in differences.items() if not math.isfinite(x)]
    assert {place.rpartition(".")[2] for place in missing} == TOKENWISE
    assert all(".centred." in place for place in missing)
