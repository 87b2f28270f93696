"""Llama 1 to 3.x (Grattafiori et al. 2024, arXiv 2407.21783), and other models published as Llama."""

from collections.abc import Mapping
from typing import Any

from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.keys import Family, decoder_dict, decoder_fields
from jaxdelta.model.families.values import flag


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """Defaults as in transformers' LlamaConfig; all four projections of attention have biases, or none."""
    fields = decoder_fields(raw, {"max_position_embeddings": 2048})
    bias = flag(raw, "attention_bias")
    return ModelConfig(
        **fields,
        windows=(None,) * fields["num_layers"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(raw, "mlp_bias"),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json."""
    return {**decoder_dict(config), "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=frozenset({"attention_bias", "mlp_bias"}),
        read=read,
        write=write,
    )
}
