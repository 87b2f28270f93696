"""The layer-major pass: all tokens go through one layer, which is measured and forgotten, then the next.

Layer L + 1 is read while layer L computes, so a run needs the memory of two layers, and each weight is
read once. One compiled function serves all layers, or two where some are dense and some have experts.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxdelta.calibration import Tokens
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


class Wrote(NamedTuple):
    """What a layer wrote into a block of windows; of the last layer also `normed`, where the last state is
    taken after the final norm, as the reference takes it (what the norm changes counts as the MLP's)."""

    update: Update
    normed: Update | None = None


class Sweep:
    """Iterating runs the pass: it yields every layer, and iterating over a layer yields what it Wrote into
    each block, of the tokens that count. What is known at the end stays here.

    After the last layer: `closure_error` = ‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F; and after `finish_loss` the `loss`.
    The clock's times: read (from disk) and transfer (to the device), both beside the computing; wait (for
    them), compute (the layers), loss.
    """

    closure_error: float
    loss: float

    def __init__(
        self,
        weights: Weights,
        tokens: Tokens,
        compute_dtype: DTypeLike = jnp.float32,
        residual_dtype: DTypeLike = jnp.float32,
        blocks: Blocks | None = None,
    ):
        self.weights = weights
        self.blocks = blocks or Blocks(len(tokens.ids), query_block(weights.config, tokens.ids.shape))
        count = len(tokens.ids) // self.blocks.windows
        self.tokens, self.counted = np.split(tokens.ids, count), np.split(tokens.counted, count)
        self.dtypes = jnp.dtype(compute_dtype), jnp.dtype(residual_dtype)
        self.clock = Clock()

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of a layer's update."""
        return sum(self._counts), self.weights.config.hidden_size

    @property
    def _counts(self) -> list[int]:
        return [int(block.sum()) for block in self.counted]

    @cached_property
    def _rows(self) -> list[Int32[np.ndarray, " m"]]:
        """Where the tokens that count are in each block; as many everywhere, the last ones to be dropped."""
        rows = [np.flatnonzero(block).astype(np.int32) for block in self.counted]
        return [np.resize(row, max(self._counts)) for row in rows]

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
            self._traced[kind] = _step.lower(graph, layer, *self._abstract_state(), context, self._rows[0])

    def _abstract_state(self) -> State:
        shape = (*self.tokens[0].shape, self.weights.config.hidden_size)
        abstract: Any = jax.ShapeDtypeStruct
        return State(abstract(shape, self.dtypes[1]), abstract(shape, jnp.float32))

    def __iter__(self) -> Iterator[Iterator[Wrote]]:
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
            for kind, window in zip(self._kinds[:-1], windows[:-1], strict=True):
                yield from _all_of(self._pass(self._step(steps[kind], layers, window), states))
            final = _Final(self.weights, self.blocks.on_host)
            step = self._step(steps[self._kinds[-1]], layers, windows[-1])
            yield from _all_of(self._pass(step, states, final))
        self._last_normed, self.closure_error = final.normed, final.closure_error

    def _step(self, step: Any, layers: Iterator[nnx.State], window: Any) -> Callable[..., Any]:
        """The next layer's function of a block's state and rows."""
        with self.clock("wait"):
            layer = next(layers)
        context = dataclasses.replace(self._context, window=window)
        return lambda state, rows: step(layer, *map(_owned, state), context, rows)

    def _pass(
        self, step: Callable[..., Any], states: list[State], final: "_Final | None" = None
    ) -> Iterator[Wrote]:
        """Takes all states through a layer; ends when they are computed, so that the layer can go."""
        for i, rows in enumerate(self._rows):
            entered = states[i].h
            with self.clock("compute"):
                h, written, update = step(states[i], rows)
                if self.blocks.on_host:
                    h, written = map(np.asarray, (h, written))
            states[i], normed = State(h, written), None
            if final:
                first = self._enter(self.tokens[i])
                normed = self._counting(final(first, entered, states[i], update.attention, rows), i)
            yield Wrote(self._counting(update, i), normed)
        with self.clock("compute"):
            jax.block_until_ready(states)

    def _counting(self, update: Update, block: int) -> Update:
        """Without the rows that fill up a block's."""
        count = self._counts[block]
        return update if count == len(update.h) else jax.tree.map(lambda rows: rows[:count], update)

    def _enter(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]:
        """The state that enters the first layer; cast by NumPy, for which nothing need be compiled."""
        return np.asarray(self.weights.embeddings(tokens)).astype(self.dtypes[1])

    def _read(self, index: int) -> nnx.State:
        with self.clock("read"):
            layer = self.weights.layer(index)
        with self.clock("transfer"):
            return jax.block_until_ready(layer)

    def finish_loss(self) -> None:
        """Mean -ln p(next token) over the text, in nats per token, as `loss`."""
        vocab_size = self.weights.config.vocab_size
        bounds = vocabulary_slices(vocab_size)
        with self.clock("loss"):
            slices = read_ahead(lambda i: self.weights.head_slice(*bounds[i]), len(bounds))
            targets = [self.weights.head_rows(block[:, 1:]) for block in self.tokens]
            blocks = zip(targets, self._last_normed, strict=True)
            losses = sliced_loss(vocab_size, slices, blocks, self.dtypes[0])
            self.loss = float(np.concatenate(losses)[np.concatenate(self.counted)[:, 1:]].mean())

    def compile_rest(self) -> None:
        """Compiles what follows the layers, on another thread while they compute."""
        config, (h, written) = self.weights.config, self._abstract_state()
        weight = jax.ShapeDtypeStruct((config.hidden_size,), config.dtype)
        rows = self._rows[0]
        attention = jax.ShapeDtypeStruct((len(rows), config.hidden_size), jnp.float32)
        _final_norm.lower(h, h, h, written, attention, weight, rows, eps=config.rms_norm_eps).compile()
        compile_sliced_loss(
            config.vocab_size, (*self.tokens[0].shape, config.hidden_size), config.dtype, self.dtypes[0]
        )


class _Final:
    """The final norm, block by block: the states after it, and the closure of the blocks so far."""

    def __init__(self, weights: Weights, on_host: bool):
        self._weight, self._eps = weights.final_norm(), weights.config.rms_norm_eps
        self._take = np.asarray if on_host else lambda normed: normed
        self._missing = self._energy = 0.0
        self.normed: list[AnyArray] = []

    def __call__(
        self, first: AnyArray, entered: AnyArray, last: State, attention: Array, rows: Any
    ) -> Update:
        """The last layer's Update of a block with what the norm changes, counted as the MLP's."""
        states = (first, entered, *last)
        normed, update, missing, energy = _final_norm(*states, attention, self._weight, rows, eps=self._eps)
        self.normed.append(self._take(normed))
        self._missing, self._energy = self._missing + float(missing), self._energy + float(energy)
        return update

    @property
    def closure_error(self) -> float:
        """‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F."""
        with np.errstate(invalid="ignore"):  # ∞/∞ is NaN, and the caller's to find
            return float(np.sqrt(np.divide(self._missing, self._energy)))


def _all_of(wrote: Iterator[Wrote]) -> Iterator[Iterator[Wrote]]:
    """Yields the layer, and passes what is left of it when nobody looks any more."""
    yield wrote
    for _ in wrote:
        pass


def joined(layers: Iterable[Iterable[Wrote]]) -> Iterator[Update]:
    """Every layer's update of all blocks; after the last layer's the same normed, where there is that."""
    for blocks in layers:
        updates, normed = map(list, zip(*blocks, strict=True))
        # Handed over without a reference left here, which would keep it in memory.
        whole = [_join(updates)]
        del updates
        yield whole.pop()
        if normed[0]:
            yield _join(normed)


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
    rows: Int32[Array, " m"],
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T D"], Update]:
    """One layer on a block: the new state, the sum of all updates so far, and the layer's own."""
    new, attention, mlp = nnx.merge(graph, layer)(h, context)
    update = Update(*(_tokens(x, rows) for x in (attention, mlp, h.astype(jnp.float32))))
    return new, written + (attention + mlp), update


def _tokens(x: Float32[Array, "B T D"], rows: Int32[Array, " m"]) -> Float32[Array, "m D"]:
    return x.reshape(-1, x.shape[-1])[rows]


def _owned(state: AnyArray) -> Array:
    """On the device, in memory of its own: what is donated may be written over."""
    return state if isinstance(state, jax.Array) else jax.device_put(state, may_alias=False)


def _join(blocks: Sequence[Any]) -> Any:
    """The blocks' arrays as one."""
    return blocks[0] if len(blocks) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)


@partial(jax.jit, static_argnames="eps")
def _final_norm(
    first: Array,
    entered: Array,
    last: Array,
    written: Array,
    attention: Array,
    weight: Array,
    rows: Array,
    *,
    eps: float,
) -> tuple[Array, Update, Array, Array]:
    """The last state after the final norm; the last layer's Update with it; ‖h_0 + Σδ - h_N‖²; ‖h_N‖²."""
    normed = rms_norm(last, weight, eps)
    first, entered, last = (state.astype(jnp.float32) for state in (first, entered, last))
    update = Update(attention, _tokens(normed - entered, rows) - attention, _tokens(entered, rows))
    return normed, update, jnp.sum(jnp.square(first + written - last)), jnp.sum(jnp.square(last))


@jax.jit
def _take(stacked: nnx.State, index: int | Array) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[index], stacked)
