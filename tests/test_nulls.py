"""Chance overlaps against explicit vectors, published values and known distributions."""

import numpy as np
import pytest

from jaxdelta.statistics.across_layers import nulls
from jaxdelta.statistics.across_layers.nulls import (
    PhaseNulls,
    adjacent_null,
    isotropic_cos_mean,
    isotropic_means,
    isotropic_p_value,
    layer_draws,
    phase_nulls,
)


def masks(phases: str) -> np.ndarray:
    return np.array([[phase == name for phase in phases] for name in dict.fromkeys(phases)])


def factors(layers: int, rows: int, d: int, power: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    """Factors of one covariance with spectrum i^-2·power; layers differ in size only."""
    rng = np.random.default_rng(seed)
    factor = (rng.normal(size=(rows, d)) * np.arange(1, d + 1) ** -power).astype(np.float32)
    return [factor * np.float32(10.0**layer) for layer in range(layers)]


def pair_cosines(factors: list[np.ndarray], draws: int, seed: int) -> np.ndarray:
    nothing = np.zeros((1, len(factors)), bool)
    return adjacent_null(layer_draws(factors, nothing, 1, draws, seed), draws)


def matched(factors: list[np.ndarray], members: np.ndarray, k: int, draws: int, seed: int) -> PhaseNulls:
    return phase_nulls(layer_draws(factors, members, k, draws, seed), members, k, draws, seed)


def figures(found: PhaseNulls) -> np.ndarray:
    return np.stack([found.intra, found.capture, found.leave_one_out])


@pytest.mark.parametrize(("layers", "k", "d"), [(2, 8, 60), (3, 1, 20), (5, 4, 40), (9, 3, 12), (4, 2, 300)])
def test_captures_against_explicit_vectors(layers: int, k: int, d: int) -> None:
    """Of layers in their own subspace, and of other vectors in that of all layers but one."""
    each, size = min(nulls._EACH, layers), layers * k
    draws = np.random.default_rng(layers).normal(size=(6, size + each, d)) * np.arange(1, d + 1) ** -0.5
    draws /= np.linalg.norm(draws, axis=-1, keepdims=True)
    found = nulls._captures(draws @ draws.swapaxes(1, 2), layers, k)
    assert found.shape == (2, 6, each)
    for replicate, capture, left_out in zip(draws, *found, strict=True):
        frames = np.linalg.qr(replicate[:size].reshape(layers, k, d).swapaxes(1, 2))[0].swapaxes(1, 2)
        basis = np.linalg.svd(frames.reshape(-1, d), full_matrices=False)[2][:8]
        np.testing.assert_allclose(capture, np.sum((frames[:each, 0] @ basis.T) ** 2, axis=1), atol=1e-8)
        basis = np.linalg.svd(frames[:-1].reshape(-1, d), full_matrices=False)[2][:8]
        np.testing.assert_allclose(left_out, np.sum((replicate[size:] @ basis.T) ** 2, axis=1), atol=1e-8)


def test_intra_of_vectors_all_equally_close() -> None:
    pool = np.full((50, 50), -0.3)
    intra = nulls._replicates(pool + 1.3 * np.eye(50), 4, 2, 10, (0,))[0]
    np.testing.assert_allclose(intra, 0.3)


def test_chance_capture_is_large() -> None:
    """k = 8, d = 2560; phases of 2, 3, 5 and 8 layers: the shared subspace holds its own layers by chance."""
    found = isotropic_means(masks("AABBBCCCCCDDDDDDDD"), k=8, d=2560, seed=0)
    np.testing.assert_allclose(found["capture"], [0.523, 0.362, 0.231, 0.155], atol=0.003)
    np.testing.assert_allclose(found["leave_one_out"], 8 / 2560)


def test_single_directions_span_their_own_space() -> None:
    """Up to 8 layers of one direction each are captured wholly; leaving the layer out leaves 8/d or less."""
    found = isotropic_means(masks("AAAA" + "B" * 8), k=1, d=400, seed=1)
    np.testing.assert_allclose(found["capture"], 1, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["leave_one_out"], [3 / 400, 7 / 400])


def test_normal_factors_give_the_isotropic_null() -> None:
    d = 64
    identity = [np.eye(d, dtype=np.float32)] * 5
    members = masks("AAABB")
    found, wanted = matched(identity, members, k=4, draws=300, seed=0), isotropic_means(members, 4, d, seed=1)
    np.testing.assert_allclose(found.capture.mean(axis=1), wanted["capture"], rtol=0.03)
    np.testing.assert_allclose(found.leave_one_out.mean(axis=1), wanted["leave_one_out"], rtol=0.15)
    np.testing.assert_allclose(found.intra.mean(axis=1), isotropic_cos_mean(d), rtol=0.15)
    cosines = pair_cosines(identity, 2000, seed=0)
    assert cosines.mean() == pytest.approx(isotropic_cos_mean(d), rel=0.03)
    assert np.mean(isotropic_p_value(cosines, d) <= 0.05) == pytest.approx(0.05, abs=0.01)


def test_draws_have_the_pooled_covariance() -> None:
    """Two layers of one direction each, at right angles: |cos| is that of two random signs' mixtures."""
    x, y = (np.eye(3, dtype=np.float32)[i : i + 1] for i in (0, 1))
    # A draw from the sum of the two is isotropic in their plane, however large the one is.
    found = pair_cosines([x * np.float32(1000), y], 4000, seed=0)
    assert found.mean() == pytest.approx(isotropic_cos_mean(2), rel=0.03)
    assert np.mean(isotropic_p_value(found, 2) <= 0.3) == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(pair_cosines([x, x], 50, seed=0), 1, rtol=1e-6)


def test_anisotropy_alone_overlaps() -> None:
    """Spectrum i^-1: far more overlap than the isotropic null's: .109 at d = 2560."""
    d = 2560
    factor = np.diag(np.arange(1, d + 1) ** -0.5).astype(np.float32)
    assert pair_cosines([factor, factor], 500, seed=0).mean() == pytest.approx(0.109, abs=0.015)


def test_layers_count_alike_whatever_their_size() -> None:
    small = factors(4, 30, 40, power=1.0)
    same = [small[0]] * 4
    np.testing.assert_allclose(pair_cosines(small, 60, seed=3), pair_cosines(same, 60, seed=3), atol=1e-5)
    found, wanted = (figures(matched(f, masks("AAAA"), 2, 20, seed=3)) for f in (small, same))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_phases_of_one_layer_are_left_out() -> None:
    found = figures(matched(factors(5, 20, 30), masks("AABCC"), 3, 10, seed=0))
    assert found.shape == (3, 3, 10)
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, [0, 2]]).all()
    for mean in isotropic_means(masks("AABCC"), 3, 30, seed=0).values():
        assert np.isfinite(mean).tolist() == [True, False, True]


def test_seeds() -> None:
    updates, members = factors(4, 20, 30), masks("AABB")
    for draw in (
        lambda seed: pair_cosines(updates, 10, seed),
        lambda seed: figures(matched(updates, members, 2, 10, seed)),
        lambda seed: isotropic_means(members, 5, 30, seed)["capture"],
    ):
        assert np.array_equal(draw(0), draw(0))
        assert not np.isclose(draw(0), draw(1)).all()
        assert draw(0).dtype == np.float64


@pytest.mark.parametrize("zero", [[0], [1, 2], [0, 1, 2, 3]])
def test_zero_updates(zero: list[int]) -> None:
    updates = factors(4, 20, 30, power=0.5)
    for layer in zero:
        updates[layer] = np.zeros_like(updates[layer])
    found = figures(matched(updates, masks("AABB"), 4, 20, seed=0))
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1 + 1e-9)).all()
    cosines = pair_cosines(updates, 20, seed=0)
    for pair, values in enumerate(cosines):
        assert np.all(values == 0) if {pair, pair + 1} <= set(zero) else np.all(values > 0)
    if len(zero) == 4:
        assert not found.any()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_fewer_dimensions_than_directions(rank: int) -> None:
    """A covariance of rank r < k: the subspace is all there is, and everything lies in it."""
    found = matched(factors(3, rank, 40), masks("AAA"), k=8, draws=20, seed=0)
    np.testing.assert_allclose(found.capture, 1, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.leave_one_out, 1, rtol=0, atol=1e-4)


def test_one_layer_has_no_pairs() -> None:
    assert pair_cosines(factors(1, 4, 6), 10, seed=0).shape == (0, 10)


def test_large_phases_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, members = factors(5, 20, 30), masks("AAABB")
    whole = figures(matched(updates, members, 2, 11, seed=0))
    monkeypatch.setattr(nulls, "_AT_ONCE", 100)
    np.testing.assert_allclose(figures(matched(updates, members, 2, 11, seed=0)), whole, rtol=1e-12)
