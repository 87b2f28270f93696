"""Qwen3, dense and with experts (Qwen Team 2025, arXiv 2505.09388): RMS-normalised queries and keys."""

from collections.abc import Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import Experts, ModelConfig
from jaxdelta.model.families.keys import (
    LAYER_WINDOW_KEYS,
    WINDOW_KEYS,
    Family,
    decoder_dict,
    decoder_fields,
    layer_windows,
    layer_windows_dict,
    sliding_window,
    window_dict,
)
from jaxdelta.model.families.values import agreed, count, flag, positive, shown

_EXPERT_KEYS = frozenset(
    """decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
    num_experts_per_tok num_local_experts""".split()  # noqa: SIM905
)
_DEFAULTS = {"max_position_embeddings": 32_768}
_DENSE_DEFAULTS = _DEFAULTS | {"head_dim": 128}
_EXPERT_DEFAULTS = _DEFAULTS | {"num_key_value_heads": 4, "intermediate_size": 6144}


def read_dense(raw: Mapping[str, Any]) -> ModelConfig:
    """A config.json of `model_type` qwen3; defaults as in transformers' Qwen3Config."""
    fields = decoder_fields(raw, _DENSE_DEFAULTS) | _attention_fields(raw)
    return ModelConfig(**fields, windows=layer_windows(raw))


def read_experts(raw: Mapping[str, Any]) -> ModelConfig:
    """A config.json of qwen3_moe; without experts in any layer it is read as a dense model."""
    fields = decoder_fields(raw, _EXPERT_DEFAULTS) | _attention_fields(raw)
    experts = _experts(raw)
    if experts is None:
        fields["model_type"] = "qwen3"
    # In transformers all layers have the window, or none.
    windows = (sliding_window(raw),) * fields["num_layers"]
    return ModelConfig(**fields, windows=windows, experts=experts)


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json, with experts or without."""
    shared = {**decoder_dict(config), "attention_bias": config.qkv_bias}
    if config.experts is None:
        return {**shared, **layer_windows_dict(config)}
    return {
        **shared,
        **window_dict(config),
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.intermediate_size,
        "norm_topk_prob": config.experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.layers_of(sparse=False)),
    }


def _attention_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = flag(raw, "attention_bias")
    return {"qk_norm": "per_head", "qkv_bias": bias, "o_bias": bias}


def _experts(raw: Mapping[str, Any]) -> Experts | None:
    """None if no layer has experts; defaults as in transformers' Qwen3MoeConfig."""
    # transformers 5 writes num_local_experts, published files have num_experts.
    names = ("num_experts", "num_local_experts")
    name = next((key for key in names if raw.get(key) is not None), names[0])
    agreed({key: raw.get(key) for key in names})
    step, dense = positive(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list | tuple) or any(type(i) is not int for i in dense):
        raise JaxDeltaError(f"mlp_only_layers must be a list of integers, not {shown(dense)}")
    layers = range(step - 1, positive(raw, "num_hidden_layers"), step)
    sparse = tuple(i for i in layers if i not in dense)
    if count(raw, name, 128) == 0 or not sparse:
        return None
    return Experts(
        count=positive(raw, name, 128),
        per_token=positive(raw, "num_experts_per_tok", 8),
        intermediate_size=positive(raw, "moe_intermediate_size", 768),
        renormalise=flag(raw, "norm_topk_prob"),
        layers=sparse,
    )


FAMILIES = {
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=LAYER_WINDOW_KEYS | {"attention_bias"},
        read=read_dense,
        write=write,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        keys=WINDOW_KEYS | _EXPERT_KEYS | {"attention_bias"},
        read=read_experts,
        write=write,
    ),
}
