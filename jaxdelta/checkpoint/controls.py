"""Control runs: the same analysis on randomised weights or a randomised text.

`random_init`: weights drawn as before training. `permuted_weights`: every tensor's entries in random order.
`shuffled_tokens`: the text's tokens in random order. `random_tokens`: ids drawn uniformly from the rows of
the embedding (a few of which may be padding: 267 of Qwen3's 151,936).

A statistic that is the same in a control says nothing about what the model learnt. A control that works has
a loss of ln(vocabulary) or more on the text.

Weights are randomised as they are read, by layer or slice of an embedding, so a control streams, too. Draws
depend only on the seed and the tensor's name. Only some rows of an embedding are in memory at a time, so each
is drawn or permuted by itself; permuted rows keep their norms and the order of the vocabulary.
"""

import dataclasses
import math
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.layers import initial_norm
from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.arrays import AnyArray

CONTROLS = ("random_init", "permuted_weights", "shuffled_tokens", "random_tokens")
_ROUNDS = 2


def controlled(weights: Weights, tokens: Tokens, control: str | None, seed: int) -> tuple[Weights, Tokens]:
    """The weights and the text of a control run; unchanged without a control.

    Only the text's ids change: documents keep their positions and sizes.
    """
    rng = _generator(seed, "tokens")
    if control == "random_init":
        weights = RandomInit(weights, seed)
    elif control == "permuted_weights":
        weights = PermutedWeights(weights, seed)
    elif control == "shuffled_tokens":
        ids = rng.permutation(tokens.ids.ravel()).reshape(tokens.ids.shape)
        tokens = dataclasses.replace(tokens, ids=ids)
    elif control == "random_tokens":
        ids = rng.integers(0, weights.config.vocab_size, tokens.ids.shape, np.int32)
        tokens = dataclasses.replace(tokens, ids=ids)
    return weights, tokens


@dataclasses.dataclass(frozen=True)
class _Control:
    """The parts of a model that its controls leave unchanged."""

    weights: Weights
    seed: int

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.weights.config

    def abstract_layer(self, index: int) -> nnx.State:
        """Shapes and dtypes of one layer's parameters."""
        return self.weights.abstract_layer(index)

    def first_bad_tensor(self) -> str | None:
        """The model's first tensor with a NaN or an infinity, or None."""
        return self.weights.first_bad_tensor()

    @property
    def _head(self) -> str:
        return "embedding" if self.config.tie_embeddings else "head"


class RandomInit(_Control):
    """Weights as transformers draws them: N(0, initializer_range²), norms 1, biases 0."""

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters; none are read."""

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
            name = _name(index, path)
            if len(leaf.shape) == 1:
                initial = jnp.zeros if "bias" in name else initial_norm
                return initial(leaf.shape, leaf.dtype)
            return _normal(self._key(name), self.config.initializer_range, leaf.shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, self.abstract_layer(index))

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The input embeddings of tokens."""
        return self._rows("embedding", ids, self.weights.embeddings(np.zeros(1, np.int32)).dtype)

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The output embeddings of tokens."""
        return self._rows(self._head, ids, self.weights.head_slice(0, 1).dtype)

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the output embedding."""
        return self.head_rows(np.arange(start, stop))

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight."""
        weight = self.weights.final_norm()
        return initial_norm(weight.shape, weight.dtype)

    def _rows(self, name: str, ids: Int[np.ndarray, "*batch"], dtype: DTypeLike) -> Array:
        width, deviation = self.config.hidden_size, self.config.initializer_range
        rows = _normal_rows(self._key(name), jnp.asarray(ids.ravel()), deviation, width, dtype)
        return rows.reshape(*ids.shape, width)

    def _key(self, name: str) -> Array:
        return jax.random.key(_generator(self.seed, name).integers(2**32))


class PermutedWeights(_Control):
    """The entries of every tensor of a layer, and of each row of the embedding and the head, permuted.

    A uniformly random permutation needs a sort, which takes seconds per layer on a CPU. Instead, a matrix has
    two random permutations p_1 and p_2, shared by its rows, and each row random shifts s_1 and s_2: entry j
    comes from p_2(p_1(j + s_1) + s_2), sums modulo the row's length. Rows are permuted in this way, then
    columns, then rows again. Any entry, and any pair of entries, may land anywhere, though not every
    permutation is possible. Each expert's matrix is permuted by itself; norms and biases uniformly.
    """

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.weights.layer(index))
        # Popped, so that a tensor's memory is free once it is permuted.
        permuted = [self._tensor(index, *leaves.pop(0)) for _ in range(len(leaves))]
        return jax.tree_util.tree_unflatten(tree, permuted)

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The input embeddings of tokens."""
        return self._rows("embedding", ids, self.weights.embeddings(ids))

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The output embeddings of tokens."""
        return self._rows(self._head, ids, self.weights.head_rows(ids))

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the output embedding."""
        return self._rows(self._head, np.arange(start, stop), self.weights.head_slice(start, stop))

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight."""
        return self._tensor("final norm", (), self.weights.final_norm())

    def _tensor(self, layer: int | str, path: Any, tensor: Array) -> Array:
        rng = _generator(self.seed, _name(layer, path))
        if tensor.ndim == 1:
            return tensor[rng.permutation(tensor.size)]
        orders = [_orders(rng, *tensor.shape[-2:]) for _ in range(math.prod(tensor.shape[:-2]))]
        return _permute(tensor, jax.tree.map(lambda *parts: np.stack(parts), *orders))

    def _rows(self, name: str, ids: Int[np.ndarray, "*batch"], rows: Array) -> Array:
        rng = _generator(self.seed, name)
        places, shifts = _order(rng, self.config.vocab_size, self.config.hidden_size)
        flat = rows.reshape(-1, rows.shape[-1])
        return _permute_rows(flat, (places, shifts[:, ids.ravel()])).reshape(rows.shape)


# p_1 and p_2, and each row's s_1 and s_2; see PermutedWeights.
_Order = tuple[Int32[AnyArray, "rounds _"], Int32[AnyArray, "rounds _"]]


def _generator(seed: int, name: str) -> np.random.Generator:
    """A tensor's own generator, so that draws do not depend on the order of reading."""
    return np.random.default_rng([seed, crc32(name.encode())])


def _name(layer: int | str, path: Any) -> str:
    return f"{layer}{jax.tree_util.keystr(path)}"


def _orders(rng: np.random.Generator, rows: int, columns: int) -> tuple[_Order, _Order, _Order]:
    """The orders of a matrix's rows, columns, and rows again."""
    return _order(rng, rows, columns), _order(rng, columns, rows), _order(rng, rows, columns)


def _order(rng: np.random.Generator, rows: int, columns: int) -> _Order:
    places = np.stack([rng.permutation(columns) for _ in range(_ROUNDS)])
    return places.astype(np.int32), rng.integers(0, columns, (_ROUNDS, rows), np.int32)


@jax.jit
def _permute(tensor: Float[Array, "*experts R C"], orders: Any) -> Float[Array, "*experts R C"]:
    """Permutes one matrix, or several one after the other."""

    def permute(part: Any) -> Array:
        matrix, (first, second, third) = part
        return _permute_rows(_permute_rows(_permute_rows(matrix, first).T, second).T, third)

    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    return jax.lax.map(permute, (matrices, orders)).reshape(tensor.shape)


@jax.jit
def _permute_rows(rows: Float[Array, "R C"], order: _Order) -> Float[Array, "R C"]:
    columns = rows.shape[1]
    source = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), rows.shape)
    for places, shifts in zip(*order, strict=True):
        source = places[(source + shifts[:, None]) % columns]
    return jnp.take_along_axis(rows, source, axis=1)


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key: Array, deviation: float | Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@partial(jax.jit, static_argnums=(3, 4))
def _normal_rows(
    key: Array, ids: Int[Array, " rows"], deviation: float | Array, width: int, dtype: DTypeLike
) -> Float[Array, "rows width"]:
    """Rows that depend only on their ids."""
    return jax.vmap(lambda row: _normal(jax.random.fold_in(key, row), deviation, (width,), dtype))(ids)
