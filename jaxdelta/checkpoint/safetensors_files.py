"""Tensors in safetensors files, listed from the headers and read one by one."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.source import (
    STORED,
    Shape,
    TensorSource,
    TensorSpec,
    aligned,
    expert_parts,
    held_twice,
)
from jaxdelta.errors import JaxDeltaError, listed, plain_errors, short
from jaxdelta.utils.files import check_whole
from jaxdelta.utils.read_ahead import read_into


def safetensors_files(directory: Path) -> list[Path]:
    """The files of weights: model.safetensors, or those in its index, all of which must be there.

    As in transformers, model.safetensors counts where there are both.
    """
    weights, index = directory / hub.WEIGHTS, directory / hub.INDEX
    if os.path.lexists(weights):
        files = [weights]
    elif os.path.lexists(index):
        check_whole(index)
        files = shard_files(index)
    else:
        return []
    for file in files:
        check_whole(file)
    return files


def shard_files(index: Path) -> list[Path]:
    """The files that an index of weights names.

    Raises:
        JaxDeltaError: one is missing, or reached through a folder that is a link out of the directory.
    """
    names = hub.shards(index)
    if missing := [name for name in names if not os.path.lexists(index.parent / name)]:
        raise JaxDeltaError(
            f"{index}: names {listed(missing, 'files')}, which {'is' if len(missing) == 1 else 'are'} missing"
        )
    files = [index.parent / name for name in names]
    for file in files:
        # A file may itself be a link, as all are in the hub's cache.
        if not file.parent.resolve().is_relative_to(index.parent.resolve()):
            raise JaxDeltaError(f"{index}: names {short(file.name)}, which is outside its directory")
    return files


def open_safetensors(directory: Path, files: list[Path]) -> TensorSource:
    """Reads the headers of the directory's `files`, which safetensors checks; tensors are read by pread.

    Mapped pages would count twice in memory, and safetensors cannot read into the aligned buffers that XLA
    uses without a copy. Names are those on disk; a tensor belongs to the file that the index gives it to.

    Raises:
        JaxDeltaError: a file is damaged, lacks a tensor of the index, or holds a tensor twice.
    """
    found = [(name, whole) for file in files for name, whole in _file_slices(file)]
    notes: list[str] = []
    if directory / hub.WEIGHTS not in files:
        found = _of_the_index(directory / hub.INDEX, found, notes)
    elif os.path.lexists(directory / hub.INDEX):
        notes.append(f"{hub.WEIGHTS} is read, and not the shards of {hub.INDEX}, as in transformers")
    slices: dict[str, _FileSlice] = {}
    for name, whole in found:
        for part, first, shape in expert_parts(name, whole.shape):
            if part in slices:
                raise held_twice(directory, slices[part].name, name)
            slices[part] = whole.rows(first, shape)
    specs = {name: TensorSpec(part.shape, part.dtype) for name, part in slices.items()}
    return TensorSource(
        specs,
        lambda name, start=0, stop=None: slices[name].read(start, stop),
        lambda name, out: slices[name].fill(out, slices[name].offset),
        tuple(notes),
    )


def _of_the_index(
    index: Path, found: list[tuple[str, "_FileSlice"]], notes: list[str]
) -> list[tuple[str, "_FileSlice"]]:
    """The tensors that are in the file that the index gives them to."""
    owners = hub.weight_map(index)
    kept = [(name, part) for name, part in found if owners.get(name) == _below(index.parent, part.file)]
    if absent := owners.keys() - dict(kept).keys():
        first = min(absent)
        raise JaxDeltaError(
            f"{index}: {listed(sorted(absent))} is not in the file it names ({short(owners[first])}); "
            "fetch the index and its shards again"
        )
    for what, names in {
        "another copy is in a shard, and the one in the file that the index names counts": {
            name for name, part in found if name in owners and _below(index.parent, part.file) != owners[name]
        },
        "in a shard but not in its index, and left out": dict(found).keys() - owners.keys(),
    }.items():
        if names:
            notes.append(f"{listed(sorted(names))}: {what}")
    return kept


def _below(directory: Path, file: Path) -> str:
    return file.relative_to(directory).as_posix()


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
        offset = 8 + length + entry["data_offsets"][0]
        yield name, _FileSlice(file, name, offset, tuple(entry["shape"]), np.dtype(STORED[entry["dtype"]]))


def open_file(file: Path) -> TensorSource:
    """The tensors of one file, under the names that they have there."""
    slices = dict(_file_slices(file))
    specs = {name: TensorSpec(part.shape, part.dtype) for name, part in slices.items()}
    return TensorSource(specs, lambda name, start=0, stop=None: slices[name].read(start, stop))
