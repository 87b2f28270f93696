"""Tensors on disk: what a checkpoint's files hold, listed at once and read one by one."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdelta import hub
from jaxdelta.errors import JaxDeltaError

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors that can be listed at once and read one by one; names as in a causal language model."""

    specs: Mapping[str, Spec]
    read: Callable[[str], np.ndarray]


def safetensors_files(directory: Path) -> list[Path]:
    """The files that hold the weights: model.safetensors, or those its index names."""
    if (directory / hub.WEIGHTS).exists():
        return [directory / hub.WEIGHTS]
    index = directory / hub.INDEX
    if not index.exists():
        return []
    try:
        files = sorted({directory / str(f) for f in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise JaxDeltaError(f"{index}: cannot be read as an index of shards ({error!r})") from error
    if missing := [f.name for f in files if not f.exists()]:
        raise JaxDeltaError(
            f"{index}: names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing"
        )
    return files


def open_safetensors(files: list[Path]) -> Source:
    """Opens the files' headers. Read by pread, not mmap: mapped pages would count twice in memory."""
    specs: dict[str, Spec] = {}
    where: dict[str, tuple[Any, str, Path]] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="np", backend="pread")
        except (SafetensorError, OSError) as error:
            raise JaxDeltaError(f"{file}: is not a whole safetensors file ({_first_line(error)})") from error
        for stored in handle.keys():  # noqa: SIM118 - not a dict
            name = _causal_name(stored)
            view = handle.get_slice(stored)
            if view.get_dtype() not in DTYPES:
                raise JaxDeltaError(
                    f"{file}: {stored} has dtype {view.get_dtype()}; jaxdelta reads {', '.join(DTYPES)} "
                    "(for a quantised checkpoint try --loader=torch)"
                )
            specs[name] = Spec(tuple(view.get_shape()), np.dtype(DTYPES[view.get_dtype()]))
            where[name] = handle, stored, file

    def read(name: str) -> np.ndarray:
        handle, stored, file = where[name]
        try:
            return handle.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise JaxDeltaError(f"{file}: {stored} cannot be read ({_first_line(error)})") from error

    return Source(specs, read)


def _causal_name(stored: str) -> str:
    """Checkpoints of the bare model (embedding models) lack the prefix `model.`."""
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
