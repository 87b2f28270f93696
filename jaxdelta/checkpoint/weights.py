"""The weights of a model, a layer at a time: the protocol, and a loaded model. Axes as in model.decoder."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import Decoder


@runtime_checkable
class Weights(Protocol):
    """The weights of a pass: `Checkpoint` reads them, `InMemoryWeights` holds them."""

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters, on the device."""

    def abstract_layer(self, index: int) -> nnx.State:
        """Shapes and dtypes of one layer's parameters."""

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The input embeddings of tokens."""

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The output embeddings of tokens; the input embeddings where the model ties the two."""

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the output embedding."""

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight."""

    def first_bad_tensor(self) -> str | None:
        """The first tensor with a NaN or an infinity, or None."""


@dataclasses.dataclass(frozen=True)
class InMemoryWeights:
    """A loaded model as `Weights`."""

    model: Decoder

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.model.config

    def layer(self, index: int) -> nnx.State:
        """One layer's parameters, cut out of their stack."""
        _, weights, row = self.model.layer(index)
        return _take(weights, row)

    def abstract_layer(self, index: int) -> nnx.State:
        """Shapes and dtypes of one layer's parameters: the stack's without its first axis."""

        def first(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

        return jax.tree.map(first, self.model.layer(index)[1])

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The input embeddings of tokens."""
        return self.model.embed_tokens(jnp.asarray(ids))

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """The output embeddings of tokens."""
        return jnp.take(self.model.head, jnp.asarray(ids), axis=0)

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the output embedding."""
        return self.model.head[start:stop]

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight."""
        return self.model.norm.weight[...]

    def first_bad_tensor(self) -> str | None:
        """The path of the first parameter with a NaN or an infinity, or None."""
        for path, variable in nnx.to_flat_state(nnx.state(self.model, nnx.Param)):
            if not jnp.isfinite(variable[...]).all():
                return ".".join(map(str, path))
        return None


@jax.jit
def _take(stacked: nnx.State, index: int | Array) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[index], stacked)
