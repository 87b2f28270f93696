"""Mixtures of experts against the plain sum over all experts, whatever the router does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdelta.model.config import Experts
from jaxdelta.model.experts import SparseMLP, route
from jaxdelta.model.layers import Init, contract

HIDDEN, INNER = 12, 20


def sparse_mlp(count: int = 5, per_token: int = 2, renormalise: bool = True, seed: int = 0) -> SparseMLP:
    experts = Experts(count, per_token, INNER, renormalise, (0,))
    graph, weights = nnx.split(nnx.eval_shape(lambda: create(experts)))
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graph,
        jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 3), weights),
    )


def create(experts: Experts) -> SparseMLP:
    return SparseMLP(HIDDEN, experts, Init())


def tokens(count: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, HIDDEN), np.float32))


def plain(mlp: SparseMLP, x: jax.Array) -> jax.Array:
    """Σ_e s_e expert_e(x) over all experts, with s_e = 0 for those not chosen."""
    p = jax.nn.softmax(contract("nd,ed->ne", x, mlp.gate.weight[...]), axis=-1)
    shares = jnp.where(p >= jnp.sort(p, axis=-1)[:, [-mlp.settings.per_token]], p, 0)
    if mlp.settings.renormalise:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    shares = shares.astype(x.dtype).astype(jnp.float32)
    gate, up, down = (getattr(mlp.experts, f"{name}_proj").weight[...] for name in ("gate", "up", "down"))
    inner = jax.nn.silu(contract("nd,efd->nef", x, gate)) * contract("nd,efd->nef", x, up)
    written = contract("nef,edf->ned", inner.astype(x.dtype), down)
    return jnp.einsum("ne,ned->nd", shares, written, precision="highest")


def relative(found: jax.Array, wanted: jax.Array) -> float:
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def both(mlp: SparseMLP, x: jax.Array) -> list[jax.Array]:
    graph, weights = nnx.split(mlp)
    return [jax.jit(lambda w, f=f: f(nnx.merge(graph, w), x))(weights) for f in (SparseMLP.__call__, plain)]


@pytest.mark.parametrize(
    ("count", "per_token", "rows", "renormalise", "dtype"),
    [
        (5, 2, 1, True, "float32"),
        (5, 1, 7, True, "float32"),
        (5, 2, 333, False, "float32"),
        (5, 2, 333, True, "bfloat16"),
        (3, 3, 200, False, "bfloat16"),
        (1, 1, 40, False, "float32"),
        (300, 4, 50, True, "float32"),
    ],
)
def test_equals_the_plain_sum(count: int, per_token: int, rows: int, renormalise: bool, dtype: str) -> None:
    found, wanted = both(sparse_mlp(count, per_token, renormalise), tokens(rows).astype(dtype))
    assert found.dtype == jnp.float32
    assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("favourite", [0, 2, 4])
def test_all_tokens_may_choose_one_expert(favourite: int) -> None:
    mlp, x = sparse_mlp(per_token=1), jnp.abs(tokens(250))
    mlp.gate.weight[...] = mlp.gate.weight[...].at[favourite].set(30)
    np.testing.assert_array_equal(route(mlp.gate(x), mlp.settings)[1], np.full((250, 1), favourite))
    assert relative(*both(mlp, x)) <= 1e-6


def test_experts_without_tokens_change_nothing() -> None:
    mlp, x, unused = sparse_mlp(), jnp.abs(tokens(90)), jnp.array([1, 3])
    mlp.gate.weight[...] = mlp.gate.weight[...].at[unused].set(-30)
    before, wanted = both(mlp, x)
    assert relative(before, wanted) <= 1e-6
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(mlp.experts, name).weight
        weight[...] = weight[...].at[unused].set(jnp.nan)
    np.testing.assert_array_equal(both(mlp, x)[0], before)


def test_shares() -> None:
    scores = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]))
    shares, chosen = route(scores, Experts(4, 2, INNER, False, (0,)))
    np.testing.assert_array_equal(chosen, [[1, 3], [0, 2]])
    np.testing.assert_allclose(shares, [[0.4, 0.3], [0.7, 0.15]], rtol=1e-6)
    shares, _ = route(scores, Experts(4, 2, INNER, True, (0,)))
    np.testing.assert_allclose(shares, [[4 / 7, 3 / 7], [14 / 17, 3 / 17]], rtol=1e-6)


def test_gradient() -> None:
    x = tokens(70)
    graph, weights = nnx.split(sparse_mlp())

    def of(function) -> nnx.State:
        return jax.jit(jax.grad(lambda w: jnp.square(function(nnx.merge(graph, w), x)).sum()))(weights)

    for found, wanted in zip(*(jax.tree.leaves(of(f)) for f in (lambda m, x: m(x), plain)), strict=True):
        assert relative(found, wanted) <= 1e-5


def test_products_are_whole_on_a_gpu() -> None:
    text = jax.jit(lambda x: sparse_mlp()(x)).trace(tokens(70)).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"(?:stablehlo|chlo)\.(?:dot_general|dot|ragged_dot)\b.*", text)
    assert len(products) == 4
    assert [p for p in products if "precision = [HIGHEST, HIGHEST]" not in p] == []


def test_no_expert_is_cast_before_it_is_used() -> None:
    """All experts in float32 would be twice the bfloat16 layer's own size."""
    mlp = sparse_mlp(count=64)
    graph, weights = nnx.split(mlp)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    compiled = jax.jit(lambda w, x: nnx.merge(graph, w)(x)).lower(weights, tokens(8)).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights["experts"]))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size
