"""Orbax checkpoints with one leaf per tensor, under its name. Imported on demand.

A tensor of more than `VOCAB_SLICE` rows is split into leaves `NAME.rows_FIRST`, so that rows of an embedding
can be read alone. Orbax writes the leaves, a portion at a time. TensorStore, Orbax's own storage, reads them:
Orbax takes a second to import and 40 ms a leaf, and restores only whole leaves, into buffers that XLA copies.
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
from jaxdelta.errors import LONGEST_REASON, JaxDeltaError, first_line, plain_errors, short
from jaxdelta.model.loss import VOCAB_SLICE

PORTION = 128 << 20  # bytes per call of Orbax, which costs a third of a second
_SLICE = re.compile(r"(.+)\.rows_(\d+)")


class _Slice(NamedTuple):
    """The rows of a tensor from `first` on, as a leaf."""

    first: int
    array: Any  # TensorStore's

    @property
    def end(self) -> int:
        return self.first + self.array.shape[0]


def write_orbax(
    source: TensorSource, names: Iterable[str], directory: Path, dtype: np.dtype | None = None
) -> None:
    """Writes tensors, cast to `dtype` if given; no more than one portion and one slice are in memory.

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
        except Exception as error:  # Orbax raises errors of any type.
            raise OSError(errno.EIO, _reason(error)) from error


def _saving() -> Any:
    """Orbax's context for writing, in the format that `open_arrays` reads."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False  # Weights hardly shrink, and unpacking outlasts reading.
    return context


def open_orbax(directory: Path) -> TensorSource:
    """Lists the tensors that `write_orbax` wrote; they, or some of their rows, are then read one by one.

    Raises:
        JaxDeltaError: it is no such checkpoint, or not a whole one.
    """
    with plain_errors(directory, {Exception: "{}: is not a whole Orbax checkpoint ({})"}, reason=_reason):
        arrays = open_arrays(directory.absolute())
    slices: dict[str, list[_Slice]] = {}
    for leaf in sorted(arrays):  # Row numbers are zero-padded, so this is their order.
        name, first = match.groups() if (match := _SLICE.fullmatch(leaf)) else (leaf, 0)
        slices.setdefault(name, []).append(_Slice(int(first), arrays[leaf]))
    specs = {name: _spec(directory, name, parts) for name, parts in slices.items()}

    @functools.lru_cache(maxsize=1)
    def latest(name: str, number: int) -> np.ndarray:
        """The slice read last: rows of single tokens are read in order, several from one slice."""
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
    """Opens every leaf with TensorStore, without reading its data; raises TensorStore's errors."""
    import tensorstore

    manifests = [*directory.glob("*/manifest.ocdbt")]
    if len(manifests) != 1:
        raise ValueError(f"it has {len(manifests)} files */manifest.ocdbt")
    base = {"driver": "file", "path": f"{manifests[0].parent}/"}
    keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    leaves = [key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")]
    # Without the last setting lost weights would be read as zeros.
    opening = {
        leaf: tensorstore.open(_zarr(base, leaf) | {"fill_missing_data_reads": False}, open=True, read=True)
        for leaf in leaves
    }
    return {leaf: array.result() for leaf, array in opening.items()}


def _zarr(base: dict[str, str], leaf: str) -> dict[str, Any]:
    """TensorStore's specification of a leaf."""
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{leaf}/"}}


def save_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with Orbax, in which all processes must take part; raises Orbax's errors."""
    from orbax.checkpoint import v1 as ocp

    with _saving():
        ocp.save(directory, dict(arrays))


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the same with TensorStore, in this process alone; raises TensorStore's errors."""
    import tensorstore

    base = {"driver": "file", "path": f"{directory}/arrays/"}
    with tensorstore.Transaction(atomic=True) as together:
        for name, array in arrays.items():
            dtype, shape = tensorstore.dtype(array.dtype), array.shape
            store = tensorstore.open(
                _zarr(base, name), create=True, transaction=together, dtype=dtype, shape=shape
            )
            store.result()[...] = array


def _portions(leaves: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    portion: dict[str, np.ndarray] = {}
    size = 0
    for leaf, value in leaves:
        portion[leaf] = value
        size += value.nbytes
        del value  # or it would stay in memory while the next one is read
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


def _spec(directory: Path, name: str, parts: list[_Slice]) -> TensorSpec:
    """Shape and dtype of a tensor in slices, none of which may be missing."""
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

    with plain_errors(name, {Exception: "{} cannot be read ({})"}, reason=_reason):
        tensorstore.array(buffer).write(array).result()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax, which logs every step and error; after an error it stays silent, as its threads go on.

    Ignores what Python reports of event loops and coroutines that an error or a signal leaves unfinished.
    """
    verbosity, hook, filters = logging.get_verbosity(), sys.unraisablehook, warnings.catch_warnings()
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda report: None if _is_unfinished(report) else hook(report)
    filters.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    filters.__exit__(None, None, None)
    logging.set_verbosity(verbosity)
    sys.unraisablehook = hook


def _is_unfinished(report: Any) -> bool:
    """Whether it is about an unfinished event loop, or one that Orbax closed at an error; never a signal."""
    if issubclass(report.exc_type, KeyboardInterrupt | SystemExit):
        return False
    module = getattr(report.object, "__module__", None) or ""
    return module.startswith("asyncio.") or str(report.exc_value) == "Event loop is closed"


def _reason(error: Exception) -> str:
    """The last clause of TensorStore's long messages, without the specification at the end."""
    whole = first_line(error, most=sys.maxsize)
    return short(re.sub(r" \[\w+=.*", "", whole).rpartition(": ")[2], LONGEST_REASON)
