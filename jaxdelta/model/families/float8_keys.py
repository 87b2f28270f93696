"""The `quantization_config` of a config.json: weights in float8 blocks, as published by Qwen."""

from collections.abc import Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.families.inert_keys import unknown_keys
from jaxdelta.model.families.values import LARGEST, agreed, flag, shown

# Keys with few values -> those that are read, besides null; without the first, quant_method, none is.
_SCHEME: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    # Power-of-two scales are stored as any others; they matter to engines that round activations, too.
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
    "kv_cache_scheme": (),
    "modules_to_convert": ([],),
}
# The files tell which tensors are float8.
_PLAIN_MODULES = ("modules_to_not_convert", "ignored_layers")
_KEYS = {*_SCHEME, *_PLAIN_MODULES, "weight_block_size", "dequantize"}


def weight_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of the blocks, or None without quantisation.

    Raises:
        JaxDeltaError: another quantisation, an unknown key, or a value of the wrong type.
    """
    scheme = raw.get("quantization_config")
    if scheme is None or scheme == {}:
        return None
    given = scheme if isinstance(scheme, Mapping) else {}
    others = [
        key
        for key, values in _SCHEME.items()
        if given.get(key) not in (None, *values) or (key == "quant_method" and given.get(key) is None)
    ]
    block = given.get("weight_block_size")
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else [0, 0]
    if others or not all(type(size) is int and 0 < size <= LARGEST for size in sizes):
        raise JaxDeltaError(
            f"the checkpoint is quantised (quantization_config={shown(scheme)}), and not in float8 blocks; "
            "try --loader=torch"
        )
    if unknown := [key for key in given if key not in _KEYS]:
        raise unknown_keys("quantization_config", unknown)
    flag(given, "dequantize")
    plain = agreed({key: given.get(key) for key in _PLAIN_MODULES})
    if plain is not None and not (isinstance(plain, list | tuple) and all(type(one) is str for one in plain)):
        raise JaxDeltaError(f"{_PLAIN_MODULES[0]} must be a list of names, not {shown(plain)}")
    return sizes[0], sizes[1]
