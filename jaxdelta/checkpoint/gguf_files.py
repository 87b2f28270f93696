"""Tensors in GGUF files, dequantised as they are read; PyTorch is not needed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package dequantises; its reader
takes ten seconds and half a gigabyte for a vocabulary of 150,000 tokens, so headers are read here.
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.gguf_config import gguf_config
from jaxdelta.checkpoint.source import Shape, TensorSource, TensorSpec
from jaxdelta.errors import JaxDeltaError, extra, plain_errors
from jaxdelta.model.config import ModelConfig
from jaxdelta.utils.files import check_whole
from jaxdelta.utils.read_ahead import read_into

ROPE_FACTORS = "rope_freqs.weight"
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")},
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def is_gguf(directory: Path) -> bool:
    """Whether a directory without safetensors has GGUF files and no other weights for PyTorch."""
    return any(directory.glob("*.gguf")) and not any(
        (directory / name).exists() for name in hub.TORCH_WEIGHTS
    )


def open_gguf(directory: Path, ignored: Collection[str] = ()) -> tuple[ModelConfig, TensorSource]:
    """Opens the GGUF file of a directory, or the shards of one.

    Tensors in F32, F16 and BF16 keep their dtype; all others become float32. `ignored`: keys of config.json,
    see `read_config`.

    Returns:
        The configuration and the tensors, with a note that names the quantised types.

    Raises:
        JaxDeltaError: `gguf` is not installed; several models; a damaged file; a tensor that cannot be
            dequantised; metadata that is unknown, unsupported, or contradicts config.json.
    """
    with extra("gguf", "a GGUF checkpoint"):
        import gguf  # noqa: F401
    files = _files(directory)
    metadata, tensors = _merge(files)
    factors = tensors.pop(ROPE_FACTORS, None)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    frequencies = None if factors is None else factors.read()
    config = gguf_config(files[0], metadata, shapes, frequencies, ignored)
    heads = {}
    if metadata["general.architecture"] == "llama":
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    parts: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        for part, view in _parts(name, tensor, heads):
            if part in parts:
                raise JaxDeltaError(f"{tensor.file}: {name} and {parts[part].name} are one tensor")
            parts[part] = view
    specs = {name: TensorSpec(part.shape, part.dtype) for name, part in parts.items()}
    config = dataclasses.replace(config, weight_block=None)  # what config.json says of other files
    quantised = sorted({tensor.type for tensor in tensors.values()} - _PLAIN.keys())
    note = f"{files[0].name}: {', '.join(quantised)} dequantised to float32"

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return parts[name].read(start, stop)

    return config, TensorSource(specs, read, notes=(note,) if quantised else ())


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A stored tensor, or a part of one: some rows in another order.

    `order`: for each row, its position in the file, counted from `offset`.
    """

    file: Path
    name: str
    type: str  # GGML's name, such as Q4_K
    shape: Shape
    offset: int
    order: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(_PLAIN.get(self.type, np.float32))

    @property
    def row_bytes(self) -> int:
        import gguf

        per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return self.shape[-1] // per_block * size

    def expert(self, index: int) -> "_Tensor":
        """The tensor at `index` of the first axis."""
        size = math.prod(self.shape[1:-1]) * self.row_bytes
        return dataclasses.replace(self, shape=self.shape[1:], offset=self.offset + index * size)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`, the elements of a vector."""
        if len(self.shape) == 1:
            whole = self._rows(0, 1)[0]
            return (whole if self.order is None else whole[self.order])[start:stop]
        rows = np.arange(self.shape[0])[start:stop] if self.order is None else self.order[start:stop]
        if not rows.size:
            return np.empty((0, *self.shape[1:]), self.dtype)
        first = int(rows.min())
        stored = self._rows(first, int(rows.max()) + 1)
        return stored if self.order is None else stored[rows - first]

    def _rows(self, first: int, stop: int) -> np.ndarray:
        """Rows of the file, all axes but the last counted as one."""
        import gguf

        raw = np.empty((stop - first, self.row_bytes), np.uint8)
        with (
            plain_errors(self.file, {OSError: "{}: {name} cannot be read ({})"}, name=self.name),
            open(self.file, "rb", buffering=0) as file,
        ):
            read_into(file.fileno(), raw.reshape(-1).data, self.offset + first * self.row_bytes)
        if self.type in _PLAIN:
            return raw.view(self.dtype)
        with np.errstate(all="ignore"):  # Scales may be infinite; whoever computes with them finds out.
            return gguf.dequantize(raw, gguf.GGMLQuantizationType[self.type])


def _parts(name: str, tensor: _Tensor, heads: Mapping[str, int]) -> Iterator[tuple[str, _Tensor]]:
    """A stored tensor under its name in a causal language model, experts one by one.

    `heads`: module -> number of heads, whose rows llama.cpp stores with the two halves of a head interleaved.
    """
    match = _NAME.fullmatch(name)
    if not match or match[2] not in _MODULES:
        yield name, tensor  # an error: the model has no such tensor
        return
    layer, module, kind = match.groups()
    if module in heads and tensor.shape[0] % (2 * heads[module]) == 0:
        order = np.arange(tensor.shape[0]).reshape(heads[module], -1, 2).swapaxes(1, 2).reshape(-1)
        tensor = dataclasses.replace(tensor, order=order)
    whole = f"model.layers.{layer}.{_MODULES[module]}.{kind}" if layer else f"{_MODULES[module]}.{kind}"
    if "*" not in whole:
        yield whole, tensor
        return
    for expert in range(tensor.shape[0]):
        yield whole.replace("*", str(expert)), tensor.expert(expert)


def _files(directory: Path) -> list[Path]:
    """The one GGUF file, or all shards of the one model."""
    files = sorted(directory.glob("*.gguf"))
    for file in files:
        check_whole(file)
    if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
        return files
    names = [path.name for path in files]
    models = {match[1] if (match := _SHARD.fullmatch(name)) else name for name in names}
    if len(models) > 1:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise JaxDeltaError(
            f"{directory}: has several GGUF files ({', '.join(names[:3])}{more}); leave one of them, or link "
            "it into a directory of its own"
        )
    model, count = models.pop(), names[0][-10:-5]
    missing = {f"{model}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)} - {*names}
    if missing:
        raise JaxDeltaError(
            f"{directory}: {min(missing)} is missing, {len(names)} of {count} shards are there"
        )
    return files


def _merge(files: list[Path]) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The first file's metadata, and the tensors of all."""
    metadata, tensors = _read_header(files[0])
    for file in files[1:]:
        _, more = _read_header(file)
        if twice := tensors.keys() & more.keys():
            name = min(twice)
            raise JaxDeltaError(f"{file}: {name} is in {tensors[name].file.name}, too")
        tensors |= more
    return metadata, tensors


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """A file's metadata and tensors, all of which lie within the file."""
    damaged = (struct.error, ValueError, OverflowError, OSError)
    with (
        plain_errors(path, {damaged: "{}: is not a whole GGUF file ({:.200})"}),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        cursor = _Cursor(content)
        cursor.check_version(path)
        count, entries = cursor.take("Q"), cursor.take("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = cursor.string()
            if name in metadata:
                raise ValueError(f"{name} is there twice")
            metadata[name] = cursor.value(cursor.take("I"))
        listed = [cursor.tensor(path) for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        return metadata, _placed(listed, start, len(content))


def _placed(listed: list[_Tensor], start: int, size: int) -> dict[str, _Tensor]:
    """Tensors by name, their offsets counted from the file's first byte."""
    tensors = {}
    for tensor in listed:
        placed = dataclasses.replace(tensor, offset=start + tensor.offset)
        end = placed.offset + math.prod(placed.shape[:-1]) * placed.row_bytes
        if end > size:
            raise ValueError(f"{placed.name} ends at byte {end} of {size}")
        if placed.name in tensors:
            raise ValueError(f"{placed.name} is there twice")
        tensors[placed.name] = placed
    return tensors


class _Cursor:
    """Reads a header from front to back; a struct.error at the file's end."""

    def __init__(self, content: Any):
        self.content = content
        self.position = 0

    def take(self, code: str) -> Any:
        """One number."""
        (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.take("Q")
        text = self.content[self.position : self.position + length]
        if len(text) < length:
            raise ValueError("it ends within a string")
        self.position += length
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of metadata; a float32 as the shortest decimal that rounds to it."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.take("I"), self.take("Q")
            if kind == _ARRAY:
                raise ValueError("it has an array of arrays")
            return [self.value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"it has metadata of the unknown type {kind}")
        value = self.take(_SCALARS[kind])
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def tensor(self, path: Path) -> _Tensor:
        """A tensor's entry, its offset counted from the first tensor's."""
        import gguf

        name, axes = self.string(), self.take("I")
        shape = tuple(self.take("Q") for _ in range(axes))[::-1]
        kind, offset = self.take("I"), self.take("Q")
        try:
            kind = gguf.GGMLQuantizationType(kind)
            per_block, size = gguf.GGML_QUANT_SIZES[kind]
            if kind.name not in _PLAIN:
                gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            label = kind.name if isinstance(kind, gguf.GGMLQuantizationType) else f"number {kind}"
            raise JaxDeltaError(
                f"{path}: {ascii(name)[1:-1]:.60} has type {label}, which the installed gguf cannot "
                "dequantise; try pip install --upgrade gguf, or another quantisation of the model"
            ) from error
        if not shape or 0 in shape or shape[-1] % per_block:
            raise ValueError(f"{name} has the impossible shape {shape}")
        return _Tensor(path, name, kind.name, shape, offset)

    def check_version(self, path: Path) -> None:
        """Refuses all but little-endian GGUF of versions 2 and 3."""
        magic, version = self.content[:4], int.from_bytes(self.content[4:8], "little")
        self.position = 8
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, not with b'GGUF'")
        if version and version % 65536 == 0:
            raise JaxDeltaError(f"{path}: is a big-endian GGUF file; gguf-convert-endian converts it")
        if version not in (2, 3):
            raise JaxDeltaError(f"{path}: is GGUF version {version}; jaxdelta reads 2 and 3")
