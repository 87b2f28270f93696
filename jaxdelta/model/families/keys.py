"""Reading and checking the values of a config.json: the part that all families share.

Every key of the file is either read, known to have no influence on the forward pass, or an error: a key that
is silently ignored lets a model compute something else than its checkpoint. Null counts as absent unless a
docstring says otherwise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import DTYPE_BYTES, ModelConfig
from jaxdelta.model.families.quantisation import weight_block
from jaxdelta.model.families.rope_keys import ROPE_KEYS, read_rope, rope_dict
from jaxdelta.model.families.values import agreed, count, flag, listed, number, positive, shown

MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000  # of a model; more are a mistake, and fill the memory
# The keys that `decoder_fields` reads.
DECODER_KEYS = ROPE_KEYS | frozenset(
    """dtype head_dim hidden_size initializer_range intermediate_size max_position_embeddings model_type
    num_attention_heads num_hidden_layers num_key_value_heads quantization_config rms_norm_eps
    tie_word_embeddings torch_dtype vocab_size""".split()  # noqa: SIM905
)
# The keys that `sliding_window` and `layer_windows` read.
WINDOW_KEYS = frozenset({"max_window_layers", "sliding_window", "use_sliding_window"})
LAYER_WINDOW_KEYS = WINDOW_KEYS | {"layer_types"}
# PyTorch's other names of dtypes.
_SAME_DTYPE = {"float": "float32", "double": "float64", "half": "float16"}


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is read and written.

    `architecture`: transformers' class. `keys`: the keys that `read` uses besides DECODER_KEYS. `read` turns
    the contents of a file whose keys are all known into a ModelConfig, and `write` turns a ModelConfig into
    the file's keys.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    keys: frozenset[str] = frozenset()

    @property
    def read_keys(self) -> frozenset[str]:
        """All keys that `read` uses."""
        return DECODER_KEYS | self.keys


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
    rope, notes = read_rope(raw, max_positions)
    if (layers := positive(given, "num_hidden_layers")) > MOST_LAYERS:
        raise JaxDeltaError(f"num_hidden_layers must be at most {MOST_LAYERS}, not {layers}")
    return {
        "model_type": given["model_type"],
        "vocab_size": positive(given, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": positive(given, "intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": positive(given, "num_key_value_heads", heads),
        "head_dim": positive(given, "head_dim", hidden // heads),
        "rms_norm_eps": number(given, "rms_norm_eps", 1e-6),
        "rope": rope,
        "tie_embeddings": flag(given, "tie_word_embeddings"),
        "max_positions": max_positions,
        "dtype": _dtype(raw),
        "weight_block": weight_block(raw),
        "initializer_range": number(given, "initializer_range", 0.02),
        "notes": notes,
    }


def _dtype(raw: Mapping[str, Any]) -> str:
    """The dtype that a file states; float32 for `auto` and float64, since the weights' own counts."""

    def plain(value: Any) -> Any:
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        return _SAME_DTYPE.get(name, name) if isinstance(name, str) else name

    given = {key: None if raw.get(key) == "auto" else raw.get(key) for key in ("dtype", "torch_dtype")}
    name = plain(agreed(given, plain))
    if name is None or name == "float64":
        return "float32"
    return name if isinstance(name, str) else shown(name)


def decoder_dict(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that `decoder_fields` reads, and the activation."""
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
        "rope_parameters": rope_dict(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "dtype": config.dtype,
        "hidden_act": "silu",
    }


def check_sizes(config: ModelConfig) -> Iterator[str]:
    """A message for every impossible value."""
    if config.num_heads % config.num_kv_heads:
        yield f"{config.num_heads} heads do not divide into {config.num_kv_heads} key/value heads"
    if config.head_dim % 2:
        yield f"head_dim={config.head_dim} is odd, which RoPE cannot rotate"
    if config.dtype not in DTYPE_BYTES:
        yield f"dtype={shown(config.dtype)} (only {', '.join(DTYPE_BYTES)})"
    if config.experts and config.experts.per_token > config.experts.count:
        yield f"{config.experts.per_token} of {config.experts.count} experts a token"
    if config.experts and config.experts.count * len(config.experts.layers) > MOST_EXPERTS:
        yield f"{config.experts.count} experts in each of {len(config.experts.layers)} layers"


def sliding_window(raw: Mapping[str, Any]) -> int | None:
    """The window if `use_sliding_window` is on: 4096 if it is absent, None if it is null."""
    if not flag(raw, "use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return None
    return positive(raw, "sliding_window", default=4096)


def layer_windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's attention window, by `layer_types` or else `max_window_layers`, as in transformers."""
    num_layers, window = positive(raw, "num_hidden_layers"), sliding_window(raw)
    types, first = raw.get("layer_types"), count(raw, "max_window_layers", default=28)
    if types is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    if not isinstance(types, list | tuple):
        raise JaxDeltaError(f"layer_types must be a list, not {shown(types)}")
    unknown = {shown(kind) for kind in types if kind not in ("full_attention", "sliding_attention")}
    if unknown:
        raise JaxDeltaError(f"layer_types: {listed(sorted(unknown))} is not supported")
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
