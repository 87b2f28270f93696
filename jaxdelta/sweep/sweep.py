"""The layer-major pass: all tokens go through one layer, its update is measured, then the next layer follows.

Layer L + 1 is read while layer L computes: a run needs memory for two layers, and reads each weight once.
One compiled program serves all layers, or two if some are dense and some have experts.

Axes: B windows of a block, b of them in this process, T tokens of each, D hidden size; W windows of the
text, n counted tokens.
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
from jaxdelta.model.decoder import abstract_block, attention_windows, block_context, embed
from jaxdelta.model.loss import PROBED, sliced_loss, vocabulary_slices
from jaxdelta.sweep.devices import OneDevice
from jaxdelta.sweep.mesh import Devices
from jaxdelta.sweep.programs import Ends, Update, final_norm_program, layer_program
from jaxdelta.sweep.states import State, States
from jaxdelta.text.tokens import Tokens
from jaxdelta.utils.read_ahead import read_ahead
from jaxdelta.utils.timing import Clock

Keep = Callable[[int, int, State], None]  # saves (layer, block, the block's state after the layer)


class Blocks(NamedTuple):
    """Number of windows computed at once, number of queries per window whose scores are computed at once, and
    the location of the states between two layers, one of LOCATIONS."""

    windows: int
    queries: int
    place: str = "device"


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """Options of a pass; by default all windows are one block.

    `compute_dtype` is the dtype of the factors of every product, `residual_dtype` of the residual stream.
    With `all_tokens` a layer's Update has all tokens of a block, not only the counted ones.
    """

    blocks: Blocks | None = None
    compute_dtype: DTypeLike = jnp.float32
    residual_dtype: DTypeLike = jnp.float32
    all_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class Resume:
    """The first layer to compute, the blocks' states before it (empty for layer 0), and a function that saves
    every new state."""

    states: States
    start: int = 0
    keep: Keep | None = None


class BlockUpdate(NamedTuple):
    """A layer's Update of a block of windows; for the last layer also `normed`, the Update to the state after
    the final norm, whose change counts as the MLP's."""

    update: Update
    normed: Update | None = None


@dataclasses.dataclass(frozen=True)
class PassResult:
    """The results of a whole pass.

    `closure_error` is ‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F over all tokens. `loss` is the mean -ln p(next token), in
    nats, of the first `loss_tokens` tokens, at most PROBED: it only shows whether the model is trained. It is
    None for a model without a head.
    """

    closure_error: float
    loss: float | None
    loss_tokens: int


class Sweep:
    """A pass of a text through all layers.

    Iteration yields the layers, and iteration over a layer yields a BlockUpdate per block. Blocks that the
    caller does not ask for are computed before the next layer. After the last layer `finish` returns the
    PassResult.

    `clock` measures the seconds of read (from disk) and transfer (to the devices), both on another thread,
    wait (for them), compute (the layers), keep (saving the states) and loss.
    """

    def __init__(
        self,
        weights: Weights,
        tokens: Tokens,
        plan: PassPlan | None = None,
        devices: Devices | None = None,
        resume: Resume | None = None,
        clock: Clock | None = None,
    ):
        self.weights, self._devices = weights, devices or OneDevice()
        plan = plan or PassPlan()
        self.blocks = plan.blocks or Blocks(len(tokens.ids), query_block(weights.config, tokens.ids.shape[1]))
        self._dtypes = jnp.dtype(plan.compute_dtype), jnp.dtype(plan.residual_dtype)
        self._all_tokens = plan.all_tokens
        self.tokens, self.counted = self.split(tokens.ids), self.split(tokens.counted)
        self._positions: list[Any] = [None] * len(self.tokens)
        if tokens.segmented:
            local = map(self._devices.local_windows, self.split(tokens.positions))
            self._positions = list(map(self._devices.put_windows, local))
        resume = resume or Resume(States(self.blocks.place, devices=self._devices))
        self._states, self.start, self._keep = resume.states, resume.start, resume.keep
        self._clock = clock or Clock()
        self._final: _FinalNorm | None = None  # set at the end of a pass

    def split(self, windows: Shaped[np.ndarray, "W ..."]) -> list[Shaped[np.ndarray, "B ..."]]:
        """Splits an array with a row per window of the text into blocks; the last is padded with zeros."""
        size = self.blocks.windows
        padding = [(0, -len(windows) % size)] + [(0, 0)] * (windows.ndim - 1)
        return np.split(np.pad(windows, padding), -(-len(windows) // size))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D) of a layer's update, for the n counted tokens."""
        return int(sum(block.sum() for block in self.counted)), self.weights.config.hidden_size

    @cached_property
    def _chosen(self) -> list[Int32[np.ndarray, " m"]]:
        """The tokens of each block in an Update: the counted ones, or all."""
        chosen = [np.ones_like(block) if self._all_tokens else block for block in self.counted]
        return [np.flatnonzero(block).astype(np.int32) for block in chosen]

    @cached_property
    def _rows(self) -> list[Any]:
        """`_chosen` on the devices, padded; None for all."""
        return [None] * len(self.tokens) if self._all_tokens else self._devices.put(_padded(self._chosen))

    @cached_property
    def _loss_positions(self) -> list[Int32[np.ndarray, " p"]]:
        """The positions in each block whose next token is in the loss: the first PROBED of the text."""
        left, positions = PROBED, []
        for block in self.counted:
            followed = np.pad(block[:, 1:], [(0, 0), (0, 1)])
            positions.append(np.flatnonzero(followed)[:left].astype(np.int32))
            left -= len(positions[-1])
        return positions

    def trace(self) -> dict[Any, jax.stages.Lowered]:
        """Lowers the program of every kind of layer, once; before the pass, no other trace holds it up."""
        return self._lowered

    @cached_property
    def _lowered(self) -> dict[Any, jax.stages.Lowered]:
        abstract = dict(zip(self._kinds, self._abstract_layers, strict=True))
        context = dataclasses.replace(self._context, positions=self._positions[0])
        shape = (*self.tokens[0].shape, self.weights.config.hidden_size)
        state = [self._devices.abstract_windows(shape, dtype) for dtype in (self._dtypes[1], jnp.float32)]
        lowered = {}
        for kind, layer in abstract.items():
            graph = nnx.graphdef(abstract_block(self.weights.config, sparse=kind[0]))
            program = layer_program(self._devices, graph, self._all_tokens)
            lowered[kind] = program.lower(layer, *state, context, self._rows[0])
        return lowered

    @cached_property
    def _context(self) -> Context:
        """The layers' Context without the positions of a block."""
        config, shape = self.weights.config, self.tokens[0].shape
        # Pairs split over devices cannot be computed one by one.
        at_once = shape[0] * config.num_kv_heads if self._devices.model > 1 else None
        return self._devices.put(block_context(config, shape, self._dtypes[0], self.blocks.queries, at_once))

    @cached_property
    def _abstract_layers(self) -> list[nnx.State]:
        count = self.weights.config.num_layers
        return [self._devices.abstract_layer(self.weights, index) for index in range(count)]

    @cached_property
    def _kinds(self) -> list[Any]:
        """The key of each layer's program: dense or sparse, shapes and dtypes."""
        sparse = self.weights.config.is_sparse
        return [(sparse(index), *jax.tree.leaves(layer)) for index, layer in enumerate(self._abstract_layers)]

    def __iter__(self) -> Iterator[Iterator[BlockUpdate]]:
        config, lowered, final = self.weights.config, self.trace(), None
        self._final = None
        with (
            contextlib.closing(read_ahead(self._read, config.num_layers, self.start)) as layers,
            ThreadPoolExecutor(1, "enter") as pool,
        ):
            entering = pool.submit(self._enter_all)
            steps = {kind: program.compile() for kind, program in lowered.items()}
            entering.result()
            windows = attention_windows(config, self.tokens[0].shape[1])
            for index in range(self.start, config.num_layers):
                if index == config.num_layers - 1:
                    final = self._final_norm()
                step = self._step(steps[self._kinds[index]], layers, windows[index])
                yield from _all_of(self._pass(index, step, final))
        self._final = final

    def _step(self, step: Any, layers: Iterator[nnx.State], window: Any) -> Callable[..., Any]:
        """The next layer as a function of a state and its block's index."""
        with self._clock("wait"):
            layer = next(layers)
        context = dataclasses.replace(self._context, window=window)

        def pass_block(state: State, block: int) -> Any:
            placed = dataclasses.replace(context, positions=self._positions[block])
            return step(layer, *state, placed, self._rows[block])

        return pass_block

    def _pass(
        self, index: int, step: Callable[..., Any], final: "_FinalNorm | None"
    ) -> Iterator[BlockUpdate]:
        """Computes all blocks of a layer and waits for them, so that the layer's memory can be freed."""
        with contextlib.closing(iter(self._states)) as waiting:
            for block, rows in enumerate(self._rows):
                state = next(waiting)
                entered: Any = state.h
                with self._clock("compute"):
                    h, written, update = step(state, block)
                    self._states[block] = state = State(h, written)
                    if self._keep:
                        jax.block_until_ready(state)
                if self._keep:
                    with self._clock("keep"):
                        self._keep(index, block, state)
                normed = None
                if final:
                    first = self._devices.put_windows(self._enter(self.tokens[block]))
                    normed = final(block, Ends(first, entered, h, written), update.attention, rows)
                yield BlockUpdate(self._unpadded(update, block), normed and self._unpadded(normed, block))
        with self._clock("compute"):
            self._states.block_until_ready()

    def _unpadded(self, update: Update, block: int) -> Update:
        count = len(self._chosen[block])
        return update if count == len(update.h) else jax.tree.map(lambda rows: rows[:count], update)

    def _final_norm(self) -> "_FinalNorm":
        weight = self._devices.put(self.weights.final_norm())
        program = partial(final_norm_program(self._devices, self._all_tokens), config=self.weights.config)
        positions = self._devices.put(_padded(self._loss_positions))
        return _FinalNorm(program, weight, positions, list(map(len, self._loss_positions)))

    def _enter_all(self) -> None:
        for block, tokens in enumerate(self.tokens if self.start == 0 else ()):
            h = self._enter(tokens)
            self._states[block] = State(h, np.zeros(h.shape, np.float32))

    def _enter(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "b T D"]:
        """The state entering the first layer; cast by NumPy, which compiles nothing."""
        embeddings = self.weights.embeddings(self._devices.local_windows(tokens))
        return embed(self.weights.config, np.asarray(embeddings), self._dtypes[1])

    def _read(self, index: int) -> nnx.State:
        with self._clock("read"):
            layer = self._devices.layer(self.weights, index)
        with self._clock("transfer"):
            return jax.block_until_ready(layer)

    def finish(self) -> PassResult:
        """Computes the loss; RuntimeError before the end of the pass."""
        if self._final is None:
            raise RuntimeError("Sweep.finish() must follow the last layer")
        if not self.weights.config.has_head:
            return PassResult(self._final.closure_error, None, 0)
        vocab_size, devices = self.weights.config.vocab_size, self._devices
        bounds = vocabulary_slices(vocab_size)
        with self._clock("loss"):
            slices = read_ahead(lambda i: devices.put_rows(self.weights.head_slice(*bounds[i])), len(bounds))
            blocks = zip(self.tokens, self._loss_positions, strict=True)
            following = np.concatenate([tokens.ravel()[positions + 1] for tokens, positions in blocks])
            targets = devices.put(self.weights.head_rows(following))
            normed = np.concatenate(self._final.normed)
            losses = sliced_loss(vocab_size, slices, targets, normed, self._dtypes[0])
            loss = float(losses.mean(dtype=np.float64))
        return PassResult(self._final.closure_error, loss, len(following))


class _FinalNorm:
    """Applies the final norm to blocks; collects the normed states for the loss, and the closure error."""

    def __init__(self, program: Callable[..., Any], weight: Array, positions: list[Any], counts: list[int]):
        self._program, self._weight, self._positions, self._counts = program, weight, positions, counts
        self._missing = self._energy = 0.0
        self.normed: list[Float32[np.ndarray, "_ D"]] = []

    def __call__(self, block: int, ends: Ends, attention: Array, rows: Any) -> Update:
        """The last layer's Update of a block to the state after the norm."""
        normed, update, missing, energy = self._program(
            ends, attention, self._weight, rows, self._positions[block]
        )
        self.normed.append(np.asarray(normed)[: self._counts[block]])
        self._missing, self._energy = self._missing + float(missing), self._energy + float(energy)
        return update

    @property
    def closure_error(self) -> float:
        """‖h_0 + Σδ - h_N‖_F / ‖h_N‖_F."""
        with np.errstate(invalid="ignore"):  # ∞/∞ is NaN, which the caller checks for
            return float(np.sqrt(np.divide(self._missing, self._energy)))


def _padded(positions: list[Int32[np.ndarray, " _"]]) -> list[Int32[np.ndarray, " p"]]:
    """Positions in each block, padded to one length by repetition, so that one program serves all."""
    return [np.resize(block, max(map(len, positions))) for block in positions]


def _all_of(blocks: Iterator[BlockUpdate]) -> Iterator[Iterator[BlockUpdate]]:
    """Yields the layer's blocks, then runs any blocks that the caller did not ask for."""
    yield blocks
    for _ in blocks:
        pass


def concatenate_blocks(layers: Iterable[Iterable[BlockUpdate]]) -> Iterator[Update]:
    """Each layer's Update of all blocks; after the last layer's also the normed one, if there is one."""
    for blocks in layers:
        updates, normed = map(list, zip(*blocks, strict=True))
        # Yielded without a reference left here, which would keep it in memory.
        whole = [_join(updates)]
        del updates
        yield whole.pop()
        if normed[0]:
            yield _join(normed)


def _join(blocks: Sequence[Any]) -> Any:
    return blocks[0] if len(blocks) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)
