"""Memory plan: divides the work so that a run fits the device, before any weight is read.

Sizes are bytes. Axes: n tokens, m of them in a block; d hidden size.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxdelta.checkpoint.weights import Weights
from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.attention import MIN_QUERY_BLOCK, pairs_at_once, query_block
from jaxdelta.model.config import DTYPE_BYTES, ModelConfig
from jaxdelta.model.loss import PROBED, VOCAB_SLICE
from jaxdelta.spectra.moments.accumulate import moment_bytes
from jaxdelta.spectra.scheduler import layers_at_once, layers_pending, spectrum_bytes, update_bytes
from jaxdelta.sweep.mesh import share
from jaxdelta.sweep.sweep import Blocks

MODES = ("auto", "stream", "resident")

# Tokens in a block of a long text, on a CPU and on an accelerator. Larger blocks are not faster and need more
# memory; on a CPU they do not fit its cache.
CACHED_TOKENS, BLOCK_TOKENS = 2_048, 8_192
SPARE_BYTES = 1e9  # rows are preferred up to this size even where moments would be smaller
FEW_GROUPS = 10  # groups of a text whose moments do not fit with more groups
USABLE = 0.9  # share of a device's memory; the runtime needs the rest


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is summarised of each layer.

    `views`: number of views, a masked one not counted; `parts` of the update: itself, attention, MLP;
    `groups`: resampling groups, at most `visits` of them in a window; `moments_only`: never from rows.
    """

    views: int = 1
    parts: int = 1
    groups: int = 1
    visits: int = 1
    moments_only: bool = False

    def row_work(self, n: int, d: int) -> float:
        """Time of a layer from rows, in float64 multiply-adds: Gram matrix and eigensolution."""
        m = min(n, d)
        return self.views * (n * d * m + 3.0 * m**3)

    def moment_work(self, n: int, d: int, blocks: float) -> float:
        """Time of a layer from moments: float32 products of each part, a full eigensolution of each view.

        The coefficients, also those of `row_work`, were measured on one core at d = 1024; 10⁹ is the overhead
        of a block.
        """
        return 0.6 * self.visits * self.parts * n * d**2 + 8.0 * self.views * d**3 + 1e9 * blocks


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the pass is divided, what layers are summarised from, and the bytes on the device by purpose.

    `groups`: number of groups whose moments are kept, 0 if layers are summarised from rows; `at_once`: number
    of layers summarised together; `waiting`: bytes of states kept off the device.
    """

    mode: str
    blocks: Blocks
    at_once: int
    parts: dict[str, int]
    limit: int
    waiting: int = 0
    groups: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(value)}" for name, value in self.parts.items())
        where = f", {_size(self.waiting)} of states in {self.blocks.place}" if self.waiting else ""
        how = ", moments" if self.groups else ""
        return f"{self.mode}{where}{how}: {_size(self.total)} of {_size(self.limit)} ({parts})"


@dataclasses.dataclass(frozen=True)
class MemoryDemand:
    """What the memory of a run depends on.

    `data` devices share the windows, `model` devices share each layer's weights.
    """

    weights: Weights
    tokens: tuple[int, int]  # (windows, length)
    compute_dtype: str
    residual_dtype: str
    resident: bool
    measurement: Measurement = Measurement()
    scratch: bool = False
    data: int = 1
    model: int = 1

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.weights.config

    def plan(self, limit: int) -> Plan:
        """The first division that fits: as coarse as possible, with the states on the device if possible.

        Raises:
            JaxDeltaError: none fits; the message says how much the smallest lacks.
        """
        tried: list[Plan] = []
        for groups in self._makers():
            for blocks in self._divisions(groups):
                plan = self._plan(blocks, groups, limit)
                if plan.total <= limit:
                    return plan
                tried.append(plan)
        least = min(tried, key=lambda plan: plan.total)
        raise JaxDeltaError(
            f"{least}: {_size(least.total - limit)} too much; fewer tokens (--max_tokens)"
            f"{' or --memory=stream' if self.resident else ''} would need less"
        )

    def _plan(self, blocks: Blocks, groups: int, limit: int) -> Plan:
        parts = self._parts(blocks)
        at_once, parts["spectra"] = self._spectra(blocks, groups, limit - sum(parts.values()))
        waiting = 0 if blocks.place == "device" else self._state * self._share(math.prod(self.tokens))
        mode = "resident" if self.resident else "stream"
        return Plan(mode, blocks, at_once, parts, limit, waiting, groups)

    def _makers(self) -> list[int]:
        """What to summarise layers from, the best first: rows (0), or moments of this number of groups.

        Rows come first if they take less time, and either less memory or little.
        """
        measurement = self.measurement
        moments = sorted({measurement.groups, min(measurement.groups, FEW_GROUPS)}, reverse=True)
        if measurement.moments_only:
            return moments
        n, d = self._shape
        blocks = n / (self.data * block_tokens())
        cheaper = measurement.row_work(n, d) <= measurement.moment_work(n, d, blocks)
        room = max(moment_bytes(measurement.parts, measurement.groups, d), SPARE_BYTES)
        return [0, *moments] if cheaper and self._rows(0)[1] <= room else [*moments, 0]

    @property
    def _shape(self) -> tuple[int, int]:
        """(n, d) of an update, without the first token of each window."""
        windows, length = self.tokens
        return windows * (length - 1), self.config.hidden_size

    def _rows(self, left: int) -> tuple[int, int]:
        """Number of layers summarised together from rows with `left` bytes free, and the bytes they take."""
        shape, devices = self._shape, self.data * self.model
        count = layers_at_once(shape, self.config.num_layers, left, devices)
        return count, count * spectrum_bytes(*shape) + layers_pending(count * devices) * update_bytes(*shape)

    def _spectra(self, blocks: Blocks, groups: int, left: int) -> tuple[int, int]:
        """Number of layers summarised together with `left` bytes free, and the bytes that takes."""
        if not groups:
            return self._rows(left)
        d = self.config.hidden_size
        # The previous block is freed only once the next one is being computed.
        block = update_bytes(self._share(blocks.windows * self.tokens[1]), d)
        return 1, moment_bytes(self.measurement.parts, groups, d) + 2 * block

    def _divisions(self, groups: int) -> Iterator[Blocks]:
        windows, length = self.tokens
        most = min(windows, max(1, self.data * block_tokens() // length)) if groups else windows
        counts = dict.fromkeys(
            self._filled(-(-windows // blocks), groups) for blocks in range(-(-windows // most), windows + 1)
        )
        for place in ("device", "scratch" if self.scratch else "host"):
            for count in counts:
                queries = query_block(self.config, length, self._pairs(count) if self.model > 1 else 1)
                yield Blocks(count, queries, place)
                if queries > MIN_QUERY_BLOCK:
                    yield Blocks(count, MIN_QUERY_BLOCK, place)

    def _filled(self, windows: int, groups: int) -> int:
        """Rounds up to a multiple of the devices that share the windows: all of them when taking moments."""
        devices = self.data * (self.model if groups else 1)
        return -(-windows // devices) * devices

    def _pairs(self, count: int) -> int:
        """Pairs of a window and a key/value head on each device."""
        return self._share(count) * self.config.num_kv_heads // self.model

    def _share(self, count: int) -> int:
        """Each device's share of windows or tokens."""
        return -(-count // self.data)

    @property
    def _state(self) -> int:
        """Bytes of a token's state: the residual stream, and the sum of the updates."""
        return self.config.hidden_size * (DTYPE_BYTES[self.residual_dtype] + 4)

    def _parts(self, blocks: Blocks) -> dict[str, int]:
        config, (windows, length) = self.config, self.tokens
        m, n, d = self._share(blocks.windows) * length, self._share(windows * length), config.hidden_size
        layers = [sum(map(_bytes, leaves)) for leaves in self._layers]
        has_own_head = config.has_head and not config.tie_embeddings
        embeddings = config.vocab_size * d * DTYPE_BYTES[config.dtype] * (1 + has_own_head)
        loss = 8 * min(math.prod(self.tokens), PROBED) * VOCAB_SLICE
        return {
            # A resident model stacks its layers; the one being computed is a copy.
            "weights": sum(layers) + max(layers) + embeddings if self.resident else 2 * max(layers),
            # States before the layer and after it: of all blocks, or of the one being computed.
            "states": 2 * (n if blocks.place == "device" else m) * self._state,
            "layer": max(self._layer_workspace(blocks), loss),
        }

    def _layer_workspace(self, blocks: Blocks) -> int:
        """Queries, keys, values, scores and MLP activations in float32; weights in the compute dtype."""
        config, (_, length) = self.config, self.tokens
        windows, wide = self._share(blocks.windows), DTYPE_BYTES[self.compute_dtype]
        m, model = windows * length, self.model
        heads = (2 * config.num_heads + 4 * config.num_kv_heads) * config.head_dim // model
        pairs, group = self._pairs(blocks.windows), config.num_heads // config.num_kv_heads
        at_once = pairs if model > 1 else pairs_at_once(config, blocks.queries, length)
        scores = 3 * min(pairs, at_once) * group * blocks.queries * length
        inside = m * max(heads + 2 * config.hidden_size, self._mlp_width())
        # Experts are computed one at a time: a weight's leading axes do not count.
        largest = max(math.prod(leaf.shape[-2:]) for leaves in self._layers for leaf in leaves)
        return 4 * (scores + inside + 3 * m * config.hidden_size) + 3 * largest * wide

    def _mlp_width(self) -> int:
        """Activations per token in the MLP; with experts also routing scores and shares."""
        experts, dense = self.config.experts, self.config.layers_of(sparse=False)
        widths = [3 * self.config.intermediate_size // self.model] if dense else []
        if experts:
            widths.append(3 * experts.intermediate_size // self.model + 2 * experts.count)
        return max(widths)

    @cached_property
    def _layers(self) -> list[list[Any]]:
        """Shapes of every layer's arrays on one device."""
        model = 1 if self.resident else self.model  # a resident model is on the first device only
        layers = map(self.weights.abstract_layer, range(self.config.num_layers))
        return [[share(path, leaf, model) for path, leaf in nnx.to_flat_state(layer)] for layer in layers]


def block_tokens() -> int:
    """Tokens in a block of a long text, for each device."""
    return CACHED_TOKENS if jax.default_backend() == "cpu" else BLOCK_TOKENS


def device_limit(gigabytes: float | None = None, devices: int = 1) -> int:
    """Usable bytes of each device, at most `gigabytes` 10⁹. `devices` of a CPU share the machine's memory."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    return int(min(USABLE * memory, math.inf if gigabytes is None else gigabytes * 1e9))


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
