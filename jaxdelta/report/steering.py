"""Control vectors for steering tools, which add `direction.L` to the output of layer L, h_L + δ_L.

repeng and llama.cpp count layers from 0. llama.cpp reads only one-dimensional float32 tensors, ignores
metadata and refuses `direction.0`; repeng needs a vector for every layer that it controls.

Formats: `ControlVector.import_gguf` in repeng; `common_control_vector_load_one` (common.cpp),
`llama_adapter_cvec::apply` (llama-adapter.cpp) and `build_cvec` in llama.cpp.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
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
    layers: Iterable[int] | None,
    steered: range,
) -> dict[str, Float32[np.ndarray, " d"]]:
    """The scaled directions number `rank` (from 1) of layers, by their names in a file.

    `layers` defaults to all but layer 0; only `steered` layers have a direction in the residual stream.

    Raises:
        UsageError: an unknown rank or layer, or no layer at all.
    """
    top_k = directions.shape[1]
    if not 1 <= rank <= top_k:
        raise UsageError(f"rank must be 1 to {top_k}, which is the run's top_k, not {rank}")
    chosen = list(dict.fromkeys(steered[1:] if layers is None else layers))
    if unknown := [layer for layer in chosen if layer not in steered]:
        raise UsageError(
            f"layers: {unknown[0]} is none of the {len(steered)}, counted from 0, whose direction lies in "
            "the residual stream (with last_state=normed the last layer's does not)"
        )
    if not chosen:
        raise UsageError("layers: none is left to be written")
    scaled = directions[:, rank - 1] * lengths[:, None].astype(np.float32)
    return {f"direction.{layer}": scaled[layer] for layer in chosen}


def lengths(
    scale: str, rank: int, rows: Sequence[Mapping[str, Any]], singular_values: Float32[np.ndarray, "N r"]
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
