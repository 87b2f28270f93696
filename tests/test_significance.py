"""P-values, intervals and the test of phases against known values, brute force and simulations."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdelta.statistics.across_layers.nulls import isotropic_cos_mean, isotropic_p_value
from jaxdelta.statistics.across_layers.phase_test import lag_matched_gap, segment_test
from jaxdelta.statistics.across_layers.phases import default_phases
from jaxdelta.statistics.intervals import benjamini_hochberg, p_value, t_interval
from jaxdelta.text.groups import cluster_weights, half_weights


def masks(phases: str) -> np.ndarray:
    return np.array([[phase == name for phase in phases] for name in dict.fromkeys(phases)])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_overlap(layers: int, seed: int = 0, d: int = 6) -> np.ndarray:
    v = unit(np.random.default_rng(seed).normal(size=(layers, d)))
    return np.abs(v @ v.T)


def drift(phases: tuple[str, ...], step: float, planted: float, rng: np.random.Generator) -> np.ndarray:
    """Overlap of a random walk on the sphere, `planted` times a direction of each phase's own added."""
    d = 256
    v = [unit(rng.normal(size=d))]
    while len(v) < len(phases):
        v.append(unit(v[-1] + step * unit(rng.normal(size=d))))
    own = {name: unit(rng.normal(size=d)) for name in dict.fromkeys(phases)}
    mixed = unit(np.array(v) + planted * np.array([own[name] for name in phases]))
    return mixed @ mixed.T


@pytest.mark.parametrize(
    ("d", "mean"), [(1024, 0.0249), (2048, 0.0176), (2560, 0.0158), (4096, 0.0125), (5120, 0.0112)]
)
def test_isotropic_mean_at_the_models_sizes(d: int, mean: float) -> None:
    assert isotropic_cos_mean(d) == pytest.approx(mean, abs=5e-5)


def test_isotropic_mean_of_few_dimensions() -> None:
    np.testing.assert_allclose([isotropic_cos_mean(d) for d in (1, 2, 3)], [1, 2 / np.pi, 0.5], rtol=1e-14)


@pytest.mark.parametrize(("d", "point"), [(1024, 0.061), (4096, 0.031), (5120, 0.027)])
def test_isotropic_95_percent_points(d: int, point: float) -> None:
    above, below = isotropic_p_value(np.array([point - 5e-4, point + 5e-4]), d)
    assert below < 0.05 < above


def test_isotropic_p_values() -> None:
    c = np.array([0.0, 0.3, 0.9, 1.0, 1 + 1e-15])
    np.testing.assert_allclose(isotropic_p_value(c, 3), [1, 0.7, 0.1, 0, 0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(isotropic_p_value(-c[:2], 2), 2 / np.pi * np.arccos(c[:2]), rtol=1e-12)
    assert isotropic_p_value(c[:4].reshape(2, 2), 1).tolist() == [[1, 1], [1, 1]]
    tail = isotropic_p_value(np.array([0.5]), 1024)[0]  # no cancellation: 1 - (1 - tail) would be 0
    assert 0 < tail < 1e-50
    assert isotropic_p_value(np.array([[0.1]], np.float32), 50).dtype == np.float64


def test_p_value() -> None:
    null = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    np.testing.assert_allclose(p_value(np.array([2.0, 5.0]), null), [3 / 4, 1 / 4])
    np.testing.assert_allclose(p_value(2.0, null), [3 / 4, 1])
    assert p_value(0.5, null[0]) == 1


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_benjamini_hochberg(p: list[float]) -> None:
    found = benjamini_hochberg(np.array(p, np.float64))
    wanted = scipy.stats.false_discovery_control(p) if p else []
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def plain_gap(overlap: np.ndarray, within: list[tuple], crossing: list[tuple]) -> float:
    differences = []
    for i, j in within:
        partners = [abs(overlap[a, b]) for a, b in crossing if b - a == j - i]
        if partners:
            differences.append(abs(overlap[i, j]) - np.mean(partners))
    return float(np.mean(differences)) if differences else math.nan


def plain_gaps(overlap: np.ndarray, phases: str) -> tuple[float, list[float]]:
    pairs = list(itertools.combinations(range(len(phases)), 2))
    same = [(i, j) for i, j in pairs if phases[i] == phases[j]]
    total = plain_gap(overlap, same, [pair for pair in pairs if pair not in same])
    each = [
        plain_gap(
            overlap,
            [(i, j) for i, j in pairs if phases[i] == phases[j] == name],
            [(i, j) for i, j in pairs if (phases[i] == name) != (phases[j] == name)],
        )
        for name in dict.fromkeys(phases)
    ]
    return total, each


def plain_test(overlap: np.ndarray, phases: str) -> tuple[float, int]:
    """The share of the distinct orders of the segments with a gap as large, and their number."""
    runs = ["".join(run) for _, run in itertools.groupby(phases)]
    # As parts: A beside AA is another order than AA beside A.
    orders = set(itertools.permutations(runs))
    gaps = [plain_gaps(overlap, "".join(order))[0] for order in orders]
    observed = plain_gaps(overlap, phases)[0]
    if np.isnan(observed):
        return math.nan, len(orders)
    return float(np.mean([gap >= observed - 1e-12 for gap in gaps if np.isfinite(gap)])), len(orders)


@pytest.mark.parametrize(
    "phases", ["AABBB", "AAABCCDDDD", "AABBAAACC", "ABABAB", "AABBCC", "ABBBBB", "AAAABC", "AAB"]
)
def test_segment_test_against_brute_force(phases: str) -> None:
    overlap = random_overlap(len(phases), seed=len(phases))
    found = segment_test(overlap, phases)
    gap, each = plain_gaps(overlap, phases)
    chance, orders = plain_test(overlap, phases)
    assert found.exact
    assert found.orders == orders
    assert found.gap == pytest.approx(gap, abs=1e-12, nan_ok=True)
    assert found.p_value == pytest.approx(chance, abs=1e-12, nan_ok=True)
    np.testing.assert_allclose(found.phase_gap, each, atol=1e-12)
    np.testing.assert_allclose(lag_matched_gap(overlap, masks(phases)), each, atol=1e-12)
    assert np.array_equal(np.isnan(found.phase_p_value), np.isnan(each))


def test_signs_of_cosines_do_not_matter() -> None:
    overlap = random_overlap(8)
    signs = np.sign(np.random.default_rng(1).normal(size=8))
    assert (
        segment_test(overlap * np.outer(signs, signs), "AAABBCCC").gap
        == segment_test(overlap, "AAABBCCC").gap
    )


def test_one_phase_among_its_places() -> None:
    """A is at the only one of three places where its layers agree."""
    overlap = np.full((6, 6), 0.1) + 0.9 * np.eye(6)
    overlap[0, 1] = overlap[1, 0] = 0.8
    found = segment_test(overlap, "AABCCC")
    assert found.phase_gap[0] == pytest.approx(0.7)
    # Orders of sizes 2, 1, 3 put A at layers 0, 1, 3 or 4.
    assert found.phase_p_value[0] == 1 / 4
    assert np.isnan(found.phase_gap[1]) and np.isnan(found.phase_p_value[1])


@pytest.mark.parametrize("phases", ["A", "AAAA", "ABCD", "AB"])
def test_nothing_to_compare(phases: str) -> None:
    found = segment_test(random_overlap(len(phases)), phases)
    assert np.isnan([found.gap, found.p_value]).all()
    assert np.isnan([found.phase_gap, found.phase_p_value]).all()


def test_decay_with_distance_is_no_gap() -> None:
    places = np.arange(28)
    overlap = 0.9 ** np.abs(places[:, None] - places)
    found = segment_test(overlap, default_phases(28))
    np.testing.assert_allclose([found.gap, *np.delete(found.phase_gap, 1)], 0, atol=1e-12)
    assert found.p_value == 1
    assert found.orders == 720


def test_more_orders_than_allowed() -> None:
    overlap, phases = drift(default_phases(28), 0.4, 1.0, np.random.default_rng(0)), default_phases(28)
    every, some = segment_test(overlap, phases), segment_test(overlap, phases, orders=199, seed=3)
    assert (every.exact, some.exact, some.orders) == (True, False, 199)
    assert some.gap == every.gap
    assert every.p_value == 1 / 720
    assert 1 / 200 <= some.p_value <= 4 / 200
    again = segment_test(overlap, phases, orders=199, seed=3)
    assert again.p_value == some.p_value
    null = drift(phases, 0.4, 0.0, np.random.default_rng(4))
    assert segment_test(null, phases, 500).p_value == pytest.approx(
        segment_test(null, phases).p_value, abs=0.08
    )


@pytest.mark.parametrize(
    ("step", "planted", "least", "most"),
    [(0.3, 0.0, 0.0, 0.15), (0.8, 0.0, 0.0, 0.15), (0.5, 0.5, 0.95, 1.0)],
)
def test_drift_is_not_phases(step: float, planted: float, least: float, most: float) -> None:
    """At 5 %, drift alone is rejected 5 % of the time (2000 data sets; here 40), phases nearly always."""
    rng, phases = np.random.default_rng(7), default_phases(28)
    rejected = [segment_test(drift(phases, step, planted, rng), phases).p_value <= 0.05 for _ in range(40)]
    assert least <= np.mean(rejected) <= most


def degrees(values: np.ndarray) -> np.ndarray:
    n = values.shape[-1]
    excess = scipy.stats.kurtosis(values, axis=-1, fisher=True, bias=False)
    return np.clip(2 * (n - 1) / (excess + 2), 1, n - 1)


@pytest.mark.parametrize("drawn", [False, True])
def test_interval_on_each_scale(drawn: bool) -> None:
    rng = np.random.default_rng(0)
    scales = {
        "linear": (lambda x: x, lambda x: x, -2.0),
        "log": (np.log, np.exp, 3.0),
        "unit": (scipy.special.logit, scipy.special.expit, 0.7),
    }
    for scale, (there, back, estimate) in scales.items():
        without = back(there(estimate) + 0.02 * rng.normal(size=(2, 12)))
        draws = back(there(estimate) + 0.2 * rng.normal(size=(2, 300))) if drawn else None
        spread = math.sqrt(11) * there(without).std(axis=1)
        if draws is not None:
            spread = math.sqrt(12 / 11) * there(draws).std(axis=1, ddof=1)
        half = scipy.stats.t.ppf(0.95, degrees(there(without))) * spread
        low, high = t_interval(np.full(2, estimate), without, scale, draws, level=0.9)
        np.testing.assert_allclose(low, back(there(estimate) - half), rtol=1e-9)
        np.testing.assert_allclose(high, back(there(estimate) + half), rtol=1e-9)


@pytest.mark.parametrize("scale", ["linear", "log", "unit"])
@pytest.mark.parametrize("estimate", [0.0, 1e-300, 0.3, 1.0])
def test_interval_without_spread(scale: str, estimate: float) -> None:
    low, high = t_interval(estimate, np.full(3, estimate), scale)
    assert low == high == estimate
    low, high = t_interval(np.float64(estimate), np.full(3, estimate, np.float32), scale)
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize(("scale", "largest"), [("log", np.inf), ("unit", 1.0)])
@pytest.mark.parametrize("estimate", [0.0, 0.5, 1.0])
def test_interval_at_the_ends_of_a_scale(scale: str, largest: float, estimate: float) -> None:
    without = np.array([0.0, 0.2, 1.0, 1.0, 0.0])
    low, high = t_interval(estimate, without, scale)
    assert 0 <= low <= estimate <= high <= largest
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize(("documents", "scale"), [(1, "linear"), (0, "log"), (5, "logit")])
def test_no_interval(documents: int, scale: str) -> None:
    with pytest.raises(ValueError, match="t_interval"):
        t_interval(0.5, np.full(documents, 0.5), scale)


@pytest.mark.parametrize("drawn", [False, True])
def test_interval_covers(drawn: bool) -> None:
    """Means of 8 documents of unequal level: 95 % intervals hold the truth about 95 % of the time."""
    rng = np.random.default_rng(3)
    levels = rng.normal(size=(400, 8))
    without = (levels.sum(axis=1, keepdims=True) - levels) / 7
    draws = levels @ cluster_weights(8, 200, seed=0).T / 8 if drawn else None
    low, high = t_interval(levels.mean(axis=1), without, draws=draws)
    assert 0.92 <= np.mean((low <= 0) & (high >= 0)) <= 0.98


def test_cluster_weights() -> None:
    weights = cluster_weights(6, 4000, seed=1)
    assert weights.shape == (4000, 6) and weights.dtype == np.float64
    assert (weights.sum(axis=1) == 6).all() and (weights == weights.round()).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.07)
    np.testing.assert_allclose(weights.var(axis=0), 5 / 6, atol=0.09)
    assert np.array_equal(weights, cluster_weights(6, 4000, seed=1))
    assert not np.array_equal(weights, cluster_weights(6, 4000, seed=2))
    assert cluster_weights(1, 3, seed=0).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 9])
def test_half_weights(groups: int) -> None:
    halves = half_weights(groups, 300, seed=0)
    assert halves.dtype == np.float64
    if groups == 1:
        assert halves.shape == (0, 2, 1)
        return
    assert halves.shape == (300, 2, groups)
    assert (halves.sum(axis=1) == 1).all()
    assert set(np.diff(halves.sum(axis=2), axis=1).ravel()) == {groups % 2}
    np.testing.assert_allclose(halves[:, 0].mean(axis=0), groups // 2 / groups, atol=0.12)
