"""Tensors that do not fit a configuration: one error that names them, and the likely cause."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.float8 import FLOAT8, may_be_float8, scale_name, scale_shape
from jaxdelta.checkpoint.names import EMBEDDING, HEAD
from jaxdelta.checkpoint.source import DTYPES, STORED, Shape, TensorSource, TensorSpec
from jaxdelta.errors import JaxDeltaError, listed, short
from jaxdelta.model.config import ModelConfig

Shapes = Mapping[str, Shape]
MOST = 780  # characters of a message

# A tensor that only one kind of model has, as a pattern of its name.
_ARCHITECTURES = {
    r"(.*\.)?h\.[0-9]+\..+|(.*\.)?wte\.weight": "GPT-2, or another model with its names",
    r"blk\.[0-9]+\..+|token_embd\.weight": "llama.cpp's (GGUF)",
    r".*\.attention\.w[qkvo]\.weight|tok_embeddings\.weight": "the publisher's own, of Llama or Mistral",
    r".*\.(linear_qkv|query_key_value)\.\w+": "Megatron, GPT-NeoX or Falcon",
    r".*\.(kv_a_proj_with_mqa|kv_b_proj|q_a_proj)\.\w+": "DeepSeek's latent attention",
    r".*\.(pre|post)_feedforward_layernorm\.weight": "Gemma, OLMo 2 or another with more norms",
    r".*\.linear_attn\..+|.*\.mixer\..+|.*\.conv1d\.\w+": "a model with linear attention or a state space",
    r".*\.block_sparse_moe\..+": "Mixtral",
    r".*\.(shared_experts?|shared_expert_gate)\..+": "a model with shared experts (Qwen2-MoE, DeepSeek)",
    r".*\.self_attn\.sinks": "gpt-oss",
    r".*\.self_attn\.qkv_proj\.weight|.*\.mlp\.gate_up_proj\.weight": "Phi-3, or fused projections",
    r".*\.self_attn\.dense\.\w+|.*\.mlp\.(fc1|fc2|c_fc)\.\w+": "Phi, or another without gated MLPs",
    r"(.*\.)?(visual|vision_tower|vision_model|audio_tower)\..+": "a model of images or sound, too",
}


def check_dtypes(
    directory: Path, config: ModelConfig, specs: Mapping[str, TensorSpec], wanted: Collection[str]
) -> None:
    """Refuses dtypes that are not read, and float8 without scales, which only the layers' projections have.

    Raises:
        JaxDeltaError: the first such tensor.
    """
    for name, spec in specs.items():
        if name not in wanted:
            continue
        stored = next((stored for stored, dtype in STORED.items() if spec.dtype == dtype), str(spec.dtype))
        if stored not in DTYPES:
            known = ", ".join(DTYPES)
            advice = "cast it to float32" if stored == "F64" else "if it is quantised, give the plain weights"
            raise JaxDeltaError(
                f"{directory}: {short(name)} has dtype {stored}; jaxdelta reads {known} ({advice})"
            )
        if spec.dtype == FLOAT8 and not (config.weight_block and may_be_float8(name)):
            raise JaxDeltaError(
                f"{directory}: {short(name)} has dtype F8_E4M3, which jaxdelta reads only in the projections "
                f"of a checkpoint whose {hub.CONFIG} says how they are quantised"
            )


def check_names(
    directory: Path,
    config: ModelConfig,
    source: TensorSource,
    shapes: Callable[[ModelConfig], Shapes],
) -> None:
    """Refuses missing and unexpected tensors and wrong shapes, all in one error.

    Args:
        directory: the model's, for the message.
        config: the model's configuration.
        source: its tensors; messages name them as on disk.
        shapes: a configuration -> the shapes of its tensors by name.

    Raises:
        JaxDeltaError: their number, the first three of each kind, and the likely cause.
    """
    wanted, specs = dict(shapes(config)), source.specs
    if config.weight_block:
        wanted |= {
            scale_name(name): scale_shape(shape, config.weight_block)
            for name, shape in wanted.items()
            if name in specs and specs[name].dtype == FLOAT8
        }
    missing = wanted.keys() - specs.keys()
    unexpected = specs.keys() - wanted.keys() - ({HEAD} if config.tie_embeddings else set())
    wrong = {name for name, shape in wanted.items() if name in specs and specs[name].shape != shape}
    if not (missing or unexpected or wrong):
        return
    cause = next(_causes(config, specs, wanted, (missing, unexpected, wrong)), "")
    said = (
        f"{what}: {listed([source.on_disk.get(name, name) for name in sorted(names, key=natural)])}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    )
    parts = [*said, *(f"wrong shape: {text}" for text in _wrong(wrong, source, wanted))]
    message = f"{directory}: the weights do not fit {hub.CONFIG}{cause and f' ({cause})'}: {'; '.join(parts)}"
    raise JaxDeltaError(message if len(message) <= MOST else f"{message[:MOST]}…")


def _wrong(wrong: Collection[str], source: TensorSource, wanted: Shapes) -> Iterator[str]:
    if not wrong:
        return
    first = sorted(wrong, key=natural)[:3]
    stored = {name: short(str(source.specs[name].shape)) for name in first}
    each = ", ".join(
        f"{short(source.on_disk.get(name, name))} is {stored[name]}, not {wanted[name]}" for name in first
    )
    yield each if len(wrong) <= 3 else f"{len(wrong)} tensors ({each}, …)"


def _causes(
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    wanted: Shapes,
    problems: tuple[Collection[str], Collection[str], Collection[str]],
) -> Iterator[str]:
    """Likely causes, the likeliest first."""
    missing, unexpected, wrong = problems
    if wrong and all(specs[name].shape == () for name in wrong):
        yield "transformers does not know the names in the file; save the weights as safetensors"
    if wrong and all(0 in specs[name].shape for name in wrong):
        yield "placeholders of DeepSpeed ZeRO-3: run zero_to_fp32.py on the trainer's directory"
    for pattern, kind in _ARCHITECTURES.items():
        if found := next(filter(re.compile(pattern).fullmatch, sorted(unexpected)), None):
            yield f"the names are of another architecture: {kind}, as {short(found)}"
    if {name for name in missing if name.endswith((".q_norm.weight", ".k_norm.weight"))}:
        others = "Qwen2" if any(name.endswith("q_proj.bias") for name in unexpected) else "Llama or Mistral"
        if all(".q_norm." in name or ".k_norm." in name for name in missing):
            yield f"without norms of queries and keys the model is of another family, such as {others}"
    if unexpected and all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in unexpected):
        yield "with norms of queries and keys the model is of another family, such as Qwen3"
    weights = [name for name in wrong if name.endswith(".weight")]
    turned = [name for name in weights if specs[name].shape == wanted[name][::-1]]
    # Of fused experts that are transposed, gate_proj and up_proj have odd shapes.
    if turned and all(".mlp.experts." in name for name in weights):
        yield "the experts' matrices are transposed, (in, out) instead of (out, in)"
    if turned == weights != []:
        yield "the matrices are transposed, (in, out) instead of (out, in)"
    yield from _sizes(config, specs)
    if EMBEDDING in missing and len(missing) >= len(wanted) - 1:
        yield "none of the names is one of a supported model"


def _sizes(config: ModelConfig, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """The keys of config.json whose values the shapes contradict."""
    layers = [int(match[1]) for name in specs if (match := re.match(r"model\.layers\.([0-9]{1,9})\.", name))]
    if layers and max(layers) + 1 != config.num_layers:
        yield (
            f"the files hold layers {min(layers)} to {max(layers)}, num_hidden_layers is {config.num_layers}"
        )
    differ = {key: value for key, (value, given) in _inferred(config, specs).items() if value != given}
    if differ:
        said = ", ".join(f"{key}={int(value)}" for key, value in differ.items())
        yield f"the shapes are those of {said}"


def _inferred(config: ModelConfig, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int | float, int]]:
    """Key of config.json -> its value by the shapes of the embedding and a layer, and by the file."""

    def size(name: str, axis: int = 0) -> int | None:
        shape = next((spec.shape for key, spec in specs.items() if key.endswith(name)), ())
        return shape[axis] if len(shape) > axis else None

    queries, keys = size(".self_attn.q_proj.weight"), size(".self_attn.k_proj.weight")
    head = size(".self_attn.q_norm.weight") or (queries and queries / config.num_heads)
    found: dict[str, tuple[int | float | None, int]] = {
        "vocab_size": (size(EMBEDDING), config.vocab_size),
        "hidden_size": (size(EMBEDDING, 1), config.hidden_size),
        "head_dim": (head, config.head_dim),
        "num_attention_heads": (head and queries and queries / head, config.num_heads),
        "num_key_value_heads": (head and keys and keys / head, config.num_kv_heads),
    }
    if not config.experts:
        found["intermediate_size"] = (size(".mlp.down_proj.weight", 1), config.intermediate_size)
    return {key: (value, given) for key, (value, given) in found.items() if value and value == int(value)}


def natural(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,9})", name))]
