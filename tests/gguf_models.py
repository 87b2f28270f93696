"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import on_disk

GGUF_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """The keys and values of a config.json's model, without the architecture in front."""
    rope = config["rope_parameters"]
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
    }
    if config["model_type"] == "llama":
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": config["head_dim"]}
    if config["model_type"] == "qwen3_moe":
        found |= {
            "expert_count": config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return found


def stored_tensors(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under GGUF's names: experts stacked, Llama's queries and keys interleaved."""
    import gguf

    architecture = ARCHITECTURES[config["model_type"]]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        value = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            value = interleaved(value, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            value = interleaved(value, config["num_key_value_heads"])
        if ".experts." in name:
            before, after = name.split(".experts.")
            expert, _, rest = after.partition(".")
            stack = found.setdefault(f"{before}.experts.{rest}", {})
            stack[int(expert)] = value
        else:
            found[name] = value
    for name in [name for name in found if ".experts." in name]:
        found[name] = np.stack([found[name][e] for e in range(len(found[name]))])
    renamed = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): value for name, value in found.items()
    }
    rope = config["rope_parameters"]
    if rope["rope_type"] == "llama3":
        renamed["rope_freqs.weight"] = llama3_factors(rope, config["head_dim"])
    return renamed


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What llama.cpp divides frequencies by, in float64."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    stored: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a file with its matrices in a quantised type; returns the values of all tensors.

    Keys get the architecture in front, unless they begin with `!`. `stored`: matrices that are quantised.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), architecture)
    types = {float: "float32", int: "uint32", str: "string", bool: "bool", list: "array"}
    for key, value in metadata.items():
        name = key.removeprefix("!") if key.startswith("!") else f"{architecture}.{key}"
        getattr(writer, f"add_{types[type(value)]}")(name, value)
    values = {}
    for name, value in tensors.items():
        if value.ndim == 1 or kind == "F32":
            writer.add_tensor(name, value)
            values[name] = value
            continue
        dtype = gguf.GGMLQuantizationType[kind]
        data = stored[name] if stored else gguf.quantize(value, dtype)
        writer.add_tensor(name, data, raw_dtype=dtype)
        values[name] = gguf.dequantize(data, dtype)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return values


def to_gguf(directory: Path, out: Path, kind: str = "F32", **metadata: Any) -> dict[str, np.ndarray]:
    """Writes a checkpoint as `out`, with more metadata (`__` for `.`); returns the stored tensors' values."""
    config = json.loads((directory / "config.json").read_text())
    tensors = stored_tensors(on_disk(directory), config)
    more = {key.replace("__", "."): value for key, value in metadata.items()}
    return write_gguf(out, ARCHITECTURES[config["model_type"]], metadata_of(config) | more, tensors, kind)
