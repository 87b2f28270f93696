"""Tensors of a checkpoint, listed at once and read one by one, whatever their file format."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

from jaxdelta.errors import JaxDeltaError, short

DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
# Every other dtype of a safetensors file: listed, and refused where a layer needs the tensor.
STORED = DTYPES | {
    "BOOL": np.bool_,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "F64": np.float64,
    "C64": np.complex64,
    "F4": ml_dtypes.float4_e2m1fn,
    "F6_E2M3": ml_dtypes.float6_e2m3fn,
    "F6_E3M2": ml_dtypes.float6_e3m2fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Shape = tuple[int, ...]
TensorPart = tuple[str, tuple[int, ...]]  # a tensor's name, and its index in a parameter
ALIGNMENT = 64  # of host buffers that XLA's CPU client does not copy


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor on disk."""

    shape: Shape
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Tensors by their names on disk, or by those of a causal language model; fused experts one by one.

    Attributes:
        specs: name -> shape and dtype.
        read: (name) -> the tensor; (name, start, stop) -> some of its rows.
        fill: (name, array) reads a tensor into an array of its shape and dtype, without another buffer; None
            where the format cannot.
        notes: what a user should know of how the files were read, a sentence each.
        on_disk: name -> the tensor's name in its file, where it is another one.
    """

    specs: Mapping[str, TensorSpec]
    read: Callable[..., np.ndarray]
    fill: Callable[[str, np.ndarray], None] | None = None
    notes: tuple[str, ...] = ()
    on_disk: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads a tensor into `out`, which has its shape, and casts it where the dtypes differ."""
        if self.fill and out.dtype == self.specs[name].dtype:
            self.fill(name, out)
        else:
            out[...] = self.read(name)


def expert_parts(name: str, shape: Shape) -> Iterator[tuple[str, int, Shape]]:
    """Splits fused experts, as transformers 5 stores them, into the tensors of each expert.

    `experts.gate_up_proj` (E, 2 F, D) holds gate_proj over up_proj of every expert, `experts.down_proj`
    (E, D, F) the down_proj. Yields the name of each part, its first row (all axes but the last counted as
    one), and its shape; any other tensor is yielded whole.
    """
    prefix, _, last = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
    fused = prefix.endswith(".mlp.experts") and parts and len(shape) == 3 and 0 not in shape
    if not fused or shape[1] % len(parts):
        yield name, 0, shape
        return
    rows = shape[1] // len(parts)
    for i, (expert, part) in enumerate(itertools.product(range(shape[0]), parts)):
        yield f"{prefix}.{expert}.{part}.weight", i * rows, (rows, shape[2])


def held_twice(where: object, first: str, second: str) -> JaxDeltaError:
    """The error of one tensor under two names, or in two files: its values may differ."""
    both = f"{short(first)} and {short(second)}" if first != second else f"{short(first)} in two files"
    return JaxDeltaError(f"{where}: holds one tensor twice: {both}; remove one of them")


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA's CPU client uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
