"""Moments of groups, and what they tell: spectra without each group, cosines of halves; against NumPy."""

import jax
import numpy as np
import pytest

from jaxdelta.spectra.group_moments import JACKKNIFE_AXES, by_group, leave_one_out, split_half_cosines
from jaxdelta.text.groups import half_weights

N, D, GROUPS = 300, 24, 25
OWNERS = np.arange(N) * GROUPS // N
AXES = 48  # as many as rows have


def rows(n: int, d: int, spectrum: np.ndarray, seed: int = 0) -> np.ndarray:
    """Tokens whose covariance has eigenvalues `spectrum`², a fifth of their variance their group's."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) * GROUPS // n
    loads = np.sqrt(0.8) * rng.normal(size=(n, d)) + np.sqrt(0.2) * rng.normal(size=(GROUPS, d))[groups]
    return loads * spectrum @ np.linalg.qr(rng.normal(size=(d, d)))[0]


def moments(x: np.ndarray, owners: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """σ, A_g along the leading axes, and each group's energy outside of them."""
    _, values, vectors = np.linalg.svd(x, full_matrices=False)
    along = x @ vectors[:axes].T
    groups = range(int(owners.max()) + 1)
    within = np.stack([along[owners == g].T @ along[owners == g] for g in groups])
    energies = np.array([np.sum(np.square(x[owners == g])) for g in groups])
    return values, within, energies - np.trace(within, axis1=1, axis2=2)


def exact_without(x: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """σ² of the tokens of all groups but one, each from its own SVD."""
    groups = range(int(owners.max()) + 1)
    return np.array([np.linalg.svd(x * (owners != g)[:, None], compute_uv=False) ** 2 for g in groups])


def exact_cosines(x: np.ndarray, owners: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """|<v', v''>| of two halves' first right singular vectors, each from its own SVD."""
    first = [[np.linalg.svd(x[half[owners] > 0])[2][0] for half in two] for two in halves]
    return np.array([abs(one @ other) for one, other in first])


# Sums by group


@pytest.mark.parametrize("kind", ["runs", "mixed", "one group", "one token each", "an empty group"])
def test_sums_by_group(kind: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 5))
    owners = {
        "runs": np.arange(40) * 6 // 40,
        "mixed": rng.choice(6, 40, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]),
        "one group": np.zeros(40, int),
        "one token each": np.arange(40),
        "an empty group": np.where(np.arange(40) < 7, 0, 2),
    }[kind]
    membership = (owners == np.arange(owners.max() + 1)[:, None]).astype(np.float64)
    with jax.enable_x64(True):
        found = np.asarray(by_group(x, y, membership))
    wanted = np.einsum("gn,np,nq->gpq", membership, x, y)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


# Without a group


@pytest.mark.parametrize("axes", [JACKKNIFE_AXES, AXES])
def test_spectra_without_a_group_are_exact_where_the_axes_hold_all(axes: int) -> None:
    x = rows(N, D, 0.8 ** np.arange(D) * (np.arange(D) < 12))
    found = leave_one_out(*moments(x, OWNERS, axes))
    assert found.shape == (GROUPS, D)
    np.testing.assert_allclose(found, exact_without(x, OWNERS), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("axes", [JACKKNIFE_AXES, D], ids=["axes of 16", "all axes"])
def test_spectra_without_a_group_of_more_axes_are_close(axes: int) -> None:
    """The energy is exact, and the leading σ² within a few thousandths; beyond, all shrink alike."""
    x = rows(N, D, 0.8 ** np.arange(D))
    values, within, rest = moments(x, OWNERS, axes)
    found, exact = leave_one_out(values, within, rest), exact_without(x, OWNERS)
    np.testing.assert_allclose(found.sum(axis=1), exact.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found[:, :10], exact[:, :10], rtol=3e-3)
    tail = found[:, JACKKNIFE_AXES:] / np.square(values[JACKKNIFE_AXES:])
    np.testing.assert_allclose(tail, np.broadcast_to(tail[:, :1], tail.shape), rtol=1e-12)


def test_nothing_is_left_without_the_only_group() -> None:
    x = rows(N, D, 0.8 ** np.arange(D))
    found = leave_one_out(*moments(x, np.zeros(N, int), D))
    np.testing.assert_allclose(found, 0, atol=1e-12 * np.sum(np.square(x)))


# Halves


def test_cosines_of_halves_are_exact_where_the_axes_hold_all() -> None:
    x = rows(N, D, 0.8 ** np.arange(D))
    halves = half_weights(GROUPS, 10, seed=0)
    found = split_half_cosines(moments(x, OWNERS, AXES)[1], halves)
    np.testing.assert_allclose(found, exact_cosines(x, OWNERS, halves), rtol=1e-9)


@pytest.mark.parametrize(
    ("power", "error"),
    [(0.0, 0.009), (0.25, 0.015), (0.5, 0.009), (1.0, 0.001)],
    ids=["flat", "i^-1/4", "i^-1/2", "i^-1"],
)
def test_cosines_of_halves_within_48_axes(power: float, error: float) -> None:
    """Their mean, of singular values i^-power."""
    n, d = 300, 256
    owners, halves = np.arange(n) * GROUPS // n, half_weights(GROUPS, 10, seed=0)
    x = rows(n, d, np.arange(1.0, d + 1) ** -power)
    found = split_half_cosines(moments(x, owners, AXES)[1], halves)
    assert found.mean() == pytest.approx(exact_cosines(x, owners, halves).mean(), abs=error)


def test_a_half_of_nothing_has_no_cosine() -> None:
    x = rows(N, D, 0.8 ** np.arange(D)) * (OWNERS[:, None] == 3)
    halves = half_weights(GROUPS, 10, seed=0)
    assert np.isnan(split_half_cosines(moments(x, OWNERS, D)[1], halves)).all()
