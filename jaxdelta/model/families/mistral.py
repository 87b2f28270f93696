"""Mistral (Jiang et al. 2023, arXiv 2310.06825): no biases; all layers have the same window, or none."""

from collections.abc import Mapping
from typing import Any

from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.keys import Family, decoder_dict, decoder_fields
from jaxdelta.model.families.values import positive

_DEFAULTS = {"max_position_embeddings": 131_072, "num_key_value_heads": 8}


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """Defaults as in transformers' MistralConfig; a null window means none, an absent one 4096."""
    fields = decoder_fields(raw, _DEFAULTS)
    unlimited = "sliding_window" in raw and raw["sliding_window"] is None
    window = None if unlimited else positive(raw, "sliding_window", default=4096)
    return ModelConfig(**fields, windows=(window,) * fields["num_layers"])


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json."""
    return {**decoder_dict(config), "sliding_window": config.windows[0]}


FAMILIES = {
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=frozenset({"sliding_window"}),
        read=read,
        write=write,
    )
}
