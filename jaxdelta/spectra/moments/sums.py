"""Sums of xxᵀ over a corpus, block by block, in memory independent of its length.

Axes: B windows of a block, T tokens of a window, d hidden size, P parts (the update, attention, the MLP), G
groups of windows, p directions of a frame, s set-aside tokens.

Products of float32 rows are computed in float32, at full precision, and summed in float64. A direction with
nearly all of the energy would drown the others in its rounding error, so it is split off first. A row is
x = aQ + r, a = xQᵀ its coordinates in a frame Q of the layer's leading directions in the first block. Then
Σxxᵀ = Qᵀ(Σaaᵀ)Q + Qᵀ(Σarᵀ) + (Σraᵀ)Q + Σrrᵀ exactly, for every Q. (Chan, Golub & LeVeque 1983 do this with
the mean.) A token whose state's norm is far above the median may be a sink: its row is set aside, since the
sinks are known only after the last token. All functions must be traced with 64-bit types on.
"""

from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int

from jaxdelta.spectra.channels import ChannelTable
from jaxdelta.spectra.linalg import product
from jaxdelta.sweep.sweep import Update
from jaxdelta.utils.arrays import AnyArray

FRAME = 8
_FRAME_STEPS, _FRAME_ROWS = 4, 2048
_BLOCK, _BLOCKS = 256, 8  # square blocks of Σrrᵀ: smallest size, largest number along a side
_SQUARE = 128  # size of the squares by which Σxxᵀ is assembled
_CHUNK = 32  # number of set-aside rows, all of one group, added at once


class Moments(NamedTuple):
    """Sums over the counted tokens.

    Attributes:
        rest: Σrrᵀ of each part and group; only the lower triangle is valid.
        cross: Σarᵀ of each part and group.
        lead: Σaaᵀ of each part and group.
        sums: Σx of each part and group.
        counts: number of tokens of each group.
        channels: energies by channel.
    """

    rest: Float64[AnyArray, "P G d d"]
    cross: Float64[AnyArray, "P G p d"]
    lead: Float64[AnyArray, "P G p p"]
    sums: Float64[AnyArray, "P G d"]
    counts: Float64[AnyArray, " G"]
    channels: ChannelTable

    @classmethod
    def zeros(cls, parts: int, groups: int, hidden: int) -> "Moments":
        """The sums over no tokens."""
        shapes = (hidden, hidden), (FRAME, hidden), (FRAME, FRAME), (hidden,)
        rest, cross, lead, sums = (jnp.zeros((parts, groups, *shape), jnp.float64) for shape in shapes)
        channels = ChannelTable(*(jnp.zeros(hidden, jnp.float64) for _ in range(3)))
        return cls(rest, cross, lead, sums, jnp.zeros(groups, jnp.float64), channels)


def parts_of(update: Update, parts: tuple[str, ...]) -> Float32[Array, "P n d"]:
    """The named parts of an update."""
    every = {"update": update.delta, "attention": update.attention, "mlp": update.mlp}
    return jnp.stack([jnp.asarray(every[part]) for part in parts])


def find_frame(
    update: Update, counted: Bool[AnyArray, " n"], parts: tuple[str, ...]
) -> Float64[Array, "P p d"]:
    """The leading directions of each part's rows, orthonormal, by subspace iteration on a sample of rows.

    They need not be exact, only leave no dominant direction outside.
    """
    some = slice(None, None, max(1, len(counted) // _FRAME_ROWS))
    rows = parts_of(jax.tree.map(lambda rows: rows[some], update), parts)
    x = jnp.where(jnp.asarray(counted)[some, None], rows, 0)
    start = jax.random.normal(jax.random.key(0), (FRAME, x.shape[-1]), jnp.float32)

    def step(_: Any, frame: Array) -> Array:
        # Without barriers XLA moves transposes out of products and, on a CPU, transposes x for each of them.
        coordinates = jax.lax.optimization_barrier(product(x, jnp.swapaxes(frame, 1, 2)))
        image = jax.lax.optimization_barrier(product(jnp.swapaxes(coordinates, 1, 2), x))
        return _orthonormal(image)

    first = jnp.broadcast_to(start, (len(x), *start.shape))
    return _orthonormal(jax.lax.fori_loop(0, _FRAME_STEPS, step, first).astype(jnp.float64))


def _orthonormal(rows: Float[Array, "P p d"]) -> Float[Array, "P p d"]:
    return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(rows, 1, 2))[0], 1, 2)


class BlockTokens(NamedTuple):
    """The tokens of a block of windows: mask of the counted ones, group of each token, and the groups in each
    window, padded with -1."""

    counted: Bool[AnyArray, "B T"]
    owners: Int[AnyArray, "B T"]
    visits: Int[AnyArray, "B V"]


def add_block(
    moments: Moments,
    frame: Float64[AnyArray, "P p d"],
    update: Update,
    tokens: BlockTokens,
    parts: tuple[str, ...],
) -> tuple[Moments, Float32[Array, "P n p"]]:
    """Adds the counted tokens of a block; also returns the coordinates of all its tokens in the frame."""
    windows = jax.tree.map(lambda rows: rows.reshape(*tokens.counted.shape, -1), update)

    def add(moments: Moments, window: tuple[Update, BlockTokens]) -> tuple[Moments, Array]:
        update, tokens = window
        x = parts_of(update, parts)
        # Rounding does no harm: r is computed from the rounded coordinates.
        coordinates = product(x, jnp.swapaxes(frame, 1, 2).astype(jnp.float32))
        counted = jnp.asarray(tokens.counted)[:, None]
        delta, h = (jnp.where(counted, part, 0) for part in (update.delta, update.h))
        moments = moments._replace(channels=moments.channels.plus(delta, h))

        def visit(moments: Moments, group: Array) -> tuple[Moments, None]:
            weight = jnp.asarray(tokens.counted & (tokens.owners == group)).astype(jnp.float32)[:, None]
            return _add_group(moments, frame, x, coordinates * weight, weight, group), None

        visits = jnp.asarray(tokens.visits)
        if len(visits) == 1:
            return visit(moments, visits[0])[0], coordinates
        return jax.lax.scan(visit, moments, visits)[0], coordinates

    moments, coordinates = jax.lax.scan(add, moments, (windows, jax.tree.map(jnp.asarray, tokens)))
    return moments, jnp.swapaxes(coordinates, 0, 1).reshape(len(parts), -1, frame.shape[1])


def _add_group(
    moments: Moments,
    frame: Float64[AnyArray, "P p d"],
    x: Float32[Array, "P T d"],
    a: Float32[Array, "P T p"],
    weight: Float32[Array, "T 1"],
    group: Int[Array, ""],
) -> Moments:
    """Adds a window's tokens of one group: `weight` is 1 for them, else 0; a, their coordinates, else 0."""
    rest = _rest(x, weight, a, frame)
    # Σr is computed along with Σar, and Σx from both: a sum over x itself would copy it in float64.
    counted = jnp.concatenate([a, jnp.broadcast_to(weight, (*a.shape[:2], 1))], axis=2)
    summed = [product(jnp.swapaxes(counted, 1, 2), block) for block in rest]
    sums_of_rest = jnp.concatenate(summed, axis=2).astype(jnp.float64)
    a = a.astype(jnp.float64)
    along_sums = product(jnp.sum(a, axis=1, keepdims=True), jnp.asarray(frame))[:, 0]
    *arrays, channels = moments
    squares, cross, lead, sums, counts = map(jnp.asarray, arrays)
    return Moments(
        _add_squares(squares, rest, group),
        cross.at[:, group].add(sums_of_rest[:, :-1]),
        lead.at[:, group].add(product(jnp.swapaxes(a, 1, 2), a)),
        sums.at[:, group].add(sums_of_rest[:, -1] + along_sums),
        counts.at[group].add(weight.sum().astype(jnp.float64)),
        channels,
    )


def _rest(
    x: Float32[Array, "P T d"],
    weight: Float32[Array, "T 1"],
    a: Float32[Array, "P T p"],
    frame: Float64[AnyArray, "P p d"],
) -> list[Float32[Array, "P T _"]]:
    """r = x - aQ, computed in float64, as one array per block of columns.

    XLA on a CPU would copy the columns of one array before each product, at half the cost of the product.
    """
    hidden = x.shape[2]
    size = max(_BLOCK, -(-hidden // _BLOCKS))
    blocks = [slice(start, min(start + size, hidden)) for start in range(0, hidden, size)]

    def block(columns: slice) -> Array:
        # Term by term, in one pass over x: for a product XLA would make float64 copies.
        q = jnp.asarray(frame)[:, :, None, columns]
        along = sum(a[:, :, i, None].astype(jnp.float64) * q[:, i] for i in range(a.shape[2]))
        return ((x[:, :, columns] * weight).astype(jnp.float64) - along).astype(jnp.float32)

    def nothing(columns: slice) -> Array:
        return jnp.zeros((*x.shape[:2], columns.stop - columns.start), jnp.float32)

    # `cond` makes XLA materialise r; otherwise it recomputes r for each transpose.
    return jax.lax.cond(jnp.any(weight > 0), lambda: [*map(block, blocks)], lambda: [*map(nothing, blocks)])


def _add_squares(
    squares: Float64[Array, "P G d d"], rest: list[Float32[Array, "P T _"]], group: Int[Array, ""]
) -> Float64[Array, "P G d d"]:
    """Adds Σrrᵀ to the blocks on and below the diagonal."""
    size = rest[0].shape[2]
    for i, rows in enumerate(rest):
        # Transposed once; XLA on a CPU would do so in every product.
        transposed = jax.lax.optimization_barrier(jnp.swapaxes(rows, 1, 2))
        for j, columns in enumerate(rest[: i + 1]):
            square = product(transposed, columns).astype(jnp.float64)
            at = slice(i * size, i * size + rows.shape[2]), slice(j * size, j * size + columns.shape[2])
            squares = squares.at[:, group, *at].add(square)
    return squares


@partial(jax.jit, donate_argnums=0)
def assembled(
    rest: Float64[Array, "P G d d"],
    cross: Float64[Array, "P G p d"],
    lead: Float64[Array, "P G p p"],
    frame: Float64[AnyArray, "P p d"],
) -> Float64[Array, "P G d d"]:
    """Σxxᵀ of each part and group, in the memory of `rest`, square by square."""
    frames = jnp.broadcast_to(jnp.asarray(frame)[:, None], cross.shape)
    mixed = product(lead / 2, frames) + cross
    left = jnp.swapaxes(jnp.concatenate([frames, mixed], axis=2), 2, 3)
    right = jnp.concatenate([mixed, frames], axis=2)
    hidden = rest.shape[-1]
    size = gcd(hidden, _SQUARE) if hidden % (_SQUARE // 2) == 0 else hidden
    starts = np.arange(0, hidden, size)
    below = np.array([(i, j) for i in starts for j in starts if j <= i])

    def at(k: Array, rest: Array) -> tuple[Array, Array, Array]:
        i, j = jnp.asarray(below)[k]
        return i, j, jax.lax.dynamic_slice(rest, (0, 0, i, j), (*rest.shape[:2], size, size))

    def add(k: Array, rest: Array) -> Array:
        i, j, square = at(k, rest)
        rows = jax.lax.dynamic_slice_in_dim(left, i, size, axis=2)
        columns = jax.lax.dynamic_slice_in_dim(right, j, size, axis=3)
        return jax.lax.dynamic_update_slice(rest, square + product(rows, columns), (0, 0, i, j))

    def mirror(k: Array, rest: Array) -> Array:
        i, j, square = at(k, rest)
        # Materialised: XLA on a CPU takes three times as long for a fused transpose.
        across = jax.lax.optimization_barrier(jnp.swapaxes(square, 2, 3))
        across = jnp.where((i == j) & jnp.tri(size, dtype=bool), square, across)
        return jax.lax.dynamic_update_slice(rest, across, (0, 0, j, i))

    # Two loops: XLA would copy `rest` in every step that writes both squares.
    return jax.lax.fori_loop(0, len(below), mirror, jax.lax.fori_loop(0, len(below), add, rest))


@partial(jax.jit, donate_argnums=0)
def _add_chunks(
    squares: Float64[Array, "P G d d"], chunks: Float32[Array, "chunks P c d"], groups: Int[Array, " chunks"]
) -> Float64[Array, "P G d d"]:
    def add(squares: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        rows, group = chunk[0].astype(jnp.float64), chunk[1]
        return squares.at[:, group].add(product(jnp.swapaxes(rows, 1, 2), rows)), None

    return jax.lax.scan(add, squares, (chunks, groups))[0]


def add_rows(
    squares: Float64[Array, "P G d d"],
    rows: Float32[np.ndarray, "P s d"],
    groups: Int[np.ndarray, " s"],
) -> Float64[Array, "P G d d"]:
    """Adds xxᵀ of the rows set aside, in float64: their energy may exceed that of all other rows."""
    chunks, owners = [], []
    for group in np.unique(groups):
        mine = rows[:, groups == group]
        filled = np.zeros((len(mine), -(-mine.shape[1] // _CHUNK) * _CHUNK, mine.shape[2]), np.float32)
        filled[:, : mine.shape[1]] = mine
        chunks += np.split(filled, filled.shape[1] // _CHUNK, axis=1)
        owners += [group] * (filled.shape[1] // _CHUNK)
    if not chunks:
        return squares
    # Padded to a power of two, so that few programs serve all layers.
    missing = (1 << (len(chunks) - 1).bit_length()) - len(chunks)
    chunks += [np.zeros_like(chunks[0])] * missing
    return _add_chunks(squares, np.stack(chunks), np.array([*owners, *[0] * missing], np.int32))
