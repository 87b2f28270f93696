"""Controls: the same run on weights, or on a text, from which what was learnt or written has been taken.

`random_init`: weights drawn as before training. `permuted_weights`: every tensor keeps its entries and loses
their order. `shuffled_tokens`: the text's tokens in random order. `random_tokens`: ids drawn uniformly from
the rows of the embedding (a few of which may be no token: padding, 267 of Qwen3's 151,936).

A figure that a control shares with the real run tells nothing of what the model learnt. The loss on the text
says whether the control is one: ln(vocabulary) or more where nothing is left.

Weights are changed one layer, or one slice of an embedding, at a time as they are read, so that a control
streams; what is drawn depends on the seed and the tensor's name alone. Of the embedding and the head, only
some rows are ever in memory: rows are drawn one by one, or permuted each within itself, and so keep their
norms and the order of the vocabulary.
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
    """The weights and the text of a control's run; without a control, of the real one.

    Of a text only the ids change: documents keep their places and sizes.
    """
    rng = _generator(seed, "tokens")
    if control == "random_init":
        weights = RandomInit(weights, seed)
    elif control == "permuted_weights":
        weights = PermutedWeights(weights, seed)
    elif control == "shuffled_tokens":
        tokens = dataclasses.replace(
            tokens, ids=rng.permutation(tokens.ids.ravel()).reshape(tokens.ids.shape)
        )
    elif control == "random_tokens":
        ids = rng.integers(0, weights.config.vocab_size, tokens.ids.shape, np.int32)
        tokens = dataclasses.replace(tokens, ids=ids)
    return weights, tokens


@dataclasses.dataclass(frozen=True)
class _Control:
    """What both controls of the weights leave as it is."""

    weights: Weights
    seed: int

    @property
    def config(self) -> ModelConfig:
        """The model's own: a control changes no size."""
        return self.weights.config

    def abstract_layer(self, index: int) -> nnx.State:
        """Shapes and dtypes of a layer's parameters, as the model has them."""
        return self.weights.abstract_layer(index)

    def first_bad_tensor(self) -> str | None:
        """A tensor of the model's that holds a NaN or an infinity, or None."""
        return self.weights.first_bad_tensor()

    @property
    def _head(self) -> str:
        return "embedding" if self.config.tie_embeddings else "head"


class RandomInit(_Control):
    """Weights as transformers draws them: N(0, initializer_range²), norms 1, biases 0. No layer is read."""

    def layer(self, index: int) -> nnx.State:
        """The layer's parameters, drawn: the same seed and name give the same tensor."""

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
            name = _name(index, path)
            if len(leaf.shape) == 1:
                initial = jnp.zeros if "bias" in name else initial_norm
                return initial(leaf.shape, leaf.dtype)
            return _normal(self._key(name), self.config.initializer_range, leaf.shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, self.abstract_layer(index))

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the embedding by token id, each drawn by itself."""
        return self._rows("embedding", ids, self.weights.embeddings(np.zeros(1, np.int32)).dtype)

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the head by token id: the embedding's, where the model ties the two."""
        return self._rows(self._head, ids, self.weights.head_slice(0, 1).dtype)

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the head."""
        return self.head_rows(np.arange(start, stop))

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight as before training."""
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

    A uniformly random permutation is a sort, which costs seconds a layer on a CPU. Here a matrix' rows share
    random permutations p_r of their places and have random shifts s_r of their own: place j is filled from
    p_2(p_1(j + s_1) + s_2), sums modulo the row's length. So its rows are permuted, then its columns, then
    its rows again. An entry may land anywhere, and two entries anywhere together, though not every order of
    all can come out. An expert's matrix is a tensor of its own; norms and biases are permuted uniformly.
    """

    def layer(self, index: int) -> nnx.State:
        """The layer's parameters, each tensor's entries in another order."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.weights.layer(index))
        # Popped, so that each tensor can go when it has been permuted.
        permuted = [self._tensor(index, *leaves.pop(0)) for _ in range(len(leaves))]
        return jax.tree_util.tree_unflatten(tree, permuted)

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the embedding by token id, each with its entries permuted: it keeps its norm."""
        return self._rows("embedding", ids, self.weights.embeddings(ids))

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the head by token id, permuted as the embedding's where the model ties the two."""
        return self._rows(self._head, ids, self.weights.head_rows(ids))

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the head, permuted as `head_rows` does."""
        return self._rows(self._head, np.arange(start, stop), self.weights.head_slice(start, stop))

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight, its entries permuted."""
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


# Permutations of places that all rows share, and each row's shifts.
_Order = tuple[Int32[AnyArray, "rounds _"], Int32[AnyArray, "rounds _"]]


def _generator(seed: int, name: str) -> np.random.Generator:
    """One for each tensor: what it gives depends on no order of reading."""
    return np.random.default_rng([seed, crc32(name.encode())])


def _name(layer: int | str, path: Any) -> str:
    return f"{layer}{jax.tree_util.keystr(path)}"


def _orders(rng: np.random.Generator, rows: int, columns: int) -> tuple[_Order, _Order, _Order]:
    """Of a matrix' rows, columns, and rows again."""
    return _order(rng, rows, columns), _order(rng, columns, rows), _order(rng, rows, columns)


def _order(rng: np.random.Generator, rows: int, columns: int) -> _Order:
    places = np.stack([rng.permutation(columns) for _ in range(_ROUNDS)])
    return places.astype(np.int32), rng.integers(0, columns, (_ROUNDS, rows), np.int32)


@jax.jit
def _permute(tensor: Float[Array, "*experts R C"], orders: Any) -> Float[Array, "*experts R C"]:
    """A matrix, or several, one at a time."""

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
    """Each row from a key of its own: the same wherever it is asked for."""
    return jax.vmap(lambda row: _normal(jax.random.fold_in(key, row), deviation, (width,), dtype))(ids)
