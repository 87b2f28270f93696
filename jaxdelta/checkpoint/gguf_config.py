"""The configuration that a GGUF file's metadata describes, and its comparison with a config.json.

Every key of the model's architecture is read, has no influence, or is an error. Keys and their defaults are
llama.cpp's (gguf-py/gguf/constants.py, src/llama-model.cpp); values go through the check of config.json.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.source import Shape
from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import ModelConfig, Rope
from jaxdelta.model.families.registry import config_from_dict, config_to_dict, read_config
from jaxdelta.model.rotary import rotary_frequencies

# Architecture -> model types of a config.json; of Llama and Mistral GGUF makes one.
_MODEL_TYPES = {
    "llama": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen3moe": ("qwen3_moe",),
}
# Keys, without the architecture in front, and their names in a config.json.
_REQUIRED = {
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}
_ROPE = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# llama.cpp multiplies the attention factor by them; its converter writes transformers' whole factor there.
_ATTENTION_FACTORS = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
# Without influence on the residual stream: the layout names the origin of Llama 1's order of rows.
_INERT = {"pooling_type", "rope.scaling.finetuned", "tensor_data_layout"}
# Keys that pass with these values only.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.scale_linear": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
# Keys of a config.json that the metadata does not have, or that have no influence.
_UNSTATED = frozenset(
    """architectures dtype initializer_range layer_types max_position_embeddings model_type norm_topk_prob
    rope_parameters sliding_window tie_word_embeddings use_sliding_window""".split()  # noqa: SIM905
)
_LLAMA3 = Rope(kind="llama3", original_max_positions=8192)  # as published, but for theta and factor


def gguf_config(
    file: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    rope_factors: np.ndarray | None,
    ignored: Collection[str] = (),
) -> ModelConfig:
    """The configuration of a GGUF file.

    A config.json in the same directory must agree; it adds what GGUF has no key for.

    Args:
        file: for messages; its directory may have a config.json.
        metadata: the file's keys and values.
        shapes: those of the tensors, by their names in the file.
        rope_factors: `rope_freqs.weight`, by which Llama 3's frequencies are divided.
        ignored: keys of config.json, see `read_config`.

    Raises:
        JaxDeltaError: no model's file; an unknown architecture or key; an unsupported value; a contradiction.
    """
    beside = file.parent / hub.CONFIG
    theirs = read_config(beside, ignored) if beside.exists() else None
    try:
        stated = _Metadata(metadata)
        raw = stated.config_dict(shapes)
        if factor := stated.undecided_attention_factor():
            key, value = factor
            if theirs is None:
                raise JaxDeltaError(
                    f"{key}={value:g} multiplies YaRN's factor in llama.cpp and replaces it in transformers; "
                    f"put the model's {hub.CONFIG} next to the file, which then decides"
                )
            raw["rope_parameters"]["attention_factor"] = theirs.rope.attention_factor
        config = config_from_dict(raw)
        if rope_factors is not None:
            config = dataclasses.replace(config, rope=_scaled_rope(config, rope_factors, theirs))
    except JaxDeltaError as error:
        raise JaxDeltaError(f"{file}: {error}") from error
    if theirs is None:
        return config
    if differences := [*_differences(config, theirs, stated)]:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise JaxDeltaError(
            f"{file} and {hub.CONFIG} contradict each other: {'; '.join(differences[:3])}{more}. Move the "
            "wrong one away"
        )
    return theirs


class _Metadata:
    """Metadata whose keys of the architecture are all known and have supported values."""

    def __init__(self, metadata: Mapping[str, Any]):
        kind = metadata.get("general.type", "model")
        architecture = metadata.get("general.architecture")
        if kind != "model":
            raise JaxDeltaError(f"holds no model (general.type is {kind!r:.60})")
        if architecture not in _MODEL_TYPES:
            raise JaxDeltaError(
                f"general.architecture is {architecture!r:.60}; "
                f"jaxdelta computes {', '.join(_MODEL_TYPES)} only"
            )
        self.architecture = str(architecture)
        prefix = f"{architecture}."
        self.values = {
            key.removeprefix(prefix): _same_everywhere(key, value)
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        self.names = _REQUIRED | _OPTIONAL | (_EXPERTS if self.architecture == "qwen3moe" else {})
        self._check(prefix)

    def _check(self, prefix: str) -> None:
        required = [*_REQUIRED, *_EXPERTS] if self.architecture == "qwen3moe" else [*_REQUIRED]
        if missing := [f"{prefix}{key}" for key in required if key not in self.values]:
            raise JaxDeltaError(f"its metadata has no {', '.join(missing)}")
        heads, hidden = self.values["attention.head_count"], self.values["embedding_length"]
        if type(heads) is int and type(hidden) is int and heads > 0:
            self.values.setdefault("attention.key_length", hidden // heads)
        neutral = {key: values for key, values in _NEUTRAL.items() if key not in self.names}
        for key in ("attention.value_length", "rope.dimension_count"):
            neutral[key] = (self.values.get("attention.key_length"),)
        read = {*self.names, *_ROPE, *_ATTENTION_FACTORS, *_INERT, "expert_weights_norm"}
        wrong = [
            f"{ascii(prefix + key)[1:-1]:.60}={value!r:.40}"
            for key, value in sorted(self.values.items())
            if key not in read and not (key in neutral and value in neutral[key])
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise JaxDeltaError(
                f"unknown or unsupported metadata: {', '.join(wrong[:3])}{more} (a key that jaxdelta does "
                "not know may change what the model computes)"
            )

    def config_dict(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The contents of a config.json; what only tensors tell is taken from their names and shapes."""
        layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
        counts = {"block_count": len(layers)}
        if self.architecture == "qwen3moe":
            counts["expert_count"] = shapes.get("blk.0.ffn_up_exps.weight", (0,))[0]
        for key, count in counts.items():  # Before anything is made for each of them.
            if self.values[key] != count:
                raise JaxDeltaError(f"{key} is {self.values[key]!r:.40}, and there are tensors of {count}")
        raw = {ours: self.values[key] for key, ours in self.names.items() if key in self.values}
        raw |= {
            "model_type": _MODEL_TYPES[self.architecture][0],
            "num_key_value_heads": raw.get("num_key_value_heads", raw["num_attention_heads"]),
            "rope_parameters": self._rope(raw.pop("rope_theta", Rope.theta)),
            "tie_word_embeddings": "output.weight" not in shapes,
            "vocab_size": raw.get("vocab_size", shapes.get("token_embd.weight", (0,))[0]),
        }
        if self.architecture != "qwen2":
            raw["attention_bias"] = "blk.0.attn_q.bias" in shapes
        if self.architecture == "llama":
            raw["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
        if self.architecture == "qwen3moe":  # llama.cpp renormalises without a key
            raw["norm_topk_prob"] = self.values.get("expert_weights_norm", True)
        return raw

    def _rope(self, theta: Any) -> dict[str, Any]:
        """A scaling without a type is linear; type `none` ignores a factor."""
        given = {ours: self.values[key] for key, ours in _ROPE.items() if key in self.values}
        if given.get("factor") == 0:
            del given["factor"]
        kind = given.pop("rope_type", "linear" if "factor" in given else "none")
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": kind, "rope_theta": theta, **given}

    def undecided_attention_factor(self) -> tuple[str, float] | None:
        """A factor other than 1 of the scale of cos and sin, which only YaRN has."""
        for key in _ATTENTION_FACTORS:
            if self.values.get(key, 1) != 1:
                if self.values.get("rope.scaling.type") != "yarn":
                    raise JaxDeltaError(f"{key}={self.values[key]} is supported with YaRN only")
                return key, self.values[key]
        return None


def _same_everywhere(key: str, value: Any) -> Any:
    """The common value of a list with an entry a layer."""
    if not isinstance(value, list):
        return value
    if not value or any(entry != value[0] for entry in value):
        raise JaxDeltaError(
            f"{ascii(key)[1:-1]:.60} differs from layer to layer, which jaxdelta does not support"
        )
    return value[0]


def _scaled_rope(config: ModelConfig, factors: np.ndarray, theirs: ModelConfig | None) -> Rope:
    """The scaling that divides RoPE's frequencies by `factors`: config.json's, Llama 3's, or one fitted."""
    if config.rope.kind != "default" or factors.shape != (config.head_dim // 2,):
        raise JaxDeltaError(f"rope_freqs.weight {factors.shape} does not fit RoPE of kind {config.rope.kind}")
    plain = rotary_frequencies(config.rope, config.head_dim)
    llama3 = dataclasses.replace(_LLAMA3, theta=config.rope.theta, factor=float(factors.max()))
    candidates = [config.rope, llama3, _fitted_rope(llama3, factors, plain)]
    for rope in [theirs.rope, *candidates] if theirs else candidates:
        if rope and np.allclose(
            rotary_frequencies(rope, config.head_dim) * factors, plain, rtol=1e-6, atol=0
        ):
            return rope
    raise JaxDeltaError(
        f"the scaling of RoPE cannot be recovered from rope_freqs.weight; put the model's {hub.CONFIG} next "
        "to the file, if it has none"
    )


def _fitted_rope(llama3: Rope, factors: np.ndarray, frequencies: np.ndarray) -> Rope | None:
    """1 / factor is linear in the frequency between the two ends, which determines the parameters.

    Only their ratios to the trained context are determined, so that is the published one.
    """
    middle = (factors > 1) & (factors < llama3.factor)
    if middle.sum() < 2:
        return None
    unscaled = (1 / factors[middle].astype(float) - 1 / llama3.factor) / (1 - 1 / llama3.factor)
    slope, offset = np.polyfit(frequencies[middle].astype(float), unscaled, 1)
    width = llama3.original_max_positions / (2 * np.pi * slope)
    low = -offset * width
    return dataclasses.replace(llama3, low_freq_factor=float(low), high_freq_factor=float(low + width))


def _differences(ours: ModelConfig, theirs: ModelConfig, stated: _Metadata) -> Iterator[str]:
    """What the metadata and a config.json say differently."""
    mine, other = config_to_dict(ours), config_to_dict(theirs)
    skipped = set(_UNSTATED)
    if "expert_weights_norm" in stated.values:
        skipped.remove("norm_topk_prob")
    if theirs.model_type not in (types := _MODEL_TYPES[stated.architecture]):
        yield f"model_type {' or '.join(types)}, {hub.CONFIG} {theirs.model_type}"
        return
    for key in sorted((mine.keys() & other.keys()) - skipped):
        if not _equal(mine[key], other[key]):
            yield f"{key} {mine[key]}, {hub.CONFIG} {other[key]}"
    if ours.tie_embeddings and not theirs.tie_embeddings:
        yield f"no output.weight, {hub.CONFIG} tie_word_embeddings false"
    if not _same_rotation(ours, theirs):
        mine, other = mine["rope_parameters"], other["rope_parameters"]
        for key in sorted(mine) if ours.rope.kind == theirs.rope.kind else ["rope_type"]:
            if not _equal(mine[key], other[key]):
                yield f"{key} {mine[key]}, {hub.CONFIG} {other[key]}"


def _same_rotation(ours: ModelConfig, theirs: ModelConfig) -> bool:
    if ours.head_dim != theirs.head_dim:
        return True  # already said
    mine, other = (rotary_frequencies(config.rope, config.head_dim) for config in (ours, theirs))
    return np.allclose(mine, other, rtol=1e-6, atol=0) and _equal(
        ours.rope.attention_factor, theirs.rope.attention_factor
    )


def _equal(ours: Any, theirs: Any) -> bool:
    """Equal up to the rounding of float32."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-6 * abs(theirs)
    return bool(ours == theirs)
