"""Overlaps of directions against a plain NumPy float64 implementation of the reference's definitions."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdelta.spectra.linalg import one_blas_thread
from jaxdelta.statistics.across_layers.overlap import Overlaps, overlaps
from jaxdelta.statistics.across_layers.subspaces import SHARED_RANK


def random_directions(layers: int, k: int, d: int, seed: int = 0, shared: float = 0.0) -> np.ndarray:
    """k orthonormal directions a layer; `shared` mixes one common basis into all layers'."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(layers, d, k)) + shared * rng.normal(size=(d, k))
    return np.linalg.qr(mixed)[0].transpose(0, 2, 1)


def masks(phases: str) -> np.ndarray:
    return np.array([[phase == name for phase in phases] for name in dict.fromkeys(phases)])


@one_blas_thread()
def plain(directions: np.ndarray, members: np.ndarray) -> Overlaps:
    """The definitions, one by one; capture by an SVD of the stacked directions."""
    layers, _, d = directions.shape
    first = directions[:, 0].astype(np.float64)
    cosines = np.array([[first[i] @ first[j] for j in range(layers)] for i in range(layers)])
    intra, cross, capture, alone, rank, dimensions = [], [], [], [], [], []
    for inside in members:
        own, others = np.flatnonzero(inside), np.flatnonzero(~inside)
        pairs = [abs(cosines[i, j]) for i in own for j in own if i < j]
        intra.append(np.mean(pairs) if pairs else 1.0)
        mixed = [abs(cosines[i, j]) for i in own for j in others]
        cross.append(np.mean(mixed) if mixed else 0.0)
        stack = directions[own].reshape(-1, d).astype(np.float64)
        basis = np.linalg.svd(stack, full_matrices=False)[2][:SHARED_RANK]
        capture.append([np.sum((basis @ v) ** 2) for v in first])
        alone.append([without(directions, own, layer) for layer in range(layers)])
        share = np.linalg.svd(first[own], compute_uv=False) ** 2
        share = share[share > 1e-12 * max(share[0], 1e-12)] / max(share.sum(), 1e-12)
        rank.append(np.exp(-np.sum(share * np.log(share))) if share.size else 0.0)
        dimensions.append(next((i for i, held in enumerate(np.cumsum(share), 1) if held >= 0.9 - 1e-12), 0))
    return Overlaps(cosines, *map(np.array, (intra, cross, capture, alone, rank, dimensions)))


def without(directions: np.ndarray, own: np.ndarray, layer: int) -> float:
    """Leave-one-out capture of a layer's v by the phase of the layers `own`."""
    others = [other for other in own if other != layer]
    if not others:
        return np.nan
    stack = directions[others].reshape(-1, directions.shape[2]).astype(np.float64)
    _, values, basis = np.linalg.svd(stack, full_matrices=False)
    present = values[:SHARED_RANK] > 1e-6 * values[0]
    return np.sum((basis[: len(present)][present] @ directions[layer, 0]) ** 2)


def assert_same(found: Overlaps, wanted: Overlaps, members: np.ndarray, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(found.top1_cos, wanted.top1_cos, rtol=0, atol=atol)
    np.testing.assert_allclose(found.intra_cos_mean, wanted.intra_cos_mean, rtol=0, atol=atol)
    np.testing.assert_allclose(found.cross_cos_mean, wanted.cross_cos_mean, rtol=0, atol=atol)
    np.testing.assert_allclose(found.capture[members], wanted.capture[members], rtol=0, atol=atol)
    np.testing.assert_allclose(found.leave_one_out, wanted.leave_one_out, rtol=0, atol=atol)
    np.testing.assert_allclose(found.stacked_rank, wanted.stacked_rank, rtol=1e-9, atol=1e-9)
    assert np.array_equal(found.dimensions_90, wanted.dimensions_90)


@pytest.mark.parametrize(
    ("phases", "k", "d"),
    [
        ("AABBBB", 8, 40),
        ("AAABCCC", 4, 40),  # a phase of one layer
        ("AAAAA", 8, 60),  # no other layers
        ("ABC", 3, 20),  # only phases of one layer
        ("AABB", 1, 30),  # k = 1
        ("AAAABBB", 2, 16),  # 8 and 6 stacked directions
        ("AB", 2, 12),
        ("A", 3, 12),
        ("ABABAB", 8, 64),  # phases need not be contiguous
        ("AAAABBBB", 8, 10),  # more stacked directions than dimensions
        ("A" * 9 + "B" * 13, 8, 48),
    ],
)
@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_against_the_definitions(phases: str, k: int, d: int, shared: float) -> None:
    directions, members = random_directions(len(phases), k, d, shared=shared), masks(phases)
    found = overlaps(directions, members)
    assert_same(found, plain(directions, members), members)
    if all(inside.sum() * k >= SHARED_RANK for inside in members):
        # Also of other phases' directions; a small stack's SVD has an arbitrary null space.
        np.testing.assert_allclose(found.capture, plain(directions, members).capture, rtol=0, atol=1e-10)


def test_special_values() -> None:
    directions = random_directions(5, 4, 30)
    found = overlaps(directions, masks("AAAAB"))
    assert found.intra_cos_mean[1] == 1.0
    assert overlaps(directions, masks("AAAAA")).cross_cos_mean[0] == 0.0
    np.testing.assert_allclose(np.diagonal(found.top1_cos), 1, rtol=1e-14)
    assert np.all(np.abs(found.top1_cos) <= 1)
    assert np.array_equal(found.top1_cos, found.top1_cos.T)
    assert np.all((found.capture >= 0) & (found.capture <= 1 + 1e-12))
    # Two layers of 4 directions span 8 dimensions: all of them are shared.
    np.testing.assert_allclose(overlaps(directions, masks("AABBC")).capture[0, :2], 1, rtol=0, atol=1e-12)


def test_types() -> None:
    found = overlaps(random_directions(3, 2, 10).astype(np.float32), masks("AAB"))
    for value in (found.top1_cos, found.intra_cos_mean, found.cross_cos_mean, found.capture):
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.float64
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("k", [1, 3, 8])
def test_identical_layers(k: int) -> None:
    """A stack of rank k < 8 or = 8: everything is captured, nothing is divided by zero."""
    directions = np.repeat(random_directions(1, k, 24), 5, axis=0)
    found = overlaps(directions, masks("AAABB"))
    np.testing.assert_allclose(found.capture, 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.abs(found.top1_cos), 1, rtol=0, atol=1e-12)


def test_nearly_identical_layers() -> None:
    """The stack's small singular values, 1e-9, lie between rounding and certainty."""
    directions = np.repeat(random_directions(1, 3, 24), 6, axis=0)
    directions += 1e-9 * np.random.default_rng(1).normal(size=directions.shape)
    members = masks("AAABBB")
    assert_same(overlaps(directions, members), plain(directions, members), members, atol=1e-8)


def test_identical_layers_in_float32_directions() -> None:
    directions = np.repeat(random_directions(1, 3, 24), 4, axis=0).astype(np.float32)
    members = masks("AABB")
    assert_same(overlaps(directions, members), plain(directions, members), members, atol=1e-6)


@pytest.mark.parametrize("phases", ["AABB", "ABBB", "AAAA", "ABCD"])
@pytest.mark.parametrize("zero", [[0], [0, 1], [1, 2, 3], [0, 1, 2, 3]])
def test_layers_without_directions(phases: str, zero: list[int]) -> None:
    directions, members = random_directions(4, 4, 20), masks(phases)
    directions[zero] = 0
    found = overlaps(directions, members)
    for value in (found.top1_cos, found.intra_cos_mean, found.cross_cos_mean, found.capture):
        assert np.isfinite(value).all()
    assert not found.top1_cos[zero].any()
    assert not found.capture[:, zero].any()
    assert_same(found, plain(directions, members), members)


def test_signs_do_not_matter() -> None:
    directions, members = random_directions(6, 4, 20, shared=1.0), masks("AAABBB")
    signs = np.where(np.random.default_rng(2).random((6, 4, 1)) < 0.5, -1, 1)
    found, flipped = overlaps(directions, members), overlaps(signs * directions, members)
    np.testing.assert_allclose(np.abs(flipped.top1_cos), np.abs(found.top1_cos), rtol=1e-14)
    np.testing.assert_allclose(flipped.intra_cos_mean, found.intra_cos_mean, rtol=1e-13)
    np.testing.assert_allclose(flipped.capture, found.capture, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    phases=st.lists(st.sampled_from("ABC"), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
    shared=st.sampled_from([0.0, 0.5, 5.0]),
)
def test_any_phases(phases: list[str], seed: int, shared: float) -> None:
    members = np.array([[phase == name for phase in phases] for name in "ABC"])
    members = members[members.any(axis=1)]
    members = np.concatenate([members, np.repeat(members[:1], 3 - len(members), axis=0)])  # one shape
    directions = random_directions(5, 4, 30, seed, shared)
    assert_same(overlaps(directions, members), plain(directions, members), members)
