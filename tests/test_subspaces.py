"""Principal angles and alignment against SciPy and plain NumPy."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from test_overlap import masks, random_directions

from jaxdelta.statistics.across_layers.overlap import overlaps, principal_angles
from jaxdelta.statistics.across_layers.subspaces import alignment_index


@pytest.mark.parametrize(("layers", "k", "d"), [(1, 3, 10), (5, 1, 12), (6, 8, 40), (4, 5, 5)])
def test_angles_are_scipys(layers: int, k: int, d: int) -> None:
    directions = random_directions(layers, k, d, shared=0.7)
    found = principal_angles(directions)
    for i in range(layers):
        for j in range(layers):
            angles = subspace_angles(directions[i].T, directions[j].T)[::-1]
            np.testing.assert_allclose(found.cosines[i, j], np.cos(angles), rtol=0, atol=1e-12)
            np.testing.assert_allclose(found.grassmann_distance[i, j], np.linalg.norm(angles), atol=2e-7)
            sines = np.linalg.norm(np.sin(angles))
            np.testing.assert_allclose(found.projection_distance[i, j], sines, atol=2e-7)


def test_angles_of_a_layer_without_directions() -> None:
    directions = random_directions(3, 4, 20)
    directions[1] = 0
    found = principal_angles(directions)
    assert not found.cosines[1].any()
    np.testing.assert_allclose(found.projection_distance[1], 2.0)
    np.testing.assert_allclose(found.grassmann_distance[1], np.pi)


def test_small_angles_are_right_to_1e_8() -> None:
    first = random_directions(1, 2, 20)[0]
    aside = np.linalg.qr(np.concatenate([first, random_directions(1, 2, 20, seed=1)[0]]).T)[0].T[2:]
    for angle in (1e-2, 1e-4, 1e-6):
        turned = np.cos(angle) * first + np.sin(angle) * aside
        found = principal_angles(np.stack([first, turned]))
        np.testing.assert_allclose(found.grassmann_distance[0, 1], np.sqrt(2) * angle, rtol=0, atol=1e-8)


def updates(layers: int, n: int, d: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    common = rng.normal(size=(5, d))
    loud = rng.normal(size=(layers, n, 5)) @ common
    return (loud + rng.normal(size=(layers, n, d))).astype(np.float32)


@pytest.mark.parametrize(("phases", "k"), [("AAABBC", 4), ("AAAAAA", 8), ("AABBCC", 1)])
def test_alignment_is_its_definition(phases: str, k: int) -> None:
    delta, members = updates(6, 50, 30), masks(phases)
    delta[3, 10:] = 0  # tokens that a mask has emptied
    _, values, vectors = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    found = alignment_index(vectors[:, :k], members, list(delta), values)
    for p, inside in enumerate(members):
        for layer in range(6):
            others = [i for i in np.flatnonzero(inside) if i != layer]
            if not inside[layer] or not others:
                assert np.isnan(found[p, layer])
                continue
            basis = np.linalg.svd(vectors[others, :k].reshape(-1, 30), full_matrices=False)[2][:8]
            held = np.sum((delta[layer].astype(np.float64) @ basis.T) ** 2)
            wanted = held / np.sum(values[layer, : len(basis)] ** 2)
            np.testing.assert_allclose(found[p, layer], wanted, rtol=1e-10)
    assert np.nanmax(found) <= 1 + 1e-12


def test_alignment_of_and_among_zero_layers() -> None:
    delta, members = updates(4, 20, 16), masks("AABB")
    delta[0] = 0
    _, values, vectors = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    directions = vectors[:, :3].copy()
    directions[0] = 0
    found = alignment_index(directions, members, list(delta), values)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1, 2:]).all()


def test_leaving_a_layer_out_removes_what_it_gave_itself() -> None:
    """Random layers: the phase captures its own by construction, the others by chance, about 8/d."""
    directions, members = random_directions(6, 8, 400), masks("AAAAAA")
    found = overlaps(directions, members)
    assert found.capture.mean() > 0.1
    assert found.leave_one_out.mean() < 4 * 8 / 400
