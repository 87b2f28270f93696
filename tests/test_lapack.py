"""Decompositions: right, and on a CPU never in batches, whose threads may wait for each other forever."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdelta.spectra import _lapack, linalg

DECOMPOSITIONS = [linalg.eigh, linalg.orthonormal, linalg.svd]
TALL = np.random.default_rng(0).standard_normal((4, 3, 7, 5))


@pytest.mark.parametrize("decompose", DECOMPOSITIONS)
def test_a_cpu_takes_one_matrix_after_the_other(decompose: Callable[..., Any]) -> None:
    x = TALL[0] if decompose is not linalg.eigh else TALL[0] @ TALL[0].swapaxes(1, 2)
    several = jax.jit(jax.vmap(decompose))
    with jax.enable_x64(True):
        text = several.lower(x).compile().as_text()
    calls = [line for line in text.splitlines() if re.search(r'custom_call_target="lapack_', line)]
    assert calls
    for line in calls:
        assert not re.search(r"f64\[\d+,\d+,\d+\]", line), line


def test_a_gpu_takes_all_at_once() -> None:
    with jax.enable_x64(True):
        lowered = jax.export.export(jax.jit(jax.vmap(linalg.eigh)), platforms=["cuda"])(np.zeros((3, 5, 5)))
    calls = [line for line in lowered.mlir_module().splitlines() if "custom_call" in line and "syevd" in line]
    assert calls
    assert all("tensor<3x5x5xf64>" in line for line in calls)


def test_eigenvalues_and_eigenvectors_of_nested_batches() -> None:
    symmetric = TALL @ TALL.swapaxes(2, 3)
    with jax.enable_x64(True):
        # Only the lower triangle is looked at.
        values, vectors = map(np.asarray, jax.vmap(jax.vmap(linalg.eigh))(jnp.tril(symmetric)))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(symmetric), atol=1e-12)
    np.testing.assert_allclose(symmetric @ vectors, vectors * np.expand_dims(values, 2), atol=1e-12)


def test_orthonormal_columns_and_singular_values() -> None:
    with jax.enable_x64(True):
        q = np.asarray(jax.vmap(jax.vmap(linalg.orthonormal))(TALL))
        left, values, right = map(np.asarray, jax.vmap(jax.vmap(linalg.svd))(TALL))
    np.testing.assert_allclose(q.swapaxes(2, 3) @ q, np.broadcast_to(np.eye(5), (4, 3, 5, 5)), atol=1e-14)
    np.testing.assert_allclose(q @ (q.swapaxes(2, 3) @ TALL), TALL, atol=1e-12)
    np.testing.assert_allclose(np.expand_dims(values, 2) * left @ right, TALL, atol=1e-12)


@pytest.mark.parametrize("kind", ["full rank", "low rank", "zero", "equal"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (2, 2), (3, 1), (90, 7), (90, 90)])
def test_the_largest_eigenvalues_vectors(m: int, k: int, kind: str) -> None:
    x = np.random.default_rng(1).standard_normal((m, 2 * m))
    matrices = {
        "full rank": x @ x.T,
        "low rank": np.outer(x[:, 0], x[:, 0]),
        "zero": 0 * x @ x.T,
        "equal": 3 * np.eye(m),
    }
    matrix = matrices[kind]
    values, vectors = _lapack.largest(matrix, k)
    wanted, scale = np.linalg.eigvalsh(matrix), max(matrix.trace(), 1)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(matrix @ vectors, vectors * wanted[-k:], rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)


def test_a_solver_that_fails_leaves_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "eigh", fails)
    matrix = np.eye(4)
    matrix[1, 2] = matrix[2, 1] = np.nan
    found = [linalg.eigh(matrix), _lapack.largest(matrix, 2)]
    monkeypatch.setattr(_lapack, "_lapack_function", lambda name: None)  # of 64-bit integers
    for values, vectors in [*found, _lapack.largest(np.eye(4), 2)]:
        assert np.isnan(values).all() and np.isnan(vectors).all()


def test_the_host_calls_of_several_threads_are_apart() -> None:
    x = np.random.default_rng(2).standard_normal((8, 60, 90))
    squares = x @ x.swapaxes(1, 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda square: _lapack.largest(square, 5), np.tile(squares, (8, 1, 1))))
    for place, (values, vectors) in enumerate(found):
        alone = _lapack.largest(squares[place % 8], 5)
        np.testing.assert_array_equal(values, alone[0])
        np.testing.assert_array_equal(vectors, alone[1])
