"""Spectra against NumPy's float64 SVD, token statistics against their definitions, ranks by hand."""

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdelta.spectra import spectrum
from jaxdelta.spectra.spectrum import MAX_RESIDUAL, METHODS, Spectrum, decompose, host_decompose
from jaxdelta.spectra.token_table import token_products
from jaxdelta.statistics.per_layer.inputs import TokenTable
from jaxdelta.statistics.per_layer.ranks import effective_rank, energy_shares, numerical_rank
from jaxdelta.statistics.per_layer.registry import registered

K = 4


def update_spectrum(delta: jax.Array, k: int, method: str = "gram") -> Spectrum:
    return decompose(delta, k, method)[0]


compiled = jax.jit(update_spectrum, static_argnums=(1, 2))


@pytest.fixture(autouse=True)
def _sixty_four_bits() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def solve(delta: np.ndarray, method: str = "gram", k: int = K) -> Spectrum:
    return jax.tree.map(np.asarray, compiled(delta.astype(np.float32), k, method))


def matrix(kind: str) -> np.ndarray:
    """float32 matrices of the kinds that updates of real models are made of, and their extremes."""
    rng = np.random.default_rng(7)
    wide, tall = rng.normal(size=(40, 56)), rng.normal(size=(56, 40))
    if kind == "power law":
        u, _, v = np.linalg.svd(wide, full_matrices=False)
        wide = u * np.arange(1.0, 41) ** -1.5 @ v
    elif kind == "massive activation":
        wide[3] *= 1000
    elif kind == "duplicated rows":
        wide[20:] = wide[:20]
    elif kind == "rank 1":
        wide = np.outer(rng.normal(size=40), rng.normal(size=56))
    elif kind == "tall, rank 5":
        return (tall[:, :5] @ wide[:5, :40]).astype(np.float32)
    elif kind == "zero":
        wide = np.zeros((40, 56))
    elif kind == "tiny":
        wide = wide * 1e-30
    elif kind == "huge":
        wide = wide * 1e30
    elif kind == "tall":
        return tall.astype(np.float32)
    elif kind == "tall, massive activation":
        tall[3] *= 1000
        return tall.astype(np.float32)
    elif kind == "square":
        return wide[:, :40].astype(np.float32)
    elif kind == "few tokens":
        return wide[:K].astype(np.float32)
    return wide.astype(np.float32)


KINDS = (
    "random",
    "power law",
    "massive activation",
    "duplicated rows",
    "rank 1",
    "tall, rank 5",
    "tiny",
    "huge",
    "tall",
    "tall, massive activation",
    "square",
    "few tokens",
    "zero",
)


@cache
def exact(kind: str) -> tuple[np.ndarray, np.ndarray]:
    _, values, vectors = np.linalg.svd(matrix(kind).astype(np.float64), full_matrices=False)
    return values, vectors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_singular_values_are_those_of_a_float64_svd(kind: str, method: str) -> None:
    found, values = solve(matrix(kind), method).singular_values, exact(kind)[0]
    assert found.dtype == np.float64
    assert np.all(np.diff(found) <= 0)
    # What holds for all of them: eigenvalues of a Gram matrix are exact to a few roundings of σ_1².
    np.testing.assert_allclose(found**2, values**2, rtol=0, atol=1e-13 * values[0] ** 2)
    large = values > 1e-5 * values[0]
    np.testing.assert_allclose(found[large], values[large], rtol=0, atol=1e-10 * values[0])
    if method == "full":
        np.testing.assert_allclose(found, values, rtol=0, atol=1e-13 * values[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
@pytest.mark.parametrize("method", METHODS)
def test_directions_are_those_of_a_float64_svd(kind: str, method: str) -> None:
    found, (values, vectors) = solve(matrix(kind), method).directions, exact(kind)
    energies = np.append(values**2, 0) / values[0] ** 2
    gaps = -np.diff(energies)
    for i in range(K):
        if min(gaps[max(i - 1, 0) : i + 1]) > 1e-4:
            assert abs(found[i] @ vectors[i]) >= 1 - 1e-10
    rank = min(K, numerical_rank(values))
    np.testing.assert_allclose(found @ found.T, np.diag(np.arange(K) < rank), rtol=0, atol=1e-13)
    if gaps[rank - 1] > 1e-4:
        projectors = [basis[:rank].T @ basis[:rank] for basis in (found, vectors)]
        np.testing.assert_allclose(*projectors, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_certificate_of_good_spectra(kind: str, method: str) -> None:
    assert 0 <= solve(matrix(kind), method).residual <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_host_spectrum_agrees_and_is_certified(kind: str) -> None:
    host, device = host_decompose(matrix(kind).astype(np.float64), K)[0], solve(matrix(kind), "full")
    assert host.residual <= 1e-12
    np.testing.assert_allclose(host.singular_values, device.singular_values, rtol=1e-12, atol=1e-300)
    if kind in ("random", "massive activation", "tall"):
        np.testing.assert_allclose(host.directions, device.directions, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["random", "tall", "massive activation"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda values, vectors: (values * (1 + 1e-6), vectors),
        lambda values, vectors: (values, vectors + 1e-5 * np.roll(vectors, 1, axis=1)),
        lambda values, vectors: (values, vectors * (1 + 1e-6)),
        lambda values, vectors: (values, np.roll(vectors, 1, axis=0)),
        lambda values, vectors: (values, np.repeat(vectors[:1], K, axis=0)),
        lambda values, vectors: (np.append(values[:-1], values[-1] + 1e-3 * values[0]), vectors),
        lambda values, vectors: (np.full_like(values, np.nan), vectors),
        lambda values, vectors: (values, np.full_like(vectors, np.nan)),
        lambda values, vectors: (np.zeros_like(values), vectors),
    ],
    ids=["scaled", "turned", "long", "permuted", "repeated", "tail", "nan-values", "nan-vectors", "zero"],
)
def test_certificate_of_wrong_spectra(kind: str, spoil: Any) -> None:
    values, vectors = spoil(exact(kind)[0], exact(kind)[1][:K])
    x = jnp.asarray(matrix(kind), jnp.float64)
    residual = spectrum._residual(x, jnp.asarray(values), jnp.asarray(vectors))
    assert not residual <= MAX_RESIDUAL


@pytest.mark.parametrize("method", METHODS)
def test_zero_update(method: str) -> None:
    found = solve(np.zeros((12, 20)), method)
    assert not found.singular_values.any()
    assert not found.directions.any()
    assert found.residual == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transposed", [False, True])
def test_signs_follow_the_mean_update(method: str, transposed: bool) -> None:
    x = matrix("tall" if transposed else "random") + np.float32(0.5)
    directions = solve(x, method).directions
    along = directions @ x.sum(axis=0, dtype=np.float64)
    assert along[0] > 0
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:K]
    assert np.all(along[np.abs(along) > 1e-3 * values * np.sqrt(x.shape[0])] > 0)


@pytest.mark.parametrize("method", METHODS)
def test_signs_make_the_largest_entry_positive_where_the_mean_is_zero(method: str) -> None:
    x = matrix("random")
    x = np.concatenate([x, -x])  # 80 × 56
    directions = solve(x, method).directions
    assert np.all(directions[np.arange(K), np.abs(directions).argmax(axis=1)] > 0)
    x = x[:, :50].T  # wide, and its rows do not cancel
    x = np.concatenate([x, -x])[:, :56]
    directions = solve(x, method).directions
    assert np.all(directions[np.arange(K), np.abs(directions).argmax(axis=1)] > 0)


@pytest.mark.parametrize("kind", ["random", "power law", "massive activation", "tall"])
def test_signs_are_stable(kind: str) -> None:
    x, rng = matrix(kind), np.random.default_rng(1)
    directions = solve(x).directions
    for _ in range(5):
        permuted = x[rng.permutation(len(x))]
        perturbed = x * (1 + 1e-6 * rng.normal(size=x.shape))
        assert np.all(np.sum(solve(permuted).directions * directions, axis=1) > 0.999)
        assert np.all(np.sum(solve(perturbed).directions * directions, axis=1) > 0.999)


def test_methods_agree() -> None:
    for kind in ("random", "power law", "massive activation", "tall", "square"):
        gram, full = solve(matrix(kind), "gram"), solve(matrix(kind), "full")
        np.testing.assert_allclose(gram.directions, full.directions, rtol=0, atol=1e-9)


def test_batch_of_layers_gives_what_single_layers_give() -> None:
    stack = np.stack([matrix(kind) for kind in ("random", "power law", "massive activation")])
    batched = jax.vmap(lambda x: compiled(x, K, "gram"))(jnp.asarray(stack))
    for i, x in enumerate(stack):
        single = solve(x)
        np.testing.assert_allclose(batched.singular_values[i], single.singular_values, rtol=1e-12)
        np.testing.assert_allclose(batched.directions[i], single.directions, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("method", METHODS)
def test_all_products_are_float64_on_a_gpu(shape: tuple[int, int], method: str) -> None:
    """On a CPU every precision is the same, so what a GPU would round is looked for in its program."""
    argument = jax.ShapeDtypeStruct(shape, np.float32)
    function = jax.jit(partial(update_spectrum, k=K, method=method))
    text = jax.export.export(function, platforms=["cuda"])(argument).mlir_module()
    lines = [line for line in text.splitlines() if " = stablehlo." in line]
    products = [line for line in lines if "stablehlo.dot_general" in line]
    assert len(products) >= 4
    assert any("cusolver_syevd" in line or "cusolver_gesvd" in line for line in lines)
    # Nothing is computed in float32: the only place it occurs is where the argument is cast.
    narrow = [line for line in lines if re.search(r"tensor<[\dx]*f32>|TF32", line)]
    assert len(narrow) == 1
    assert "stablehlo.convert" in narrow[0]


def definitions(delta: np.ndarray, h: np.ndarray) -> dict[str, float]:
    """The reference's statistics, token by token."""
    delta, h = delta.astype(np.float64), h.astype(np.float64)
    norms = [np.sqrt(sum(row**2)) for row in delta]
    h_norms = [np.sqrt(sum(row**2)) for row in h]
    steps = [a / max(b, 1e-8) for a, b in zip(norms, h_norms, strict=True)]
    cosines = [sum(x * y) / max(a * b, 1e-8) for x, y, a, b in zip(delta, h, norms, h_norms, strict=True)]
    return {
        "frob": np.sqrt((delta**2).sum()),
        "token_norm_mean": np.mean(norms),
        "token_norm_std": np.std(norms, ddof=0),
        "h_norm_mean": np.mean(h_norms),
        "rel_step_mean": np.mean(steps),
        "rel_step_std": np.std(steps, ddof=0),
        "parallel_frac": np.mean(np.abs(cosines)),
        "cos_delta_h_mean": np.mean(cosines),
    }


@pytest.mark.parametrize("case", ["random", "zero rows of h", "zero rows of δ", "zero", "tiny", "one token"])
def test_token_statistics_by_the_definitions(case: str) -> None:
    rng = np.random.default_rng(3)
    delta, h = rng.normal(size=(2, 30, 16)).astype(np.float32)
    h += 0.3 * delta
    if case == "zero rows of h":
        h[::3] = 0
    elif case == "zero rows of δ":
        delta[::2] = 0
    elif case == "zero":
        delta[:] = 0
    elif case == "tiny":  # both floors of 1e-8 are reached
        delta, h = delta * np.float32(1e-6), h * np.float32(1e-9)
    elif case == "one token":
        delta, h = delta[:1], h[:1]
    products = token_products(jnp.asarray(delta), jnp.asarray(h))
    table = TokenTable(*map(np.asarray, products), np.arange(len(delta)) % 3, np.ones((1, 3)))
    wanted = definitions(delta, h)
    for one in registered("tokens"):
        found = one.function(table)[0]
        np.testing.assert_allclose(found, wanted[one.name], rtol=1e-12, atol=1e-14, err_msg=one.name)
    assert np.sqrt(table.sum(table.update_energy)[0]) == pytest.approx(wanted["frob"], rel=1e-12)


def test_ranks_by_hand() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7, rel=1e-14)
    assert effective_rank(np.array([3.0, 0, 0])) == 1
    # p = (0.8, 0.2): exp of 0.8 ln 1.25 + 0.2 ln 5
    assert effective_rank(np.array([2.0, 1.0])) == pytest.approx(1.25**0.8 * 5**0.2, rel=1e-14)
    # p_2 = 1e-14 is left out; with it the rank would be 1 + 3.3e-13.
    assert effective_rank(np.array([1.0, 1e-7])) - 1 < 5e-14
    assert effective_rank(np.zeros(5)) == 0
    assert numerical_rank(np.array([1.0, 1e-3, 2e-7, 1e-7, 0])) == 3
    assert numerical_rank(np.zeros(5)) == 0
    np.testing.assert_allclose(energy_shares(np.array([2.0, 1.0])), [0.8, 0.2], rtol=1e-15)
    assert not energy_shares(np.zeros(5)).any()


spectra = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e6, allow_subnormal=False)).map(
    lambda values: np.sort(values)[::-1]
)


@settings(deadline=None, max_examples=200)
@given(spectra, st.floats(1e-10, 1e10))
def test_ranks_of_any_spectrum(values: np.ndarray, scale: float) -> None:
    values = np.where(values < 1e-100, 0, values)
    shares, rank = energy_shares(values), effective_rank(values)
    nonzero = np.count_nonzero(values)
    if nonzero == 0:
        assert rank == 0
        return
    assert 1 - 1e-9 <= rank <= nonzero * (1 + 1e-9)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert np.all(np.diff(shares) <= 0)
    np.testing.assert_allclose(energy_shares(values * scale), shares, rtol=1e-9, atol=1e-15)
    # p > 1e-12 is a step: a share at its very edge may fall to either side of it.
    assert effective_rank(values * scale) == pytest.approx(rank, rel=1e-9)
    assert 1 <= numerical_rank(values) <= nonzero


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, (6, 9), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)))
def test_any_small_matrix_is_certified(x: np.ndarray) -> None:
    x = np.where(np.abs(x) < 1e-20, 0, x).astype(np.float32)
    found = solve(x)
    assert found.residual <= 1e-12
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found.singular_values**2, values**2, rtol=0, atol=1e-13 * values[0] ** 2)
