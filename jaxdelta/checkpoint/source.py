"""Tensors of a checkpoint, listed at once and read one by one, whatever their file format."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
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
    """Tensors by the names of a causal language model; fused experts are listed and read one by one.

    Attributes:
        specs: name -> shape and dtype.
        read: (name) -> the tensor; (name, start, stop) -> some of its rows.
        fill: (name, array) reads a tensor into an array of its shape and dtype, without another buffer; None
            where the format cannot.
        notes: what a user should know of how the files were read, a sentence each.
    """

    specs: Mapping[str, TensorSpec]
    read: Callable[..., np.ndarray]
    fill: Callable[[str, np.ndarray], None] | None = None
    notes: tuple[str, ...] = ()

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
    if not prefix.endswith(".mlp.experts") or not parts or len(shape) != 3 or shape[1] % len(parts):
        yield name, 0, shape
        return
    rows = shape[1] // len(parts)
    for i, (expert, part) in enumerate(itertools.product(range(shape[0]), parts)):
        yield f"{prefix}.{expert}.{part}.weight", i * rows, (rows, shape[2])


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA's CPU client uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
