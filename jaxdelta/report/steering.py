"""Files of directions that steering tools read: vectors to be added to the stream that leaves a layer.

What leaves layer L is h_{L+1} = h_L + δ_L, so layer L's direction is `direction.L`: repeng and llama.cpp
count layers from 0 as we do, and add the vector to the block's output, after the MLP's. llama.cpp takes
one-dimensional float32 tensors alone, looks at no metadata, and refuses a file with `direction.0`; repeng
trains layers 1 … N-1, and wants a vector for every layer that it controls.

After `ControlVector.import_gguf` of repeng, and of llama.cpp `common_control_vector_load_one` (common.cpp),
`llama_adapter_cvec::apply` (llama-adapter.cpp) and `build_cvec` in its models.
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
    """By their names in a file, the chosen layers' directions number `rank`, each of its length.

    Args:
        directions: of all layers.
        lengths: of all layers.
        rank: from 1.
        layers: which; None for all but layer 0.
        steered: those whose direction lies in the residual stream.

    Raises:
        UsageError: a rank that was not kept, a layer that is not there, or none at all.
    """
    kept = directions.shape[1]
    if not 1 <= rank <= kept:
        raise UsageError(f"rank must be 1 to {kept}, which is the run's top_k, not {rank}")
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
    """What each layer's direction is multiplied by.

    1 (`unit`); σ_rank/√n (`rms`), the root mean square over the n tokens of what the layer writes along it;
    or the mean ‖δ_i‖ (`norm`).

    Raises:
        UsageError: another scale, or one that a file of an older version knows no figure for.
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
    """What a .gguf or .safetensors file of these directions holds.

    Args:
        path: its name, whose ending chooses the format.
        tensors: the directions by their names.
        model_type: the family of the model, as in `qwen3`: the hint which models the vectors are for.
        name: the model's.
        description: what the vectors are.

    Raises:
        UsageError: another ending, a name that is an Analysis' own, or layer 0 in a .gguf.
        JaxDeltaError: gguf is not installed, or there is no room for its file.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"path: {path} must end in {' or '.join(FORMATS)}")
    facts = {
        f"{ARCHITECTURE}.model_hint": model_type,
        "general.name": name,
        "general.description": description,
    }
    if path.suffix == ".gguf":
        return _gguf(path, tensors, facts)
    if path.with_suffix(".json").exists():
        raise UsageError(f"path: {path} is the name of an analysis' own arrays; choose another")
    counted = {"general.architecture": ARCHITECTURE, f"{ARCHITECTURE}.layer_count": str(len(tensors))}
    return save({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, counted | facts)


def _gguf(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> bytes:
    if "direction.0" in tensors:
        raise UsageError(
            "layers: llama.cpp refuses a file with layer 0; leave it out, or write a .safetensors"
        )
    with extra("steering", "a .gguf file"):
        import gguf
    try:
        with tempfile.TemporaryDirectory() as directory:
            whole = Path(directory) / path.name  # gguf only writes to files
            writer = gguf.GGUFWriter(whole, ARCHITECTURE)
            for key, fact in facts.items():
                writer.add_string(key, fact)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(tensors))
            for key, tensor in tensors.items():
                writer.add_tensor(key, np.ascontiguousarray(tensor))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return whole.read_bytes()
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be written ({first_line(error)})") from error
