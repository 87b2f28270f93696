"""Parameters as an Orbax checkpoint: a leaf a tensor, under its name; imported only when asked for.

A tensor of more than `VOCAB_SLICE` rows lies in several leaves, `NAME.rows_FIRST`, so that some rows of an
embedding are read without the rest. Orbax writes the leaves, a portion at a time. They are read by
TensorStore, which is what Orbax keeps them in: Orbax itself takes a second to import and 40 ms a leaf, and
restores only whole leaves, into buffers that XLA copies.
"""

import contextlib
import errno
import functools
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from jaxdelta.checkpoint.source import DTYPES, TensorSource, TensorSpec, aligned
from jaxdelta.errors import JaxDeltaError, first_line
from jaxdelta.model.loss import VOCAB_SLICE

PORTION = 128 << 20  # bytes handed to Orbax at once: each time costs it a third of a second
_SLICE = re.compile(r"(.+)\.rows_(\d+)")


class _Slice(NamedTuple):
    """The rows from `first` on of a tensor: a leaf of its own."""

    first: int
    array: Any  # TensorStore's

    @property
    def end(self) -> int:
        return self.first + self.array.shape[0]


def write_orbax(
    source: TensorSource, names: Iterable[str], directory: Path, dtype: np.dtype | None = None
) -> None:
    """Writes tensors, cast to `dtype` if there is one, in the memory of one portion and one slice.

    Raises:
        OSError: Orbax cannot write them.
        JaxDeltaError: they cannot be read, or a number is too large for `dtype`.
    """
    from orbax.checkpoint import v1 as ocp

    with quiet(), _saving():
        try:
            for portion in _portions(_leaves(source, names, dtype)):
                ocp.partial.save(directory, portion)
            ocp.partial.finalize(directory)
        except JaxDeltaError:
            raise
        except Exception as error:  # Orbax raises whatever comes to hand.
            raise OSError(errno.EIO, _reason(error)) from error


def _saving() -> Any:
    """Orbax's context in which all is written here."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    # What `open_arrays` expects; and numbers hardly shrink, while unpacking takes longer than reading them.
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False
    return context


def open_orbax(directory: Path) -> TensorSource:
    """Lists what `write_orbax` wrote; tensors, or some of their rows, are then read one by one.

    Raises:
        JaxDeltaError: it is no such checkpoint, or not the whole of one.
    """
    with _plain_errors(f"{directory}: is not a whole Orbax checkpoint"):
        arrays = open_arrays(directory.absolute())
    slices: dict[str, list[_Slice]] = {}
    for leaf in sorted(arrays):  # The numbers of rows are padded: their order is the names'.
        name, first = match.groups() if (match := _SLICE.fullmatch(leaf)) else (leaf, 0)
        slices.setdefault(name, []).append(_Slice(int(first), arrays[leaf]))
    specs = {name: _joined(directory, name, parts) for name, parts in slices.items()}

    @functools.lru_cache(maxsize=1)
    def latest(name: str, number: int) -> np.ndarray:
        """The rows of single tokens are asked for in order: the slice they are in is read once."""
        array = slices[name][number].array
        buffer = aligned(array.shape, specs[name].dtype)
        _read_into(buffer, array, f"{directory}: {name}")
        return buffer

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        spec = specs[name]
        wanted = range(*slice(start, stop).indices(spec.shape[0]))
        buffer = aligned((len(wanted), *spec.shape[1:]), spec.dtype)
        for number, part in enumerate(slices[name]):
            first, end = max(wanted.start, part.first), min(wanted.stop, part.end)
            if first < end:
                rows = buffer[first - wanted.start : end - wanted.start]
                if (first, end) == (part.first, part.end):
                    _read_into(rows, part.array, f"{directory}: {name}")
                else:
                    rows[:] = latest(name, number)[first - part.first : end - part.first]
        return buffer

    return TensorSource(specs, read)


def open_arrays(directory: Path) -> dict[str, Any]:
    """Every leaf as a TensorStore; none of the data is read. Raises whatever TensorStore does."""
    import tensorstore

    manifests = [*directory.glob("*/manifest.ocdbt")]
    if len(manifests) != 1:
        raise ValueError(f"it has {len(manifests)} files */manifest.ocdbt")
    base = {"driver": "file", "path": f"{manifests[0].parent}/"}
    keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    leaves = [key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")]

    def start(leaf: str) -> Any:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{leaf}/"},
            "fill_missing_data_reads": False,  # Zeros in place of weights that are lost would pass unseen.
        }
        return tensorstore.open(spec, open=True, read=True)

    opening = {leaf: start(leaf) for leaf in leaves}
    return {leaf: array.result() for leaf, array in opening.items()}


def save_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with Orbax, in which all processes must take part. Raises whatever Orbax does."""
    from orbax.checkpoint import v1 as ocp

    with _saving():
        ocp.save(directory, dict(arrays))


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The same without Orbax, and without any other process. Raises whatever TensorStore does."""
    import tensorstore

    base = {"driver": "file", "path": f"{directory}/arrays/"}
    with tensorstore.Transaction(atomic=True) as together:
        for name, array in arrays.items():
            spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
            dtype, shape = tensorstore.dtype(array.dtype), array.shape
            store = tensorstore.open(spec, create=True, transaction=together, dtype=dtype, shape=shape)
            store.result()[...] = array


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


def _leaves(
    source: TensorSource, names: Iterable[str], dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
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


def _joined(directory: Path, name: str, parts: list[_Slice]) -> TensorSpec:
    """Shape and dtype of a tensor that lies in slices, none of which may be missing."""
    rows = 0
    for part in parts:
        if part.first != rows:
            raise JaxDeltaError(f"{directory}: {name} lacks its rows from {rows} on; convert the model again")
        rows = part.end
    dtype = parts[0].array.dtype.numpy_dtype
    if dtype not in [np.dtype(known) for known in DTYPES.values()]:
        raise JaxDeltaError(f"{directory}: {name} has dtype {dtype}; jaxdelta reads {', '.join(DTYPES)}")
    return TensorSpec((rows, *parts[0].array.shape[1:]), dtype)


def _read_into(buffer: np.ndarray, array: Any, name: str) -> None:
    import tensorstore

    with _plain_errors(f"{name} cannot be read"):
        tensorstore.array(buffer).write(array).result()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs every step and every error; after an error its threads go on to, so it stays quiet then.

    What an error or a signal leaves half done, Python tells of as it is removed: event loops, and coroutines
    that nobody waited for.
    """
    verbosity, hook, filters = logging.get_verbosity(), sys.unraisablehook, warnings.catch_warnings()
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda report: None if _is_left_over(report) else hook(report)
    filters.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    filters.__exit__(None, None, None)
    logging.set_verbosity(verbosity)
    sys.unraisablehook = hook


def _is_left_over(report: Any) -> bool:
    """An event loop half made, or what TensorStore's threads tell to one that Orbax closed at an error; but
    no signal that struck there."""
    if issubclass(report.exc_type, KeyboardInterrupt | SystemExit):
        return False
    of_asyncio = (getattr(report.object, "__module__", None) or "").startswith("asyncio.")
    return of_asyncio or str(report.exc_value) == "Event loop is closed"


@contextlib.contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    try:
        yield
    except JaxDeltaError:
        raise
    except Exception as error:  # TensorStore raises whatever comes to hand.
        raise JaxDeltaError(f"{what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The last clause of TensorStore's long messages, without the specification at the end."""
    return re.sub(r" \[\w+=.*", "", first_line(error)).rpartition(": ")[2]
