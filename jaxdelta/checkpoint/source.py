"""Tensors that are listed at once and read one by one, whatever file format they are stored in."""

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
TensorPart = tuple[str, tuple[int, ...]]  # a tensor's name, and where in a parameter it lies
ALIGNMENT = 64  # of host buffers that XLA's CPU client does not copy


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Tensors that can be listed at once and read one by one; names as in a causal language model.

    `read(name)` reads a tensor, `read(name, start, stop)` those rows of it, and `read_into(name, out)` one
    into an array of its shape, by `fill` in no further room where there is one and the dtypes agree. Experts
    that are stored fused are listed, and read, one by one.
    """

    specs: Mapping[str, TensorSpec]
    read: Callable[..., np.ndarray]
    fill: Callable[[str, np.ndarray], None] | None = None

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads a tensor into `out`, which has its shape, and casts it where the dtypes differ."""
        if self.fill and out.dtype == self.specs[name].dtype:
            self.fill(name, out)
        else:
            out[...] = self.read(name)


def expert_parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Fused experts, as transformers 5 holds them, by the names they are published under.

    `experts.gate_up_proj` (E, 2 F, D) holds gate_proj over up_proj of every expert, `experts.down_proj`
    (E, D, F) their down_proj. Yields each part's name, its first row when all but the last axis are one,
    and its shape; a tensor of another name or form is its own only part.
    """
    prefix, _, last = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
    if not prefix.endswith(".mlp.experts") or not parts or len(shape) != 3 or shape[1] % len(parts):
        yield name, 0, shape
        return
    rows = shape[1] // len(parts)
    for i, (expert, part) in enumerate(itertools.product(range(shape[0]), parts)):
        yield f"{prefix}.{expert}.{part}.weight", i * rows, (rows, shape[2])


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA's CPU client uses as it lies, where others are copied."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
