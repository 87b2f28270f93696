"""Parameters as an Orbax checkpoint: a leaf a tensor, under its name; imported only when asked for.

A tensor of more than `VOCAB_SLICE` rows lies in several leaves, `NAME.rows_FIRST`, so that some rows of an
embedding are read without the rest. Orbax writes the leaves, a portion at a time, and lists them. They are
read by TensorStore, which is what Orbax keeps them in: Orbax itself takes 40 ms a leaf, restores only whole
ones, and into buffers that XLA copies.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from jaxdelta.errors import JaxDeltaError, first_line
from jaxdelta.model import VOCAB_SLICE
from jaxdelta.tensors import DTYPES, Source, Spec, aligned

PORTION = 128 << 20  # bytes handed to Orbax at once: each time costs it a third of a second

_SLICE = re.compile(r"(.+)\.rows_(\d+)")


class _Slice(NamedTuple):
    """The rows from `first` on of a tensor: a leaf of its own."""

    first: int
    leaf: str
    spec: Spec


def write_orbax(source: Source, names: Iterable[str], directory: Path, dtype: np.dtype | None = None) -> None:
    """Writes tensors, cast to `dtype` if there is one, in the memory of one portion and one slice.

    Raises:
        JaxDeltaError: Orbax cannot write them, or a number is too large for `dtype`.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    # What `_open` expects; and weights hardly shrink, while unpacking them takes longer than reading them.
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False
    with _plain_errors(f"{directory}: cannot be written"), context:
        for portion in _portions(_leaves(source, names, dtype)):
            ocp.partial.save(directory, portion)
        ocp.partial.finalize(directory)


def open_orbax(directory: Path) -> Source:
    """Lists what `write_orbax` wrote; tensors, or some of their rows, are then read one by one.

    Raises:
        JaxDeltaError: it is no such checkpoint, or not the whole of one.
    """
    directory = directory.absolute()
    arrays, leaves = _listed(directory)
    slices: dict[str, list[_Slice]] = {}
    for leaf in sorted(leaves):  # The numbers of rows are padded: their order is the names'.
        name, first = match.groups() if (match := _SLICE.fullmatch(leaf)) else (leaf, 0)
        slices.setdefault(name, []).append(_Slice(int(first), leaf, leaves[leaf]))
    specs = {name: _joined(directory, name, parts) for name, parts in slices.items()}
    # The rows of single tokens are asked for in order: the slice they are in is read once.
    latest = functools.lru_cache(maxsize=1)(functools.partial(_read_slice, arrays))

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec = specs[name]
        wanted = range(*slice(start, stop).indices(spec.shape[0]))
        buffer = aligned((len(wanted), *spec.shape[1:]), spec.dtype)
        for part in slices[name]:
            first, end = max(wanted.start, part.first), min(wanted.stop, part.first + part.spec.shape[0])
            if first < end:
                rows = buffer[first - wanted.start : end - wanted.start]
                if len(rows) == part.spec.shape[0]:
                    _read_into(rows, arrays, part)
                else:
                    rows[:] = latest(part)[first - part.first : end - part.first]
        return buffer

    return Source(specs, read)


def _listed(directory: Path) -> tuple[Path, dict[str, Spec]]:
    """Where the arrays are, and the shape and dtype of every leaf."""
    from orbax.checkpoint import v1 as ocp

    with _plain_errors(f"{directory}: is not a whole Orbax checkpoint"):
        listed = ocp.metadata(directory).metadata
        if not listed:  # Orbax logs what is wrong, and lists nothing.
            raise ValueError("Orbax finds no arrays in it")
        [manifest] = directory.glob("*/manifest.ocdbt")
        leaves = {leaf: Spec(tuple(entry.shape), np.dtype(entry.dtype)) for leaf, entry in listed.items()}
    return manifest.parent, leaves


def _portions(leaves: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    portion: dict[str, np.ndarray] = {}
    size = 0
    for leaf, value in leaves:
        portion[leaf] = value
        size += value.nbytes
        del value  # or it would stay here while the next one is read
        if size >= PORTION:
            yield portion
            portion.clear()
            size = 0
    if portion:
        yield portion


def _leaves(source: Source, names: Iterable[str], dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        rows = source.specs[name].shape[0]
        for start in range(0, rows, VOCAB_SLICE):
            leaf = f"{name}.rows_{start:09}" if rows > VOCAB_SLICE else name
            yield leaf, _cast(name, source.read(name, start, start + VOCAB_SLICE), dtype)


def _cast(name: str, value: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    if dtype is None or dtype == value.dtype:
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if (np.isinf(cast) & np.isfinite(value)).any():
        raise JaxDeltaError(f"{name}: holds numbers too large for {dtype}; choose another dtype")
    return cast


def _joined(directory: Path, name: str, parts: list[_Slice]) -> Spec:
    """Shape and dtype of a tensor that lies in slices, none of which may be missing."""
    rows = 0
    for part in parts:
        if part.first != rows:
            raise JaxDeltaError(f"{directory}: {name} lacks its rows from {rows} on; convert the model again")
        rows += part.spec.shape[0]
    spec = parts[0].spec
    if spec.dtype not in [np.dtype(dtype) for dtype in DTYPES.values()]:
        raise JaxDeltaError(f"{directory}: {name} has dtype {spec.dtype}; jaxdelta reads {', '.join(DTYPES)}")
    return Spec((rows, *spec.shape[1:]), spec.dtype)


def _read_slice(arrays: Path, part: _Slice) -> np.ndarray:
    buffer = aligned(part.spec.shape, part.spec.dtype)
    _read_into(buffer, arrays, part)
    return buffer


def _read_into(buffer: np.ndarray, arrays: Path, part: _Slice) -> None:
    import tensorstore

    with _plain_errors(f"{arrays.parent}: {part.leaf} cannot be read"):
        tensorstore.array(buffer).write(_open(arrays, part.leaf)).result()


def _open(arrays: Path, leaf: str) -> Any:
    import tensorstore

    base = {"driver": "file", "path": f"{arrays}/"}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{leaf}/"},
        "fill_missing_data_reads": False,  # Zeros in place of weights that are lost would pass unseen.
    }
    return tensorstore.open(spec, open=True, read=True).result()


@contextlib.contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Orbax's and TensorStore's errors told in one line; Orbax logs them too, and every step it takes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    except JaxDeltaError:
        raise
    except Exception as error:  # They raise whatever comes to hand.
        raise JaxDeltaError(f"{what} ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
