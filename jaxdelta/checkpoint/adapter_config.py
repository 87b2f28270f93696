"""adapter_config.json, as PEFT writes it -> ranks, scales and targets of a LoRA adapter."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError, plain_errors
from jaxdelta.model.families.keys import flag, number, positive

# Keys that change nothing once an adapter is trained. PEFT turns fan_in_fan_out off for linear layers, and
# the configurations of initialisations count only with `init_lora_weights`.
_INERT = {
    *("auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights"),
    *("peft_type", "peft_version", "qalora_group_size", "runtime_config", "task_type"),
}
_READ = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias"),
    *("modules_to_save", "r", "rank_pattern", "revision", "target_modules", "target_parameters"),
    "use_rslora",
}
# Initialisations that change the model's own weights, too.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "lora_ga", "loftq")
_MERGE = "merge it with PEFT's merge_and_unload() and give the merged directory as --model"
ALL_LINEAR = "all-linear"
EMBEDDINGS = ("embed_tokens", "lm_head")
_SHOWN = 3  # of many names
_INDEX = r".*?\.[^.]*\.(\d+)\."  # the first number in a module's name, which is its layer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The keys of an adapter_config.json that matter for a trained adapter, under PEFT's names."""

    r: int
    lora_alpha: float
    use_rslora: bool
    ensure_weight_tying: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    target_parameters: tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    base: str | None
    revision: str | None

    def rank(self, name: str) -> int:
        """The rank of a module's adapter."""
        return _first_match(self.rank_pattern, self._named(name), self.r)

    def scale(self, name: str) -> float:
        """s in W + s B A: alpha / r, or alpha / √r with rsLoRA."""
        alpha, rank = _first_match(self.alpha_pattern, self._named(name), self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, name: str) -> bool:
        """Whether PEFT would load a module's adapter: it leaves out modules that the configuration lacks."""
        targets = self.target_modules
        if targets is None or targets == ALL_LINEAR or self._named(name) != name:
            return True
        if _ends_with(name, self.target_parameters):
            return True
        if self.ensure_weight_tying and _ends_with(name, EMBEDDINGS):
            return any(_matches(f"model.{tied}", targets) for tied in EMBEDDINGS)
        if _matches(name, self.exclude_modules) or not _matches(name, targets):
            return False
        everywhere = isinstance(targets, str) or name in targets or not self.layers_to_transform
        return everywhere or self._layer(name) in self.layers_to_transform

    def names(self, name: str) -> bool:
        """Whether a module is a target that the configuration names, not one of all."""
        return self.target_modules not in (None, ALL_LINEAR) and self.is_target(name)

    def is_saved(self, name: str) -> bool:
        """Whether a module was trained and saved as a whole."""
        return name.endswith(self.modules_to_save)

    def _named(self, name: str) -> str:
        """The name that PEFT matches with patterns: a parameter's, where parameters are targets."""
        return f"{name}.weight" if _ends_with(f"{name}.weight", self.target_parameters) else name

    def _layer(self, name: str) -> int | None:
        patterns = [rf"(?:.*?\.)?{pattern}\.(\d+)\." for pattern in self.layers_pattern] or [_INDEX]
        found = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
        return int(found[1]) if found else None


def read_adapter_config(path: Path) -> LoraConfig:
    """Reads an adapter_config.json.

    Raises:
        JaxDeltaError: it is no plain LoRA adapter of PEFT, or has unknown keys or impossible values.
    """
    raw = _json(path)
    try:
        _check_kind(raw)
        return _config(raw)
    except JaxDeltaError as error:
        raise JaxDeltaError(f"{path}: {error}") from error


def base_of(path: Path) -> str | None:
    """The model that an adapter was trained on, by an adapter_config.json that may be of any kind."""
    try:
        base = _json(path).get("base_model_name_or_path")
    except JaxDeltaError:
        return None
    return base if isinstance(base, str) and base else None


def _json(path: Path) -> dict[str, Any]:
    unreadable = {OSError: "{}: cannot be read ({})", (ValueError, RecursionError): "{}: is not JSON ({})"}
    with plain_errors(path, unreadable):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise JaxDeltaError(f"{path}: holds no JSON object")
    return raw


def _check_kind(raw: Mapping[str, Any]) -> None:
    """Refuses everything but plain LoRA, by name."""
    kind = raw.get("peft_type")
    if kind is None:
        mlx = (
            " (MLX writes such files: fuse the adapter with mlx_lm.fuse)" if "lora_parameters" in raw else ""
        )
        raise JaxDeltaError(f"has no peft_type, so it is not an adapter of PEFT{mlx}")
    if kind != "LORA":
        raise JaxDeltaError(f"peft_type is {_short(kind)}; jaxdelta applies LORA only: {_MERGE}")
    if others := [
        key for key in sorted(raw.keys() - _INERT - _READ) if raw[key] not in (None, False, "", [], {})
    ]:
        shown = ", ".join(f"{' '.join(key[:40].split())}={_short(raw[key])}" for key in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise JaxDeltaError(f"{shown}{more}: not plain LoRA, the only kind that jaxdelta applies; {_MERGE}")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_MODEL):
        raise JaxDeltaError(
            f"init_lora_weights={_short(start)} changes the model's own weights, too: save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion; or, if --model is the changed model, set "
            "init_lora_weights to true"
        )


def _config(raw: Mapping[str, Any]) -> LoraConfig:
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        raise JaxDeltaError(f"bias must be none, all or lora_only, not {_short(raw['bias'])}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(raw.get(key), str | None):
            raise JaxDeltaError(f"{key} must be a string, not {_short(raw[key])}")
    flag(raw, "lora_bias")
    config = LoraConfig(
        r=positive(raw, "r", 8),
        lora_alpha=number(raw, "lora_alpha", 8.0),
        use_rslora=flag(raw, "use_rslora"),
        ensure_weight_tying=flag(raw, "ensure_weight_tying"),
        rank_pattern=_pattern(raw, "rank_pattern", positive),
        alpha_pattern=_pattern(raw, "alpha_pattern", number),
        target_modules=None if raw.get("target_modules") is None else _names(raw, "target_modules"),
        target_parameters=_list(raw, "target_parameters"),
        exclude_modules=_names(raw, "exclude_modules"),
        layers_to_transform=_layers(raw),
        layers_pattern=_list(raw, "layers_pattern"),
        modules_to_save=_list(raw, "modules_to_save"),
        base=raw.get("base_model_name_or_path") or None,
        revision=raw.get("revision") or None,
    )
    for key, pattern in _expressions(config):
        wrong = (re.error, OverflowError, RecursionError)
        with plain_errors(
            key, {wrong: "{}: {pattern} is no regular expression ({})"}, pattern=_short(pattern)
        ):
            re.compile(pattern)
    return config


def _expressions(config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Every regular expression of a configuration, with its key."""
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, key)
        if isinstance(value, str):
            yield key, value
        elif key.endswith("pattern"):
            yield from ((key, pattern) for pattern in value)


def _pattern(raw: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    given = {} if raw.get(key) is None else raw[key]
    if not isinstance(given, dict):
        raise JaxDeltaError(f"{key} must be an object, not {_short(given)}")
    labels = {name: f"{key} {_short(name)}" for name in given}  # for messages
    return {name: value({label: given[name]}, label) for name, label in labels.items()}


def _names(raw: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    """A regular expression, or a list of names."""
    given = () if raw.get(key) is None else raw[key]
    if isinstance(given, str) and given:
        return ALL_LINEAR if given.lower() == ALL_LINEAR else given
    return _list(raw, key)


def _list(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = raw.get(key)
    listed = () if given is None or given == "" else [given] if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        raise JaxDeltaError(f"{key} must be a list of names, not {_short(given)}")
    return tuple(listed)


def _layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    given = raw.get("layers_to_transform")
    listed = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(layer) is int for layer in listed):
        raise JaxDeltaError(f"layers_to_transform must be a list of layers, not {_short(given)}")
    return tuple(listed)


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first expression that matches the end of a name, as PEFT's `get_pattern_key`."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    """Whether a module's name matches an expression, or ends with one of several names."""
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else _ends_with(name, wanted)


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return name in endings or any(name.endswith(f".{ending}") for ending in endings)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
