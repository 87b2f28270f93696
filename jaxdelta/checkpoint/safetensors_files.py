"""Tensors in safetensors files, listed from the headers and read one by one."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.source import DTYPES, Shape, TensorSource, TensorSpec, aligned, expert_parts
from jaxdelta.errors import JaxDeltaError, plain_errors
from jaxdelta.utils.read_ahead import read_into


def safetensors_files(directory: Path) -> list[Path]:
    """The files of weights: model.safetensors, or those in its index, all of which must be there."""
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
    """Reads the files' headers, which safetensors checks; tensors are then read by pread.

    Mapped pages would count twice in memory, and safetensors cannot read into the aligned buffers that XLA
    uses without a copy.
    """
    slices: dict[str, _FileSlice] = {}
    for file in files:
        for name, whole in _file_slices(file):
            for part, first, shape in expert_parts(_causal_name(name), whole.shape):
                slices[part] = whole.rows(first, shape)
    specs = {name: TensorSpec(part.shape, part.dtype) for name, part in slices.items()}
    return TensorSource(
        specs,
        lambda name, start=0, stop=None: slices[name].read(start, stop),
        lambda name, out: slices[name].fill(out, slices[name].offset),
    )


@dataclasses.dataclass(frozen=True)
class _FileSlice:
    """A tensor's file, its name there, and the offset of its first byte."""

    file: Path
    name: str
    offset: int
    shape: Shape
    dtype: np.dtype

    def rows(self, first: int, shape: Shape) -> "_FileSlice":
        """The part that begins at row `first`, all axes but the last counted as one."""
        row_bytes = self.shape[-1] * self.dtype.itemsize if first else 0
        return dataclasses.replace(self, offset=self.offset + first * row_bytes, shape=shape)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = range(*slice(start, stop).indices(self.shape[0]))
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        buffer = aligned((len(rows), *self.shape[1:]), self.dtype)
        self.fill(buffer, self.offset + rows.start * row_bytes)
        return buffer

    def fill(self, buffer: np.ndarray, offset: int) -> None:
        with (
            plain_errors(self.file, {OSError: "{}: {name} cannot be read ({})"}, name=self.name),
            open(self.file, "rb", buffering=0) as file,
        ):
            read_into(file.fileno(), buffer.reshape(-1).view(np.uint8).data, offset)


def _file_slices(file: Path) -> Iterator[tuple[str, _FileSlice]]:
    damaged = {(SafetensorError, OSError): "{}: is not a whole safetensors file ({})"}
    with plain_errors(file, damaged), safe_open(file, framework="np"), open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
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


def open_file(file: Path) -> TensorSource:
    """The tensors of one file, under the names that they have there."""
    slices = dict(_file_slices(file))
    specs = {name: TensorSpec(part.shape, part.dtype) for name, part in slices.items()}
    return TensorSource(specs, lambda name, start=0, stop=None: slices[name].read(start, stop))
