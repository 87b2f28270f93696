"""Tensors on disk: what a checkpoint's files hold, listed at once and read one by one."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdelta import hub
from jaxdelta.errors import JaxDeltaError, first_line

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
ALIGNMENT = 64  # of host buffers that XLA's CPU client does not copy


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors that can be listed at once and read one by one; names as in a causal language model.

    `read(name)` reads a tensor, `read(name, start, stop)` those rows of it.
    """

    specs: Mapping[str, Spec]
    read: Callable[..., np.ndarray]


def safetensors_files(directory: Path) -> list[Path]:
    """The files that hold the weights: model.safetensors, or those its index names."""
    if (directory / hub.WEIGHTS).exists():
        return [directory / hub.WEIGHTS]
    index = directory / hub.INDEX
    if not index.exists():
        return []
    files = [directory / name for name in hub.shards(index)]
    if missing := [f.name for f in files if not f.exists()]:
        raise JaxDeltaError(
            f"{index}: names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing"
        )
    return files


def open_safetensors(files: list[Path]) -> Source:
    """Opens the files' headers, which safetensors checks; tensors are then read straight from their places.

    By pread into buffers of our own: mapped pages would count twice in memory, and the library has no way
    to read into a buffer that XLA can use as it lies.
    """
    places: dict[str, _Place] = {}
    for file in files:
        for name, place in _places(file):
            places[_causal_name(name)] = place
    specs = {name: Spec(place.shape, place.dtype) for name, place in places.items()}
    return Source(specs, lambda name, start=0, stop=None: places[name].read(start, stop))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, its name there, and the offset of its first byte."""

    file: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = range(*slice(start, stop).indices(self.shape[0]))
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        buffer = aligned((len(rows), *self.shape[1:]), self.dtype)
        view = buffer.reshape(-1).view(np.uint8).data
        done, first = 0, self.offset + rows.start * row_bytes
        try:
            with open(self.file, "rb", buffering=0) as file:
                while done < len(view):
                    count = os.preadv(file.fileno(), [view[done:]], first + done)
                    if count == 0:
                        raise OSError(0, "the file has become shorter")
                    done += count
        except OSError as error:
            raise JaxDeltaError(f"{self.file}: {self.name} cannot be read ({error.strerror})") from error
        return buffer


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA's CPU client uses as it lies, where others are copied."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _places(file: Path) -> Iterator[tuple[str, _Place]]:
    try:
        with safe_open(file, framework="np"), open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise JaxDeltaError(f"{file}: is not a whole safetensors file ({first_line(error)})") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise JaxDeltaError(
                f"{file}: {name} has dtype {entry['dtype']}; jaxdelta reads {', '.join(DTYPES)} "
                "(for a quantised checkpoint try --loader=torch)"
            )
        offset = 8 + length + entry["data_offsets"][0]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        yield name, _Place(file, name, offset, tuple(entry["shape"]), dtype)


def _causal_name(stored: str) -> str:
    """Checkpoints of the bare model (embedding models) lack the prefix `model.`."""
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"
