"""Tensors on disk: what a checkpoint's files hold, listed at once and read one by one."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.source import DTYPES, TensorSource, TensorSpec, aligned, expert_parts
from jaxdelta.errors import JaxDeltaError, first_line
from jaxdelta.utils.read_ahead import read_into


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


def open_safetensors(files: list[Path]) -> TensorSource:
    """Opens the files' headers, which safetensors checks; tensors are then read straight from their places.

    By pread into buffers of our own: mapped pages would count twice in memory, and the library has no way
    to read into a buffer that XLA can use as it lies.
    """
    places: dict[str, _FileSlice] = {}
    for file in files:
        for name, place in _places(file):
            for part, rows, shape in expert_parts(_causal_name(name), place.shape):
                places[part] = place.rows(rows, shape)
    specs = {name: TensorSpec(place.shape, place.dtype) for name, place in places.items()}
    return TensorSource(
        specs,
        lambda name, start=0, stop=None: places[name].read(start, stop),
        lambda name, out: places[name].fill(out, places[name].offset),
    )


@dataclasses.dataclass(frozen=True)
class _FileSlice:
    """Where a tensor lies: its file, its name there, and the offset of its first byte."""

    file: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, first: int, shape: tuple[int, ...]) -> "_FileSlice":
        """The part that begins at row `first`, when all axes but the last are one."""
        row_bytes = self.shape[-1] * self.dtype.itemsize if first else 0
        return dataclasses.replace(self, offset=self.offset + first * row_bytes, shape=shape)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = range(*slice(start, stop).indices(self.shape[0]))
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        buffer = aligned((len(rows), *self.shape[1:]), self.dtype)
        self.fill(buffer, self.offset + rows.start * row_bytes)
        return buffer

    def fill(self, buffer: np.ndarray, first: int) -> None:
        try:
            with open(self.file, "rb", buffering=0) as file:
                read_into(file.fileno(), buffer.reshape(-1).view(np.uint8).data, first)
        except OSError as error:
            raise JaxDeltaError(f"{self.file}: {self.name} cannot be read ({error.strerror})") from error


def _places(file: Path) -> Iterator[tuple[str, _FileSlice]]:
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
        yield name, _FileSlice(file, name, offset, tuple(entry["shape"]), dtype)


def _causal_name(stored: str) -> str:
    """Checkpoints of the bare model (embedding models) lack the prefix `model.`."""
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"
