"""The layer-major pass: all tokens go through one layer, which is measured and forgotten, then the next.

Layer L + 1 is read while layer L computes, so a run needs the memory of two layers, and each weight is
read once. One compiled function serves all layers, or two where some are dense and some have experts.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jaxdelta.config import ModelConfig
from jaxdelta.layers import rms_norm
from jaxdelta.loss import compile_sliced_loss, sliced_loss, vocabulary_slices
from jaxdelta.model import (
    Context,
    Qwen3,
    abstract_block,
    attention_windows,
    block_context,
    query_block,
)
from jaxdelta.timing import Clock
from jaxdelta.types import AnyArray

T = TypeVar("T")


@runtime_checkable
class Weights(Protocol):
    """Where the pass gets a model's weights: a Checkpoint reads them, a Resident model has them."""

    @property
    def config(self) -> ModelConfig: ...
    def layer(self, index: int) -> nnx.State: ...
    def abstract_layer(self, index: int) -> nnx.State: ...
    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]: ...
    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]: ...
    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]: ...
    def final_norm(self) -> Float[Array, " D"]: ...
    def first_bad_tensor(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class Resident:
    """A loaded model as `Weights`."""

    model: Qwen3

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def layer(self, index: int) -> nnx.State:
        _, weights, place = self.model.layer(index)
        return _take(weights, place)

    def abstract_layer(self, index: int) -> nnx.State:
        def first(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

        return jax.tree.map(first, self.model.layer(index)[1])

    def embeddings(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        return self.model.embed_tokens(jnp.asarray(ids))

    def head_rows(self, ids: Int[np.ndarray, "*batch"]) -> Float[Array, "*batch D"]:
        return jnp.take(self.model.head, jnp.asarray(ids), axis=0)

    def head_slice(self, start: int, stop: int) -> Float[Array, "_ D"]:
        return self.model.head[start:stop]

    def final_norm(self) -> Float[Array, " D"]:
        return self.model.norm.weight[...]

    def first_bad_tensor(self) -> str | None:
        for path, variable in nnx.to_flat_state(nnx.state(self.model, nnx.Param)):
            if not jnp.isfinite(variable[...]).all():
                return ".".join(map(str, path))
        return None


class Update(NamedTuple):
    """What a layer's attention and MLP wrote into the state that entered it, for all tokens but the first."""

    attention: Float32[Array, "n d"]
    mlp: Float32[Array, "n d"]
    h: Float32[Array, "n d"]

    @property
    def delta(self) -> Float32[AnyArray, "n d"]:
        """The whole update δ."""
        return self.attention + self.mlp


class Blocks(NamedTuple):
    """How a pass divides its work.

    `windows`: how many windows pass a layer at once, a divisor of their number; `queries`: how many of a
    window's queries are compared with its keys at once; `on_host`: between two layers the states wait there.
    """

    windows: int
    queries: int
    on_host: bool = False


class State(NamedTuple):
    """A block's residual stream, and the sum of all updates it has had."""

    h: Float[AnyArray, "B T D"]
    written: Float32[AnyArray, "B T D"]


class Sweep:
    """Iterating runs the pass and yields every layer's Update; what is known at its end stays here.

    After the last layer: `closure_error` = ‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F; `normed`, the last layer's Update
    when the last state is taken after the final norm, as the reference takes it (what the norm changes is
    counted as the MLP's); and after `finish_loss`
    the `loss`. The clock's times: read (from disk) and transfer (to the device), both beside the computing;
    wait (for them), compute (the layers), loss.
    """

    normed: Update
    closure_error: float
    loss: float

    def __init__(
        self,
        weights: Weights,
        tokens: Int[np.ndarray, "B T"],
        compute_dtype: DTypeLike = jnp.float32,
        residual_dtype: DTypeLike = jnp.float32,
        blocks: Blocks | None = None,
    ):
        self.weights = weights
        self.blocks = blocks or Blocks(len(tokens), query_block(weights.config, tokens.shape))
        self.tokens = np.split(tokens, len(tokens) // self.blocks.windows)
        self.dtypes = jnp.dtype(compute_dtype), jnp.dtype(residual_dtype)
        self.clock = Clock()

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of every Update."""
        windows, length = self.tokens[0].shape
        return len(self.tokens) * windows * (length - 1), self.weights.config.hidden_size

    def trace(self) -> None:
        """Traces the layers' function: before all else that is traced, since everything waits for it."""
        config, shape = self.weights.config, self.tokens[0].shape
        context = block_context(config, shape, self.dtypes[0], self.blocks.queries)
        self._context = jax.device_put(context)
        layers = [self.weights.abstract_layer(i) for i in range(config.num_layers)]
        # A layer's dtypes may differ from the others', too.
        self._kinds = [(config.is_sparse(i), *jax.tree.leaves(layer)) for i, layer in enumerate(layers)]
        self._traced = {}
        for kind, layer in dict(zip(self._kinds, layers, strict=True)).items():
            graph = nnx.graphdef(abstract_block(config, sparse=kind[0]))
            self._traced[kind] = _step.lower(graph, layer, *self._abstract_state(), context)

    def _abstract_state(self) -> tuple[Any, Any]:
        shape = (*self.tokens[0].shape, self.weights.config.hidden_size)
        return jax.ShapeDtypeStruct(shape, self.dtypes[1]), jax.ShapeDtypeStruct(shape, jnp.float32)

    def __iter__(self) -> Iterator[Update]:
        config = self.weights.config
        if not hasattr(self, "_traced"):
            self.trace()
        with (
            contextlib.closing(read_ahead(self._read, config.num_layers)) as layers,
            ThreadPoolExecutor(1, "enter") as beside,
        ):
            entering = beside.submit(lambda: list(map(self._enter, self.tokens)))
            steps = {kind: traced.compile() for kind, traced in self._traced.items()}
            states = [State(h, np.zeros(h.shape, np.float32)) for h in entering.result()]
            windows = attention_windows(config, self.tokens[0].shape[1])
            for kind, window in zip(self._kinds, windows, strict=True):
                with self.clock("wait"):
                    layer = next(layers)
                entered = [state.h for state in states]
                context = dataclasses.replace(self._context, window=window)
                with self.clock("compute"):
                    update = self._pass(partial(steps[kind], layer), states, context)
                del layer
                yield update
        self._finish(entered, states, update.attention)

    def _pass(self, step: Callable[..., Any], states: list[State], context: Context) -> Update:
        """Takes all states through a layer; ends when they are computed, so that the layer can go."""
        updates = []
        for i, state in enumerate(states):
            h, written, update = step(*map(_owned, state), context)
            states[i] = State(*map(np.asarray, (h, written))) if self.blocks.on_host else State(h, written)
            updates.append(update)
        jax.block_until_ready(states)
        return _join(updates)

    def _enter(self, tokens: Int[np.ndarray, "B T"]) -> Float[AnyArray, "B T D"]:
        """The state that enters the first layer."""
        h = self.weights.embeddings(tokens).astype(self.dtypes[1])
        return np.asarray(h) if self.blocks.on_host else h

    def _read(self, index: int) -> nnx.State:
        with self.clock("read"):
            layer = self.weights.layer(index)
        with self.clock("transfer"):
            return jax.block_until_ready(layer)

    def _finish(self, entered: list[Any], states: list[State], attention: Array) -> None:
        weight, eps = self.weights.final_norm(), self.weights.config.rms_norm_eps
        firsts = map(self._enter, self.tokens)
        found = [
            _final_norm(first, before, *state, weight, eps=eps)
            for first, before, state in zip(firsts, entered, states, strict=True)
        ]
        self._last_normed, wrote, missing, energies = zip(*found, strict=True)
        delta, h = _join(wrote)
        self.normed = Update(attention, delta - attention, h)
        self.closure_error = float(np.sqrt(np.sum(missing) / np.sum(energies)))

    def finish_loss(self) -> None:
        """Mean -ln p(next token) over the text, in nats per token, as `loss`."""
        vocab_size = self.weights.config.vocab_size
        bounds = vocabulary_slices(vocab_size)
        with self.clock("loss"):
            slices = read_ahead(lambda i: self.weights.head_slice(*bounds[i]), len(bounds))
            targets = [self.weights.head_rows(block[:, 1:]) for block in self.tokens]
            blocks = zip(targets, self._last_normed, strict=True)
            self.loss = float(np.mean(sliced_loss(vocab_size, slices, blocks, self.dtypes[0])))

    def compile_rest(self) -> None:
        """Compiles what follows the layers, on another thread while they compute."""
        config, (state, written) = self.weights.config, self._abstract_state()
        weight = jax.ShapeDtypeStruct((config.hidden_size,), config.dtype)
        _final_norm.lower(state, state, state, written, weight, eps=config.rms_norm_eps).compile()
        compile_sliced_loss(config.vocab_size, state.shape, config.dtype, self.dtypes[0])


def read_ahead(read: Callable[[int], T], count: int) -> Generator[T, None, None]:
    """read(0), ..., read(count - 1), each read on another thread while the one before is in use."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        upcoming = [pool.submit(read, 0)]
        for index in range(1, count + 1):
            # Handed over without a reference left here, which would keep it in memory.
            item = [upcoming.pop().result()]
            if index < count:
                upcoming.append(pool.submit(read, index))
            yield item.pop()


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    graph: Any,
    layer: nnx.State,
    h: Float[Array, "B T D"],
    written: Float32[Array, "B T D"],
    context: Context,
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T D"], Update]:
    """One layer on all tokens: the new state, the sum of all updates so far, and the layer's own."""
    new, attention, mlp = nnx.merge(graph, layer)(h, context)
    update = Update(*map(_without_first_token, (attention, mlp, h.astype(jnp.float32))))
    return new, written + (attention + mlp), update


def _without_first_token(x: Float32[Array, "B T D"]) -> Float32[Array, "n D"]:
    return x[:, 1:].reshape(-1, x.shape[-1])


def _owned(state: AnyArray) -> Array:
    """On the device, in memory of its own: what is donated may be written over."""
    return state if isinstance(state, jax.Array) else jax.device_put(state, may_alias=False)


def _join(blocks: Sequence[Any]) -> Any:
    """The blocks' arrays as one."""
    return blocks[0] if len(blocks) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)


@partial(jax.jit, static_argnames="eps")
def _final_norm(
    first: Array, entered: Array, last: Array, written: Array, weight: Array, *, eps: float
) -> tuple[Array, tuple[Array, Array], Array, Array]:
    """The last state after the final norm; the last layer's δ with it, h; ‖h_0 + Σδ - h_N‖²; ‖h_N‖²."""
    normed = rms_norm(last, weight, eps)
    first, entered, last = (state.astype(jnp.float32) for state in (first, entered, last))
    wrote = _without_first_token(normed - entered), _without_first_token(entered)
    return normed, wrote, jnp.sum(jnp.square(first + written - last)), jnp.sum(jnp.square(last))


@jax.jit
def _take(stacked: nnx.State, index: int | Array) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[index], stacked)
