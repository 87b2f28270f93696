"""Overlaps under documents' weights against exact eigenvectors of every draw's moments."""

import dataclasses

import numpy as np
import pytest
from test_overlap import masks

from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.statistics.across_layers import bootstrap
from jaxdelta.statistics.across_layers.bootstrap import OverlapBootstrap, bootstrap_overlaps
from jaxdelta.statistics.across_layers.overlap import Overlaps, overlaps

FIELDS = {
    "intra": "intra_cos_mean",
    "cross": "cross_cos_mean",
    "capture": "capture",
    "leave_one_out": "leave_one_out",
    "stacked_rank": "stacked_rank",
}


def updates(layers: int, documents: int, d: int, quiet: float = 1.0, tokens: int = 30) -> np.ndarray:
    """δ (N, G, tokens, d): axes that drift with depth, a layer's own, documents that differ.

    From its ninth axis on a layer is quieter by the factor `quiet`.
    """
    rng = np.random.default_rng(0)
    axes, found = rng.normal(size=(12, d)) / np.sqrt(d), []
    for _ in range(layers):
        axes = axes + 0.5 * rng.normal(size=axes.shape) / np.sqrt(d)
        own = np.concatenate([axes, rng.normal(size=(12, d)) / np.sqrt(d)])
        scales = 3 * 0.7 ** np.arange(24) * rng.uniform(0.7, 1.4, 24)
        scales[8:] *= quiet
        loads = rng.normal(size=(documents, tokens, 24)) + 0.7 * rng.normal(size=(documents, 1, 24))
        found.append((loads * scales) @ own + 0.05 * rng.normal(size=(documents, tokens, d)))
    return np.stack(found)


def moments_of(delta: np.ndarray) -> np.ndarray:
    return delta.swapaxes(-1, -2) @ delta


@one_blas_thread()
def leading(moments: np.ndarray, k: int, weights: np.ndarray) -> np.ndarray:
    """Every layer's directions under weights of the documents, exactly."""
    weighted = np.einsum("g,lgde->lde", weights, moments)
    return np.linalg.eigh(weighted)[1][..., ::-1].swapaxes(1, 2)[:, :k]


def coupled(delta: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    moments = moments_of(delta)
    directions = leading(moments, k, np.ones(delta.shape[1]))
    directions = directions * (np.abs(delta).sum((1, 2, 3))[:, None, None] > 0)
    return (directions[:, None] @ moments).astype(np.float32), directions


def exact(delta: np.ndarray, k: int, weights: np.ndarray, members: np.ndarray) -> dict[str, np.ndarray]:
    moments = moments_of(delta)
    full, draws, v1 = leading(moments, k, np.ones(delta.shape[1])), [], []
    for counts in weights:
        directions = leading(moments, k, counts)
        v1.append(np.abs(np.sum(directions[:, 0] * full[:, 0], axis=-1)))
        draws.append(overlaps(directions, members))
    found = {
        ours: np.stack([estimate(draw, name, members) for draw in draws], -1) for ours, name in FIELDS.items()
    }
    adjacent = np.stack([np.abs(np.diagonal(draw.top1_cos, 1)) for draw in draws], -1)
    return found | {"v1_cos": np.stack(v1, -1), "adjacent": adjacent}


def resampled(delta: np.ndarray, k: int, weights: np.ndarray, members: np.ndarray) -> OverlapBootstrap:
    """As a run calls it, with twice k directions."""
    return bootstrap_overlaps(*coupled(delta, 2 * k), k, weights, members)


def one_step(coupling: np.ndarray, directions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A draw's directions by the method's definition, in float64."""
    moved = np.einsum("g,lgkd->lkd", weights, coupling, dtype=np.float64)
    moment = moved @ directions.swapaxes(1, 2)
    ritz = np.linalg.eigh((moment + moment.swapaxes(1, 2)) / 2)[1][..., ::-1]
    return np.linalg.qr((ritz.swapaxes(1, 2) @ moved).swapaxes(1, 2))[0].swapaxes(1, 2)


def estimate(found: Overlaps, name: str, members: np.ndarray) -> np.ndarray:
    """A figure of the overlaps; captures of the phases' own layers alone, as draws have them."""
    figure = np.asarray(getattr(found, name))
    return np.where(members, figure, np.nan) if figure.shape == members.shape else figure


def counts_of(draws: int, documents: int) -> np.ndarray:
    shares = np.full(documents, 1 / documents)
    return np.random.default_rng(1).multinomial(documents, shares, draws).astype(np.float32)


def test_draws_spread_as_exact_ones_do() -> None:
    """Where a gap follows the last of V; every figure that moves, none left out."""
    delta, members = updates(10, 20, 64, quiet=0.3), masks("AAABCCCCDD")
    counts = counts_of(40, 20)
    found = resampled(delta, 8, counts, members)
    for name, wanted in exact(delta, 8, counts, members).items():
        spread, ours = wanted.std(axis=-1), getattr(found, name).std(axis=-1)
        moves = spread > 1e-3
        assert moves.any(), name
        np.testing.assert_allclose(ours[moves], spread[moves], rtol=0.1, err_msg=name)


def test_draws_are_one_step_of_the_method() -> None:
    """Also where no gap follows V: then the step says less than an exact solver, but still what it says."""
    delta, members = updates(10, 20, 64), masks("AAABCCCCDD")
    counts = counts_of(40, 20)
    coupling, directions = coupled(delta, 8)
    found = bootstrap_overlaps(coupling, directions, 8, counts, members)
    draws = [overlaps(one_step(coupling, directions, weights), members) for weights in counts]
    for ours, name in FIELDS.items():
        wanted = np.stack([estimate(draw, name, members) for draw in draws], -1)
        # The subspaces are found by a few power steps: their draws are near, not equal.
        atol = 0.03 if name in ("capture", "leave_one_out") else 1e-5
        np.testing.assert_allclose(getattr(found, ours), wanted, rtol=0, atol=atol, err_msg=name)


def test_small_changes_of_the_weights_are_followed_closely() -> None:
    delta, members = updates(6, 10, 40), masks("AAABBB")
    weights = (1 + 0.02 * np.random.default_rng(1).normal(size=(3, 10))).astype(np.float32)
    found = resampled(delta, 8, weights, members)
    for name, wanted in exact(delta, 8, weights, members).items():
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(("phases", "k"), [("AAABCC", 8), ("ABABAB", 3), ("A", 4), ("AABBBB", 1)])
def test_the_full_text_gives_the_estimates(phases: str, k: int) -> None:
    coupling, directions = coupled(updates(len(phases), 5, 40), k)
    members = masks(phases)
    found = bootstrap_overlaps(coupling, directions, k, np.ones((3, 5), np.float32), members)
    estimates = overlaps(directions, members)
    for ours, name in FIELDS.items():
        wanted = np.repeat(estimate(estimates, name, members)[..., None], 3, axis=-1)
        np.testing.assert_allclose(getattr(found, ours), wanted, rtol=0, atol=3e-6, err_msg=ours)
    np.testing.assert_allclose(found.v1_cos, 1, rtol=0, atol=1e-6)
    wanted = np.abs(np.diagonal(estimates.top1_cos, 1))[:, None]
    np.testing.assert_allclose(found.adjacent, np.repeat(wanted, 3, axis=1), rtol=0, atol=3e-6)


def test_one_loud_direction_leaves_the_quiet_ones_their_digits() -> None:
    """As an attention sink has it: one singular value a thousand times the next."""
    delta, members = updates(4, 6, 40), masks("AABB")
    delta[:, :, 0] += 3e4 * np.random.default_rng(2).normal(size=(4, 1, 40))
    coupling, directions = coupled(delta, 6)
    found = bootstrap_overlaps(coupling, directions, 6, np.ones((1, 6), np.float32), members)
    wanted = estimate(overlaps(directions, members), "leave_one_out", members)
    np.testing.assert_allclose(found.leave_one_out[..., 0], wanted, rtol=0, atol=1e-3)


def test_a_layer_that_writes_nothing() -> None:
    delta, members = updates(4, 5, 40), masks("AABB")
    delta[1] = 0
    coupling, directions = coupled(delta, 4)
    found = bootstrap_overlaps(coupling, directions, 4, np.ones((2, 5), np.float32), members)
    for field in dataclasses.fields(found):
        drawn = getattr(found, field.name)
        own = drawn[members] if drawn.shape[:2] == members.shape else drawn
        assert np.isfinite(own).all(), field.name
    assert not found.v1_cos[1].any()
    assert not found.capture[0, 1].any()


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    coupling, directions = coupled(updates(4, 5, 40), 4)
    weights = np.random.default_rng(1).poisson(1.0, (7, 5)).astype(np.float32) + 0.1
    whole = bootstrap_overlaps(coupling, directions, 4, weights, masks("AABB"))
    monkeypatch.setattr(bootstrap, "_CHUNK_BYTES", 40_000)
    chunks = bootstrap_overlaps(coupling, directions, 4, weights, masks("AABB"))
    for field in dataclasses.fields(whole):
        assert getattr(whole, field.name).shape[-1] == 7
        np.testing.assert_allclose(getattr(chunks, field.name), getattr(whole, field.name), rtol=0, atol=1e-5)
