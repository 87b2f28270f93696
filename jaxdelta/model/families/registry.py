"""The supported families by `model_type`, and the conversion between config.json and ModelConfig.

Nothing outside this package compares a `model_type`: differences between families are fields of ModelConfig.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.inert_keys import is_known, unknown_keys, unsupported, without
from jaxdelta.model.families.keys import Family, check_sizes
from jaxdelta.model.families.values import disagreement, listed, shown

# model_type -> the module of this package whose FAMILIES has it.
MODULES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
}


def find_family(model_type: Any) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
        JaxDeltaError: it is unknown; the message lists the known ones.
    """
    if not isinstance(model_type, str) or model_type not in MODULES:
        raise JaxDeltaError(
            f"model_type is {shown(model_type)}; jaxdelta computes {', '.join(sorted(MODULES))} only"
        )
    return import_module(f"jaxdelta.model.families.{MODULES[model_type]}").FAMILIES[model_type]


def config_from_dict(raw: Mapping[str, Any], ignored: Collection[str] = ()) -> ModelConfig:
    """Reads the contents of a config.json.

    Args:
        raw: the keys and their values.
        ignored: unknown keys that are left out, as a note of the result says.

    Raises:
        JaxDeltaError: unknown family, unknown keys, unsupported or impossible values, or statements that
            disagree.
        UsageError: a key to be ignored is not in the file, or is known.
    """
    family = find_family(raw.get("model_type"))
    raw = without(raw, ignored, family.read_keys)
    if unknown := sorted(key for key in raw if not is_known(key, family.read_keys)):
        names = ",".join(key for key in unknown[:3] if key.isprintable() and len(key) < 60)
        raise unknown_keys("config.json", unknown, f"; if not, --ignore_config_keys={names}")
    config = family.read(raw)
    if problems := [*unsupported(raw, family.read_keys, config), *check_sizes(config)]:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise JaxDeltaError("unsupported configuration: " + "; ".join(problems[:3]) + more)
    if not ignored:
        return config
    keys = "unknown key is" if len(ignored) == 1 else f"{len(ignored)} unknown keys are"
    note = f"config.json: {keys} ignored: {listed(ignored)} (--ignore_config_keys)"
    return dataclasses.replace(config, notes=(*config.notes, note))


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json as transformers 5 writes it; `config_from_dict` reads it back."""
    family = find_family(config.model_type)
    return {"architectures": [family.architecture], **family.write(config)}


def read_config(path: Path, ignored: Collection[str] = ()) -> ModelConfig:
    """Reads a config.json, as `config_from_dict` does; an error names the file and the problem."""
    raw = read_json(path)
    try:
        return config_from_dict(raw, ignored)
    except JaxDeltaError as error:
        raise type(error)(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        JaxDeltaError: it cannot be read, is no JSON object, or states a key twice with different values.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = json.loads(text, object_pairs_hook=_stated_once)
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise JaxDeltaError(f"{path}: is not JSON ({error})") from error
    except RecursionError as error:
        raise JaxDeltaError(f"{path}: is nested too deeply") from error
    except JaxDeltaError as error:
        raise JaxDeltaError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise JaxDeltaError(f"{path}: holds no JSON object")
    return raw


def _stated_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    for key, value in pairs:
        if key in stated and stated[key] != value:
            raise disagreement({key: stated[key], f"a second {key}": value})
        stated[key] = value
    return stated


def write_config(config: ModelConfig, path: Path) -> None:
    """Writes a config.json."""
    path.write_text(json.dumps(config_to_dict(config), indent=2) + "\n", encoding="utf-8")
