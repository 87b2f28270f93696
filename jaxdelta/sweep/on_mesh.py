"""The pass, the spectra and the moments on several devices.

A layer passes on each device its own windows, whatever is in it (sorting tokens by expert, too): no device
waits for another but for sums over `model`. What a layer wrote into a short text then comes together on all
devices, and each computes the spectra of its own layers. A long text's moments are added up on each device of
all windows it has, and summed over devices once a layer; the layers are solved on the devices in turn.

Axes: as in `jaxdelta.model.decoder` and `jaxdelta.spectra.moments.sums`; D devices.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxdelta.checkpoint.checkpoint import Checkpoint
from jaxdelta.checkpoint.weights import Weights
from jaxdelta.model.attention import Context
from jaxdelta.model.config import ModelConfig
from jaxdelta.sweep import sweep
from jaxdelta.sweep.mesh import DATA, WHOLE, Grid, weight_spec
from jaxdelta.sweep.states import State
from jaxdelta.sweep.sweep import Sweep, Update


@dataclasses.dataclass(frozen=True)
class SplitWeights:
    """Weights as the devices of a grid have them.

    Of a checkpoint each process reads the rows it needs. Others, as a control's, are made whole on one device
    of every process. `embeddings` are as they come, of the tokens that are asked for.
    """

    weights: Weights
    grid: Grid

    @property
    def config(self) -> ModelConfig:
        """The model's own: that of all devices together."""
        return self.weights.config

    def layer(self, index: int) -> nnx.State:
        """A layer's parameters, each split over `model` as `weight_spec` says."""

        def place(path: Any, shape: tuple[int, ...], read: Callable[..., np.ndarray]) -> Array:
            return self.grid.place(shape, weight_spec(path, len(shape)), read)

        if isinstance(self.weights, Checkpoint):
            return self.weights.placed_layer(index, place)
        return _by_path(
            lambda path, leaf: self.grid.put(leaf, weight_spec(path, leaf.ndim)), self.weights.layer(index)
        )

    def abstract_layer(self, index: int) -> nnx.State:
        """Shapes and dtypes of a layer's parameters, with their places on the grid."""

        def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = self.grid.split(weight_spec(path, len(leaf.shape)))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return _by_path(placed, self.weights.abstract_layer(index))

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the embedding by token id, as the weights give them."""
        return self.weights.embeddings(ids)

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        """Rows of the head by token id, on every device."""
        return self.grid.put(self.weights.head_rows(ids))

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        """Rows `start` to `stop` of the head, split over `model` where it divides their number."""
        axis = None if (stop - start) % self.grid.model else "model"
        return self.grid.put(self.weights.head_slice(start, stop), PartitionSpec(axis))

    def final_norm(self) -> Float[Array, " D"]:
        """The final norm's weight, on every device."""
        return self.grid.put(self.weights.final_norm())

    def first_bad_tensor(self) -> str | None:
        """A tensor that holds a NaN or an infinity, or None."""
        return self.weights.first_bad_tensor()


def _by_path(function: Callable[[Any, Any], Any], layer: nnx.State) -> nnx.State:
    flat = nnx.to_flat_state(layer)
    return nnx.from_flat_state(
        [(path, leaf.replace(function(path, leaf.get_value()))) for path, leaf in flat]
    )


class SplitSweep(Sweep):
    """The pass on a grid. A state on the host is the process' own windows of a block."""

    def __init__(self, grid: Grid, weights: Weights, *arguments: Any):
        super().__init__(SplitWeights(weights, grid), *arguments)
        self._grid = grid
        self._states.fetch, self._states.put = grid.to_host, grid.to_devices
        if grid.model > 1:  # All pairs: what is split over devices is not taken one by one.
            self._at_once = len(self.tokens[0]) * weights.config.num_kv_heads
        self._positions = [self._own(part) if part is not None else None for part in self._positions]

    def _own(self, windows: np.ndarray) -> Array:
        return self._grid.to_devices(self._grid.mine(windows))

    @cached_property
    def _rows(self) -> list[Any]:
        # An update of all tokens stays where they are.
        return [None] * len(self.tokens) if self._whole else super()._rows

    def _put_context(self, context: Context) -> Context:
        positions = dataclasses.replace(context, positions=None)
        return jax.tree.map(self._grid.put, positions)

    def _abstract_state(self) -> State:
        abstract: Any = partial(jax.ShapeDtypeStruct, sharding=self._grid.split())
        return State(*(abstract(part.shape, part.dtype) for part in super()._abstract_state()))

    def _lower(self, graph: Any, layer: nnx.State, context: Context) -> Any:
        positions = None if context.positions is None else DATA
        specs = dataclasses.replace(context, rotary=WHOLE, window=WHOLE, positions=positions)
        over = partial(inspect.unwrap(sweep._step), graph, rows=None)
        own = self._grid.over(DATA, over, (WHOLE, DATA, DATA, specs), DATA)

        def step(layer: nnx.State, h: Array, written: Array, context: Context, rows: Any) -> Any:
            h, written, update = own(layer, h, written, context)
            return h, written, update if rows is None else jax.tree.map(lambda part: part[rows], update)

        split, everywhere = self._grid.split(), self._grid.everywhere
        placed = jax.tree.map(lambda leaf: leaf.sharding, layer), split, split
        inputs = (*placed, jax.tree.map(self._grid.split, specs), everywhere)
        outputs = split, split, split if self._whole else everywhere
        compiled = jax.jit(step, donate_argnums=2, in_shardings=inputs, out_shardings=outputs)
        return compiled.lower(layer, *self._abstract_state(), context, self._rows[0])

    def _enter(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "b T D"]:
        return super()._enter(self._grid.mine(tokens))

    @cached_property
    def _norm(self) -> Callable[..., Any]:
        split, everywhere = self._grid.split(), self._grid.everywhere
        outputs = everywhere, split if self._whole else everywhere, everywhere, everywhere
        return jax.jit(inspect.unwrap(sweep._final_norm), static_argnames="config", out_shardings=outputs)

    def _final_norm(self, *arguments: Any, config: ModelConfig) -> tuple[Array, Update, Array, Array]:
        first, entered, *others, rows, probed = arguments
        placed = jax.tree.map(self._grid.put, (rows, probed))
        return self._norm(self._owned(first), self._owned(entered), *others, *placed, config=config)

    def compile_rest(self) -> None:
        """Nothing: a run on several devices is long."""
