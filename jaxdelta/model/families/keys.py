"""Reading and checking the values of a config.json: the part that all families share.

Every key of the file is either read, known to have no influence on the forward pass, or an error: a key that
is silently ignored lets a model compute something else than its checkpoint. Null counts as absent unless a
docstring says otherwise.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import DTYPE_BYTES, ModelConfig, Rope
from jaxdelta.model.families.quantisation import float8_block

# Keys without influence on a forward pass without cache, dropout and generation.
INERT_KEYS = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout
    bos_token_id chunk_size_feed_forward eos_token_id id2label is_encoder_decoder label2id output_attentions
    output_hidden_states pad_token_id problem_type return_dict tie_last_hidden_states
    transformers_version unsloth_fixed unsloth_version use_cache""".split()  # noqa: SIM905
)
# The keys that `decoder_fields` reads.
DECODER_KEYS = frozenset(
    """dtype head_dim hidden_size initializer_range intermediate_size max_position_embeddings model_type
    num_attention_heads num_hidden_layers num_key_value_heads quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype vocab_size""".split()  # noqa: SIM905
)
# The keys that `sliding_window` and `layer_windows` read.
WINDOW_KEYS = frozenset({"max_window_layers", "sliding_window", "use_sliding_window"})
LAYER_WINDOW_KEYS = WINDOW_KEYS | {"layer_types"}
# Keys with a single supported value.
FIXED = {"hidden_act": "silu"}
ROPE_KEYS = frozenset(
    """attention_factor beta_fast beta_slow factor mscale mscale_all_dim original_max_position_embeddings
    partial_rotary_factor rope_theta rope_type truncate type""".split()  # noqa: SIM905
)
LLAMA3_KEYS = frozenset(
    """factor high_freq_factor low_freq_factor original_max_position_embeddings partial_rotary_factor
    rope_theta rope_type type""".split()  # noqa: SIM905
)
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
FLOAT8_SCHEME = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FLOAT8_KEYS = frozenset({*FLOAT8_SCHEME, "weight_block_size", "modules_to_not_convert", "dequantize"})


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is read and written.

    `architecture`: transformers' class. `keys`: the keys that `read` uses besides DECODER_KEYS. `fixed`: keys
    with a single supported value. `read` turns the contents of a file whose keys are all known into a
    ModelConfig, and `write` turns a ModelConfig into the file's keys.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    keys: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: FIXED)

    @property
    def known_keys(self) -> frozenset[str]:
        """All keys that a config.json of the family may have."""
        return DECODER_KEYS | INERT_KEYS | self.keys | frozenset(self.fixed)


def decoder_fields(raw: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, Any]:
    """The fields of ModelConfig that every family has, from the contents of a config.json.

    `defaults` are the family's, by key. Without one, head_dim is hidden_size / heads and there is one
    key/value head per head; a number of key/value heads that is null means the same.
    """
    given = {**defaults, **{key: value for key, value in raw.items() if value is not None}}
    hidden, heads = positive(given, "hidden_size"), positive(given, "num_attention_heads")
    if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
        given["num_key_value_heads"] = heads
    max_positions = positive(given, "max_position_embeddings")
    return {
        "model_type": given["model_type"],
        "vocab_size": positive(given, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": positive(given, "intermediate_size"),
        "num_layers": positive(given, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": positive(given, "num_key_value_heads", heads),
        "head_dim": positive(given, "head_dim", hidden // heads),
        "rms_norm_eps": number(given, "rms_norm_eps", 1e-6),
        "rope": _rope(given, max_positions),
        "tie_embeddings": flag(given, "tie_word_embeddings"),
        "max_positions": max_positions,
        "dtype": str(given.get("dtype") or given.get("torch_dtype") or "float32").removeprefix("torch."),
        "weight_block": _weight_block(given),
        "initializer_range": number(given, "initializer_range", 0.02),
    }


def decoder_dict(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that `decoder_fields` reads, and FIXED."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope_dict(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "dtype": config.dtype,
        **FIXED,
    }


def check_keys(where: str, raw: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises a JaxDeltaError that names every unknown key."""
    unknown = sorted(set(raw) - known)
    if unknown:
        raise JaxDeltaError(
            f"unknown key{'s' * (len(unknown) > 1)} in {where}: {', '.join(unknown)} "
            "(a key that jaxdelta does not know may change what the model computes)"
        )


def check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> Iterator[str]:
    """A message for every key with another value than the supported one."""
    for key, value in fixed.items():
        if raw.get(key) not in (None, value):
            yield f"{key}={raw[key]!r} (only {value!r})"


def check_sizes(config: ModelConfig) -> Iterator[str]:
    """A message for every impossible value."""
    if config.num_heads % config.num_kv_heads:
        yield f"{config.num_heads} heads do not divide into {config.num_kv_heads} key/value heads"
    if config.head_dim % 2:
        yield f"head_dim={config.head_dim} is odd, which RoPE cannot rotate"
    if config.dtype not in DTYPE_BYTES:
        yield f"dtype={config.dtype!r} (only {', '.join(DTYPE_BYTES)})"
    if config.experts and config.experts.per_token > config.experts.count:
        yield f"{config.experts.per_token} of {config.experts.count} experts a token"


def positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer."""
    value = _value(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise JaxDeltaError(f"{key} must be a positive integer, not {value!r}")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive, finite number."""
    value = _value(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise JaxDeltaError(f"{key} must be a positive number, not {value!r}")
    return float(value)


def flag(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false."""
    value = _value(raw, key, default)
    if not isinstance(value, bool):
        raise JaxDeltaError(f"{key} must be true or false, not {value!r}")
    return value


def _value(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if raw.get(key) is None else raw[key]


def sliding_window(raw: Mapping[str, Any]) -> int | None:
    """The window if `use_sliding_window` is on: 4096 if it is absent, None if it is null."""
    if not flag(raw, "use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return None
    return positive(raw, "sliding_window", default=4096)


def layer_windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's attention window, by `layer_types` or else `max_window_layers`, as in transformers."""
    num_layers, window = positive(raw, "num_hidden_layers"), sliding_window(raw)
    types = raw.get("layer_types")
    if types is None:
        first = positive(raw, "max_window_layers", default=28) if raw.get("max_window_layers") != 0 else 0
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


def window_dict(config: ModelConfig) -> dict[str, Any]:
    """The keys that `sliding_window` reads."""
    window = next((window for window in config.windows if window is not None), None)
    return {"use_sliding_window": window is not None, "sliding_window": window}


def layer_windows_dict(config: ModelConfig) -> dict[str, Any]:
    """The keys that `layer_windows` reads."""
    types = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {**window_dict(config), "layer_types": types}


def _weight_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """The blocks of float8 weights as published by Qwen; the files tell which tensors are float8."""
    scheme = raw.get("quantization_config")
    if scheme is None or scheme == {}:
        return None
    given = {"fmt": "e4m3", **scheme} if isinstance(scheme, Mapping) else {}
    block = given.get("weight_block_size")
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else [0, 0]
    if FLOAT8_SCHEME.items() <= given.items() and all(type(size) is int and size > 0 for size in sizes):
        check_keys("quantization_config", given, FLOAT8_KEYS)
        return sizes[0], sizes[1]
    return float8_block(scheme if isinstance(scheme, Mapping) else {})


def _rope(raw: Mapping[str, Any], max_positions: int) -> Rope:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier versions)."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise JaxDeltaError(f"rope_parameters must be an object, not {given!r}")
    kind: Any = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise JaxDeltaError(f"rope_type={kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
    check_keys("rope parameters", given, LLAMA3_KEYS if kind == "llama3" else ROPE_KEYS)
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise JaxDeltaError("partial_rotary_factor other than 1 is not supported")
    theta = number(given, "rope_theta", number(raw, "rope_theta", Rope.theta))
    if kind == "default":
        return Rope(theta=theta)
    for key in ("factor", "low_freq_factor", "high_freq_factor")[: 3 if kind == "llama3" else 1]:
        if given.get(key) is None:
            raise JaxDeltaError(f"rope_type={kind!r} needs a {key}")
    rope = Rope(theta=theta, kind=kind, factor=number(given, "factor"))
    if kind == "linear":
        return rope
    original = positive(given, "original_max_position_embeddings", default=max_positions)
    scaling = _llama3_fields(given) if kind == "llama3" else _yarn_fields(given, rope.factor)
    return dataclasses.replace(rope, original_max_positions=original, **scaling)


def _llama3_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    low, high = number(given, "low_freq_factor"), number(given, "high_freq_factor")
    if low >= high:
        raise JaxDeltaError(f"high_freq_factor={high:g} must be greater than low_freq_factor={low:g}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn_fields(given: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        "beta_fast": number(given, "beta_fast", Rope.beta_fast),
        "beta_slow": number(given, "beta_slow", Rope.beta_slow),
        "attention_factor": _yarn_attention_factor(given, factor),
        "truncate": flag(given, "truncate", True),
    }


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """The scale of cos and sin: 0.1 m ln(factor) + 1, or a ratio of two such terms (YaRN, section 3.4)."""

    def mscale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(number(given, "mscale")) / mscale(number(given, "mscale_all_dim"))
    return mscale(1.0)


def _rope_dict(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` of a config.json."""
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
        }
    return parameters
