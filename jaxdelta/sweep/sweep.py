"""The layer-major pass: all tokens go through one layer, which is measured and forgotten, then the next.

Layer L + 1 is read while layer L computes, so a run needs the memory of two layers, and each weight is
read once. One compiled function serves all layers, or two where some are dense and some have experts.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.model.attention import Context, query_block
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import abstract_block, attention_windows, block_context, embed, final_norm
from jaxdelta.model.loss import PROBED, compile_sliced_loss, sliced_loss, vocabulary_slices
from jaxdelta.sweep.states import State, States
from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.arrays import AnyArray
from jaxdelta.utils.compiling import QuickJit
from jaxdelta.utils.read_ahead import read_ahead
from jaxdelta.utils.timing import Clock

# Called with a layer, a block, and the state after it.
Keep = Callable[[int, int, State], None]


class Update(NamedTuple):
    """What a layer's attention and MLP wrote into the state h that entered it, of n tokens."""

    attention: Float32[Array, "n d"]
    mlp: Float32[Array, "n d"]
    h: Float32[Array, "n d"]

    @property
    def delta(self) -> Float32[AnyArray, "n d"]:
        """The whole update δ."""
        return self.attention + self.mlp


class Blocks(NamedTuple):
    """How a pass divides its work.

    `windows`: how many windows pass a layer at once; `queries`: how many of a window's queries are compared
    with its keys at once; `place`: where the states wait between two layers, one of PLACES.
    """

    windows: int
    queries: int
    place: str = "device"


class Wrote(NamedTuple):
    """What a layer wrote into a block of windows; of the last layer also `normed`, where the last state is
    taken after the final norm, as the reference takes it (what the norm changes counts as the MLP's)."""

    update: Update
    normed: Update | None = None


class Sweep:
    """Iterating runs the pass: it yields every layer, and iterating over a layer yields what it Wrote into
    each block, of the tokens that count. What is known at the end stays here.

    After the last layer: `closure_error` = ‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F; and after `finish_loss` the `loss`,
    of `loss_tokens`.
    A pass that goes on from another one's `states` begins with layer `start`; `keep` is called with every
    state that it leaves. The clock's times: read (from disk) and transfer (to the device), both beside the
    computing; wait (for them), compute (the layers), keep (what is computed), loss.
    """

    closure_error: float
    loss: float
    loss_tokens: int
    _put_context: Any = staticmethod(jax.device_put)  # how a context comes to the device
    _at_once: int | None = None  # see Context

    def __init__(
        self,
        weights: Weights,
        tokens: Tokens,
        compute_dtype: DTypeLike = jnp.float32,
        residual_dtype: DTypeLike = jnp.float32,
        blocks: Blocks | None = None,
        whole: bool = False,
        states: States | None = None,
        start: int = 0,
        keep: Keep | None = None,
    ):
        self.weights = weights
        self.blocks = blocks or Blocks(len(tokens.ids), query_block(weights.config, tokens.ids.shape[1]))
        self.tokens, self.counted = self.split(tokens.ids), self.split(tokens.counted)
        positions = self.split(tokens.positions) if tokens.segmented else [None] * len(self.tokens)
        self._positions: list[Any] = positions
        self._whole, self.start, self._keep = whole, start, keep
        self._states = states or States(self.blocks.place)
        self.dtypes = jnp.dtype(compute_dtype), jnp.dtype(residual_dtype)
        self.clock = Clock()

    def split(self, windows: Shaped[np.ndarray, "B ..."]) -> list[Shaped[np.ndarray, "b ..."]]:
        """What there is of each window, by blocks; the last block is filled up with zeros."""
        size = self.blocks.windows
        filled = [(0, -len(windows) % size)] + [(0, 0)] * (windows.ndim - 1)
        return np.split(np.pad(windows, filled), -(-len(windows) // size))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of a layer's update, of the tokens that count."""
        return int(sum(block.sum() for block in self.counted)), self.weights.config.hidden_size

    @cached_property
    def _taken(self) -> list[Int32[np.ndarray, " m"]]:
        """The tokens of each block that an Update has: those that count, or the whole block."""
        chosen = [np.ones_like(block) if self._whole else block for block in self.counted]
        return [np.flatnonzero(block).astype(np.int32) for block in chosen]

    @cached_property
    def _rows(self) -> list[Int32[np.ndarray, " m"]]:
        """The same, as many everywhere; the last ones are to be dropped."""
        return _filled(self._taken)

    @cached_property
    def _probed(self) -> list[Int32[np.ndarray, " p"]]:
        """The tokens of each block whose next ones' probability is the loss: the first of the text."""
        left, found = PROBED, []
        for block in self.counted:
            followed = np.pad(block[:, 1:], [(0, 0), (0, 1)])
            found.append(np.flatnonzero(followed)[:left].astype(np.int32))
            left -= len(found[-1])
        return found

    def trace(self) -> None:
        """Traces the layers' function: before all else that is traced, since everything waits for it."""
        config, shape = self.weights.config, self.tokens[0].shape
        given = self.blocks.queries, self._positions[0], self._at_once
        context = block_context(config, shape, self.dtypes[0], *given)
        self._context = self._put_context(context)
        layers = [self.weights.abstract_layer(i) for i in range(config.num_layers)]
        # A layer's dtypes may differ from the others', too.
        self._kinds = [(config.is_sparse(i), *jax.tree.leaves(layer)) for i, layer in enumerate(layers)]
        self._traced = {}
        for kind, layer in dict(zip(self._kinds, layers, strict=True)).items():
            graph = nnx.graphdef(abstract_block(config, sparse=kind[0]))
            self._traced[kind] = self._lower(graph, layer, context)

    def _lower(self, graph: Any, layer: nnx.State, context: Context) -> Any:
        return _step.lower(graph, layer, *self._abstract_state(), context, self._rows[0])

    def _abstract_state(self) -> State:
        shape = (*self.tokens[0].shape, self.weights.config.hidden_size)
        abstract: Any = jax.ShapeDtypeStruct
        return State(abstract(shape, self.dtypes[1]), abstract(shape, jnp.float32))

    def __iter__(self) -> Iterator[Iterator[Wrote]]:
        config = self.weights.config
        if not hasattr(self, "_traced"):
            self.trace()
        with (
            contextlib.closing(read_ahead(self._read, config.num_layers, self.start)) as layers,
            ThreadPoolExecutor(1, "enter") as beside,
        ):
            entering = beside.submit(self._fill)
            steps = {kind: traced.compile() for kind, traced in self._traced.items()}
            entering.result()
            windows = attention_windows(config, self.tokens[0].shape[1])
            last = config.num_layers - 1
            for index in range(self.start, last):
                step = self._step(steps[self._kinds[index]], layers, windows[index])
                yield from _all_of(self._pass(index, step))
            final = _Final(self.weights, self._probed, self._final_norm)
            step = self._step(steps[self._kinds[-1]], layers, windows[-1])
            yield from _all_of(self._pass(last, step, final))
        self._last_normed, self.closure_error = np.concatenate(final.normed), final.closure_error

    def _step(self, step: Any, layers: Iterator[nnx.State], window: Any) -> Callable[..., Any]:
        """The next layer's function of a block and its state."""
        with self.clock("wait"):
            layer = next(layers)
        context = dataclasses.replace(self._context, window=window)

        def of_block(state: State, block: int) -> Any:
            own = dataclasses.replace(context, positions=self._positions[block])
            return step(layer, *map(self._owned, state), own, self._rows[block])

        return of_block

    def _pass(self, index: int, step: Callable[..., Any], final: "_Final | None" = None) -> Iterator[Wrote]:
        """Takes all states through a layer; ends when they are computed, so that the layer can go."""
        states = self._states
        with contextlib.closing(states.in_turn(len(self.tokens))) as waiting:
            for block, rows in enumerate(self._rows):
                state = next(waiting)
                entered = state.h
                with self.clock("compute"):
                    h, written, update = step(state, block)
                    states[block] = state = State(h, written)
                    if self._keep:
                        jax.block_until_ready(state)
                if self._keep:
                    with self.clock("keep"):
                        self._keep(index, block, state)
                normed = None
                if final:
                    first = self._enter(self.tokens[block])
                    normed = final(block, first, entered, state, update.attention, rows)
                yield Wrote(self._counting(update, block), normed and self._counting(normed, block))
        with self.clock("compute"):
            states.settle()

    def _counting(self, update: Update, block: int) -> Update:
        """Without the rows that fill up a block's."""
        count = len(self._taken[block])
        return update if count == len(update.h) else jax.tree.map(lambda rows: rows[:count], update)

    def _owned(self, state: AnyArray) -> Array:
        return state if isinstance(state, jax.Array) else self._states.put(state)

    def _final_norm(self, *arguments: Any, config: ModelConfig) -> tuple[Array, Update, Array, Array]:
        return _final_norm(*arguments, config=config)

    def _fill(self) -> None:
        for block, tokens in enumerate(self.tokens if self.start == 0 else ()):
            h = self._enter(tokens)
            self._states[block] = State(h, np.zeros(h.shape, np.float32))

    def _enter(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]:
        """The state that enters the first layer; cast by NumPy, for which nothing need be compiled."""
        return embed(self.weights.config, np.asarray(self.weights.embeddings(tokens)), self.dtypes[1])

    def _read(self, index: int) -> nnx.State:
        with self.clock("read"):
            layer = self.weights.layer(index)
        with self.clock("transfer"):
            return jax.block_until_ready(layer)

    def finish_loss(self) -> None:
        """Mean -ln p(next token), in nats per token, as `loss`: over the text, or the first PROBED tokens of
        a longer one (it only says whether the weights are real)."""
        vocab_size = self.weights.config.vocab_size
        bounds = vocabulary_slices(vocab_size)
        with self.clock("loss"):
            slices = read_ahead(lambda i: self.weights.head_slice(*bounds[i]), len(bounds))
            probed = zip(self.tokens, self._probed, strict=True)
            following = np.concatenate([tokens.ravel()[places + 1] for tokens, places in probed])
            targets = self.weights.head_rows(following)
            losses = sliced_loss(vocab_size, slices, targets, self._last_normed, self.dtypes[0])
            self.loss, self.loss_tokens = float(losses.mean(dtype=np.float64)), len(following)

    def compile_rest(self) -> None:
        """Compiles what follows the layers, on another thread while they compute."""
        config, (h, written) = self.weights.config, self._abstract_state()
        weight = jax.ShapeDtypeStruct((config.hidden_size,), config.dtype)
        rows, probed = self._rows[0], _filled(self._probed)[0]
        attention = jax.ShapeDtypeStruct((len(rows), config.hidden_size), jnp.float32)
        _final_norm.lower(h, h, h, written, attention, weight, rows, probed, config=config).compile()
        shape = sum(map(len, self._probed)), config.hidden_size
        compile_sliced_loss(config.vocab_size, shape, config.dtype, self.dtypes[0])


class _Final:
    """The final norm, block by block: the `probed` states after it, and the closure of all so far."""

    def __init__(self, weights: Weights, probed: list[np.ndarray], norm: Callable[..., Any]):
        self._weight, self._config = weights.final_norm(), weights.config
        self._counts, self._places = list(map(len, probed)), _filled(probed)
        self._norm = norm
        self._missing = self._energy = 0.0
        self.normed: list[Float32[np.ndarray, "_ D"]] = []

    def __call__(
        self, block: int, first: AnyArray, entered: AnyArray, last: State, attention: Array, rows: Any
    ) -> Update:
        """The last layer's Update of a block with what the norm changes, counted as the MLP's."""
        arguments = first, entered, *last, attention, self._weight, rows, self._places[block]
        normed, update, missing, energy = self._norm(*arguments, config=self._config)
        self.normed.append(np.asarray(normed)[: self._counts[block]])
        self._missing, self._energy = self._missing + float(missing), self._energy + float(energy)
        return update

    @property
    def closure_error(self) -> float:
        """‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F."""
        with np.errstate(invalid="ignore"):  # ∞/∞ is NaN, and the caller's to find
            return float(np.sqrt(np.divide(self._missing, self._energy)))


def _filled(places: list[Int32[np.ndarray, " _"]]) -> list[Int32[np.ndarray, " p"]]:
    """As many in every block, so that one function serves all: the last ones are to be dropped."""
    return [np.resize(some, max(map(len, places))) for some in places]


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


@partial(QuickJit, static_argnums=0, donate_argnums=3)
def _step(
    graph: Any,
    layer: nnx.State,
    h: Float[Array, "B T D"],
    written: Float32[Array, "B T D"],
    context: Context,
    rows: Int32[Array, " m"] | None,
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T D"], Update]:
    """One layer on a block: the new state, the sum of all updates so far, the layer's own of these rows."""
    new, attention, mlp = nnx.merge(graph, layer)(h, context)
    update = Update(*(_tokens(x, rows) for x in (attention, mlp, h.astype(jnp.float32))))
    return new, written + (attention + mlp), update


def _tokens(x: Float32[Array, "B T D"], rows: Int32[Array, " m"] | None) -> Float32[Array, "m D"]:
    flat = x.reshape(-1, x.shape[-1])
    return flat if rows is None else flat[rows]


def _join(blocks: Sequence[Any]) -> Any:
    """The blocks' arrays as one."""
    return blocks[0] if len(blocks) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)


@partial(QuickJit, static_argnames="config")
def _final_norm(
    first: Array,
    entered: Array,
    last: Array,
    written: Array,
    attention: Array,
    weight: Array,
    rows: Array | None,
    probed: Array,
    *,
    config: ModelConfig,
) -> tuple[Array, Update, Array, Array]:
    """The `probed` of the last states after the final norm; the last layer's Update with it;
    ‖h_0 + Σδ - h_N‖²; ‖h_N‖²."""
    normed = final_norm(config, weight, last)
    first, entered, last = (state.astype(jnp.float32) for state in (first, entered, last))
    update = Update(attention, _tokens(normed - entered, rows) - attention, _tokens(entered, rows))
    missing, energy = jnp.sum(jnp.square(first + written - last)), jnp.sum(jnp.square(last))
    return _tokens(normed, probed), update, missing, energy
