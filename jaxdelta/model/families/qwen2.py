"""Qwen2 and Qwen2.5, dense (arXiv 2407.10671, 2412.15115): queries, keys and values have biases."""

from collections.abc import Mapping
from typing import Any

from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.keys import (
    LAYER_WINDOW_KEYS,
    Family,
    decoder_dict,
    decoder_fields,
    layer_windows,
    layer_windows_dict,
)

_DEFAULTS = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """Defaults as in transformers' Qwen2Config."""
    return ModelConfig(**decoder_fields(raw, _DEFAULTS), windows=layer_windows(raw), qkv_bias=True)


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json."""
    return {**decoder_dict(config), **layer_windows_dict(config)}


FAMILIES = {
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=LAYER_WINDOW_KEYS,
        read=read,
        write=write,
    )
}
