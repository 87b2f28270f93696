"""The supported families by `model_type`, and the conversion between config.json and ModelConfig.

Nothing outside this package compares a `model_type`: differences between families are fields of ModelConfig.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.keys import Family, check_fixed, check_keys, check_sizes

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
            f"model_type is {model_type!r}; jaxdelta computes {', '.join(sorted(MODULES))} only"
        )
    return import_module(f"jaxdelta.model.families.{MODULES[model_type]}").FAMILIES[model_type]


def config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a config.json.

    Raises:
        JaxDeltaError: unknown family, unknown keys (all named), unsupported or impossible values.
    """
    family = find_family(raw.get("model_type"))
    check_keys("config.json", raw, family.known_keys)
    config = family.read(raw)
    if problems := [*check_fixed(raw, family.fixed), *check_sizes(config)]:
        raise JaxDeltaError("unsupported configuration: " + "; ".join(problems))
    return config


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The contents of a config.json as transformers 5 writes it; `config_from_dict` reads it back."""
    family = find_family(config.model_type)
    return {"architectures": [family.architecture], **family.write(config)}


def read_config(path: Path) -> ModelConfig:
    """Reads a config.json; a JaxDeltaError names the file and the problem."""
    raw = read_json(path)
    try:
        return config_from_dict(raw)
    except JaxDeltaError as error:
        raise JaxDeltaError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a JaxDeltaError names the file and the problem."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise JaxDeltaError(f"{path}: is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise JaxDeltaError(f"{path}: holds no JSON object")
    return raw


def write_config(config: ModelConfig, path: Path) -> None:
    """Writes a config.json."""
    path.write_text(json.dumps(config_to_dict(config), indent=2) + "\n", encoding="utf-8")
