"""Qwen3's configuration: Hugging Face's config.json -> ModelConfig, checked key by key.

Every key of the file is either read, known to have no bearing on the forward pass, or an error: a key
that is silently ignored is how a model comes to compute something else than its checkpoint does.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

# Keys that change nothing in a forward pass without cache, dropout or generation.
INERT_KEYS = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout
    bos_token_id chunk_size_feed_forward eos_token_id id2label is_encoder_decoder label2id output_attentions
    output_hidden_states pad_token_id problem_type return_dict tie_last_hidden_states
    transformers_version unsloth_fixed unsloth_version use_cache""".split()  # noqa: SIM905
)
MODEL_KEYS = frozenset(
    """attention_bias dtype head_dim hidden_act hidden_size initializer_range intermediate_size
    layer_types max_position_embeddings max_window_layers model_type num_attention_heads num_hidden_layers
    num_key_value_heads quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window tie_word_embeddings torch_dtype use_sliding_window vocab_size""".split()  # noqa: SIM905
)

# Of these too, those about the router's auxiliary loss change nothing; and there is no `layer_types`.
MOE_KEYS = (MODEL_KEYS - {"layer_types"}) | frozenset(
    """decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
    num_experts_per_tok num_local_experts output_router_logits router_aux_loss_coef""".split()  # noqa: SIM905
)
ROPE_KEYS = frozenset(
    """attention_factor beta_fast beta_slow factor mscale mscale_all_dim original_max_position_embeddings
    partial_rotary_factor rope_theta rope_type truncate type""".split()  # noqa: SIM905
)
FLOAT8_SCHEME = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FLOAT8_KEYS = frozenset({*FLOAT8_SCHEME, "weight_block_size", "modules_to_not_convert", "dequantize"})
ROPE_TYPES = ("default", "linear", "yarn")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: Su et al. 2021; YaRN: Peng et al. 2023 (arXiv 2309.00071)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json."""
        found: dict[str, Any] = {"rope_theta": self.theta, "rope_type": self.kind}
        if self.kind != "default":
            found["factor"] = self.factor
        if self.kind == "yarn":
            found |= {
                "original_max_position_embeddings": self.original_max_positions,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "attention_factor": self.attention_factor,
                "truncate": self.truncate,
            }
        return found


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts (Shazeer et al. 2017): of `count` MLPs each token's router picks `per_token`.

    `layers` are those whose MLP is such a mixture; `renormalise`: the shares of those picked add up to 1.
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalise: bool
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the forward pass of a Qwen3 model depends on, and nothing else but `initializer_range`.

    `windows[i]` is the number of positions layer i attends to (its own included), None for all of them;
    `experts` is None where all layers are dense. `weight_block`: rows and columns of the blocks of float8
    weights that have a scale each; None where weights are stored as they are. `initializer_range`: the
    standard deviation of the weights before training.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    attention_bias: bool = False
    tie_embeddings: bool = False
    max_positions: int = 32_768
    dtype: str = "float32"
    experts: Experts | None = None
    weight_block: tuple[int, int] | None = None
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a config.json.

        Raises:
            JaxDeltaError: another architecture, unknown keys (all named), unsupported or impossible values.
        """
        _check_architecture(raw)
        moe = raw["model_type"] == "qwen3_moe"
        _check_keys("config.json", raw, (MOE_KEYS if moe else MODEL_KEYS) | INERT_KEYS)
        config = cls(
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=_positive(raw, "hidden_size"),
            intermediate_size=_positive(raw, "intermediate_size", 6144 if moe else None),
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=_positive(raw, "num_attention_heads"),
            num_kv_heads=_positive(raw, "num_key_value_heads", 4 if moe else raw.get("num_attention_heads")),
            head_dim=_head_dim(raw),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            windows=_windows(raw),
            attention_bias=_flag(raw, "attention_bias"),
            tie_embeddings=_flag(raw, "tie_word_embeddings"),
            max_positions=_positive(raw, "max_position_embeddings", default=32_768),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            experts=_experts(raw) if moe else None,
            weight_block=_weight_block(raw),
            initializer_range=_number(raw, "initializer_range", 0.02),
        )
        config._check_values(raw)
        return config

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Reads a config.json; a JaxDeltaError names the file and what is wrong with it."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise JaxDeltaError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise JaxDeltaError(f"{path}: is not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise JaxDeltaError(f"{path}: holds no JSON object")
        try:
            return cls.from_dict(raw)
        except JaxDeltaError as error:
            raise JaxDeltaError(f"{path}: {error}") from error

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return "qwen3_moe" if self.experts else "qwen3"

    def to_file(self, path: Path) -> None:
        """Writes a config.json."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json as transformers 5 writes it; `from_dict` reads it back."""
        window = next((w for w in self.windows if w is not None), None)
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_dict(),
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "dtype": self.dtype,
            **self._mlp_dict(),
        }

    def _mlp_dict(self) -> dict[str, Any]:
        """The keys that only one of the architectures has."""
        if self.experts is None:
            return {"layer_types": ["sliding_attention" if w else "full_attention" for w in self.windows]}
        return {
            "num_experts": self.experts.count,
            "num_experts_per_tok": self.experts.per_token,
            "moe_intermediate_size": self.experts.intermediate_size,
            "norm_topk_prob": self.experts.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(self.layers_of(sparse=False)),
        }

    def _check_values(self, raw: Mapping[str, Any]) -> None:
        problems = []
        if raw.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act={raw['hidden_act']!r} (only 'silu')")
        if self.num_heads % self.num_kv_heads:
            problems.append(f"{self.num_heads} heads do not divide into {self.num_kv_heads} key/value heads")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} is odd, which RoPE cannot rotate")
        if self.dtype not in DTYPE_BYTES:
            problems.append(f"dtype={self.dtype!r} (only {', '.join(DTYPE_BYTES)})")
        if self.experts and self.experts.per_token > self.experts.count:
            problems.append(f"{self.experts.per_token} of {self.experts.count} experts a token")
        if problems:
            raise JaxDeltaError("unsupported configuration: " + "; ".join(problems))

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    def layers_of(self, *, sparse: bool) -> tuple[int, ...]:
        """The layers of one kind, in their order."""
        return tuple(i for i in range(self.num_layers) if self.is_sparse(i) == sparse)

    def layer_parameters(self, layer: int = 0) -> int:
        """Number of parameters of one layer, those of all its experts included."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (q_size + kv_size) + 2 * self.head_dim
        biases = (q_size + 2 * kv_size + self.hidden_size) * self.attention_bias
        return attention + biases + self._mlp_parameters(layer) + 2 * self.hidden_size

    def _mlp_parameters(self, layer: int) -> int:
        if self.experts is None or not self.is_sparse(layer):
            return 3 * self.hidden_size * self.intermediate_size
        return self.hidden_size * self.experts.count * (1 + 3 * self.experts.intermediate_size)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        embeddings = (2 - self.tie_embeddings) * self.vocab_size * self.hidden_size
        layers = sum(self.layer_parameters(i) for i in range(self.num_layers))
        return layers + embeddings + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Size of all weights in the configuration's dtype, in bytes."""
        return self.parameters * DTYPE_BYTES[self.dtype]


def _check_architecture(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise JaxDeltaError(
            f"model_type is {model_type!r}; jaxdelta computes {', '.join(sorted(ARCHITECTURES))} only"
        )


def _check_keys(where: str, raw: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        raise JaxDeltaError(
            f"unknown key{'s' * (len(unknown) > 1)} in {where}: {', '.join(unknown)} "
            "(a key that jaxdelta does not know may change what the model computes)"
        )


def _weight_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Float8 in blocks, as Qwen publishes it; which tensors are stored so, the files say themselves."""
    scheme = raw.get("quantization_config")
    if scheme is None:
        return None
    given = {"fmt": "e4m3", **scheme} if isinstance(scheme, Mapping) else {}
    block = given.get("weight_block_size")
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else [0, 0]
    if FLOAT8_SCHEME.items() <= given.items() and all(type(size) is int and size > 0 for size in sizes):
        _check_keys("quantization_config", given, FLOAT8_KEYS)
        return sizes[0], sizes[1]
    raise JaxDeltaError(
        "the checkpoint is quantised (quantization_config), and not in float8 blocks; try --loader=torch"
    )


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _value(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise JaxDeltaError(f"{key} must be a positive integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _value(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise JaxDeltaError(f"{key} must be a positive number, not {value!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = _value(raw, key, default)
    if not isinstance(value, bool):
        raise JaxDeltaError(f"{key} must be true or false, not {value!r}")
    return value


def _value(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key that is null counts as absent."""
    return default if raw.get(key) is None else raw[key]


def _head_dim(raw: Mapping[str, Any]) -> int:
    """Where it is absent, transformers takes 128 for a dense model and hidden_size / heads for experts."""
    default = 128
    if raw["model_type"] == "qwen3_moe":
        default = _positive(raw, "hidden_size") // _positive(raw, "num_attention_heads")
    return _positive(raw, "head_dim", default)


def _experts(raw: Mapping[str, Any]) -> Experts | None:
    """None where no layer has any; defaults are those of transformers' Qwen3MoeConfig."""
    # transformers 5 writes num_local_experts, every published file says num_experts.
    key = "num_experts" if raw.get("num_local_experts") is None else "num_local_experts"
    step, dense = _positive(raw, "decoder_sparse_step", 1), _value(raw, "mlp_only_layers", [])
    if not isinstance(dense, list | tuple) or any(type(i) is not int for i in dense):
        raise JaxDeltaError(f"mlp_only_layers must be a list of integers, not {dense!r}")
    layers = range(step - 1, _positive(raw, "num_hidden_layers"), step)
    sparse = tuple(i for i in layers if i not in dense)
    if raw.get(key) == 0 or not sparse:
        return None
    return Experts(
        count=_positive(raw, key, 128),
        per_token=_positive(raw, "num_experts_per_tok", 8),
        intermediate_size=_positive(raw, "moe_intermediate_size", 768),
        renormalise=_flag(raw, "norm_topk_prob"),
        layers=sparse,
    )


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Accepts `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before)."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise JaxDeltaError(f"rope_parameters must be an object, not {given!r}")
    _check_keys("rope parameters", given, ROPE_KEYS)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise JaxDeltaError(f"rope_type={kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise JaxDeltaError("partial_rotary_factor other than 1 is not supported")
    theta = _number(given, "rope_theta", _number(raw, "rope_theta", Rope.theta))
    if kind == "default":
        return Rope(theta=theta)
    if given.get("factor") is None:
        raise JaxDeltaError(f"rope_type={kind!r} needs a factor")
    factor = _number(given, "factor")
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=factor)
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_positions=_positive(
            given,
            "original_max_position_embeddings",
            default=_positive(raw, "max_position_embeddings", default=32_768),
        ),
        beta_fast=_number(given, "beta_fast", Rope.beta_fast),
        beta_slow=_number(given, "beta_slow", Rope.beta_slow),
        attention_factor=_yarn_attention_factor(given, factor),
        truncate=_flag(given, "truncate", True),
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """The scale of cos and sin: 0.1 m ln(factor) + 1, or a ratio of two such (YaRN, section 3.4)."""

    def mscale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return _number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(_number(given, "mscale")) / mscale(_number(given, "mscale_all_dim"))
    return mscale(1.0)


def _windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One attention window a layer; `layer_types` decides, else `max_window_layers`, as in transformers."""
    num_layers = _positive(raw, "num_hidden_layers")
    on = _flag(raw, "use_sliding_window") and raw.get("sliding_window", 4096) is not None
    window = _positive(raw, "sliding_window", default=4096) if on else None
    if raw["model_type"] == "qwen3_moe":  # transformers lets all of its layers slide, or none
        return (window,) * num_layers
    types = raw.get("layer_types")
    if types is None:
        first = _positive(raw, "max_window_layers", default=28) if raw.get("max_window_layers") != 0 else 0
        return tuple(window if i >= first else None for i in range(num_layers))
    if not isinstance(types, list | tuple):
        raise JaxDeltaError(f"layer_types must be a list, not {types!r}")
    unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise JaxDeltaError(f"layer_types: {', '.join(unknown)} is not supported")
    if len(types) != num_layers:
        raise JaxDeltaError(f"layer_types names {len(types)} layers, num_hidden_layers is {num_layers}")
    if window is None and "sliding_attention" in types:
        raise JaxDeltaError(
            "layer_types names sliding_attention, but use_sliding_window or the window is off"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)
