"""Control vectors for steering tools, which add `direction.L` to the output of layer L, h_L + δ_L.

repeng and llama.cpp count layers from 0. llama.cpp reads only one-dimensional float32 tensors, ignores
metadata and refuses `direction.0`; repeng needs a vector for every layer that it controls.

Formats: `ControlVector.import_gguf` in repeng; `common_control_vector_load_one` (common.cpp),
`llama_adapter_cvec::apply` (llama-adapter.cpp) and `build_cvec` in llama.cpp.
"""

import contextlib
import operator
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from safetensors.numpy import save

from jaxdelta.errors import JaxDeltaError, UsageError, extra, first_line

ARCHITECTURE = "controlvector"
FORMATS = (".gguf", ".safetensors")
SCALES = ("unit", "rms", "norm")


def vectors(
    directions: Float32[np.ndarray, "N k d"],
    lengths: Float[np.ndarray, " N"],
    *,
    rank: int,
    layers: Any,
    steered: range,
) -> dict[str, Float32[np.ndarray, " d"]]:
    """The scaled directions number `rank` (from 1) of layers, by their names in a file.

    `layers` defaults to all but layer 0; only `steered` layers have a direction in the residual stream.

    Raises:
        UsageError: an unknown layer, or no layer at all.
    """
    chosen = list(dict.fromkeys(steered[1:] if layers is None else _whole_numbers(layers)))
    if unknown := [layer for layer in chosen if layer not in steered]:
        raise UsageError(
            f"layers: {unknown[0]} is none of the {len(steered)}, counted from 0, whose direction lies in "
            "the residual stream (with last_state=normed the last layer's does not)"
        )
    if not chosen:
        raise UsageError("layers: none is left to be written")
    scaled = directions[:, rank - 1] * lengths[:, None].astype(np.float32)
    return {f"direction.{layer}": scaled[layer] for layer in chosen}


def check_rank(rank: Any, top_k: int) -> int:
    """The number of a direction as an int.

    Raises:
        UsageError: it is none of 1 to `top_k`.
    """
    numbers = _whole_numbers(rank, "rank")
    if len(numbers) != 1 or not 1 <= numbers[0] <= top_k:
        raise UsageError(f"rank must be 1 to {top_k}, which is the run's top_k, not {rank}")
    return numbers[0]


def _whole_numbers(given: Any, name: str = "layers") -> list[int]:
    """One whole number, or several, of Python's or NumPy's types."""
    with contextlib.suppress(TypeError):
        values = [given] if hasattr(given, "__index__") and not np.ndim(given) else list(given)
        if not any(isinstance(value, bool | np.bool_) for value in values):
            return [operator.index(value) for value in values]
    raise UsageError(f"{name} must be a whole number, or several, not {given!r:.80}")


def lengths(
    scale: Any, rank: int, rows: Sequence[Mapping[str, Any]], singular_values: Float32[np.ndarray, "N r"]
) -> Float[np.ndarray, " N"]:
    """The length of each layer's vector: 1 (`unit`), σ_rank/√n (`rms`) or the mean ‖δ_i‖ (`norm`).

    Raises:
        UsageError: another scale, or `rms` for a file of an older version without n.
    """
    if scale not in SCALES:
        raise UsageError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")
    if scale == "unit":
        return np.ones(len(rows))
    if scale == "norm":
        return np.array([row["token_norm_mean"] for row in rows])
    if not all("n" in row for row in rows):
        raise UsageError(
            "scale=rms needs the number of tokens, which a run of schema_version 1 does not hold"
        )
    return singular_values[:, rank - 1] / np.sqrt([row["n"] for row in rows])


def steering_file(
    path: Path, tensors: Mapping[str, Float32[np.ndarray, " d"]], model_type: str, name: str, description: str
) -> bytes:
    """The content of a .gguf or .safetensors file, by the ending of `path`.

    `model_type` (`qwen3`), `name` of the model and `description` of the vectors are metadata.

    Raises:
        UsageError: another ending, the name of an analysis' own arrays, or layer 0 in a .gguf file.
        JaxDeltaError: gguf is not installed, or cannot write its temporary file.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"path: {path} must end in {' or '.join(FORMATS)}")
    metadata = {
        f"{ARCHITECTURE}.model_hint": model_type,
        "general.name": name,
        "general.description": description,
    }
    if path.suffix == ".gguf":
        return _gguf(path, tensors, metadata)
    if path.with_suffix(".json").exists():
        raise UsageError(f"path: {path} is the name of an analysis' own arrays; choose another")
    metadata |= {"general.architecture": ARCHITECTURE, f"{ARCHITECTURE}.layer_count": str(len(tensors))}
    return save({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, metadata)


def _gguf(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    if "direction.0" in tensors:
        raise UsageError(
            "layers: llama.cpp refuses a file with layer 0; leave it out, or write a .safetensors"
        )
    with extra("steering", "a .gguf file"):
        import gguf
    try:
        with tempfile.TemporaryDirectory() as directory:
            temporary = Path(directory) / path.name  # gguf only writes to files
            writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
            for key, text in metadata.items():
                writer.add_string(key, text)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(tensors))
            for key, tensor in tensors.items():
                writer.add_tensor(key, np.ascontiguousarray(tensor))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return temporary.read_bytes()
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be written ({first_line(error)})") from error
