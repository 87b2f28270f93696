"""The `quantization_config` of a config.json: float8 weights with one scale a tensor, a row or a block.

Formats: `fp8` of transformers and AutoFP8, and `compressed-tensors`
(https://github.com/vllm-project/compressed-tensors) as `float-quantized`. What they say of activations has no
influence: activations are not rounded. The files tell which weights are float8.
"""

from collections.abc import Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.families.values import LARGEST, agreed, flag, shown

FLOAT8_METHODS = ("fp8", "compressed-tensors")
BITSANDBYTES = "bitsandbytes"  # the method that transformers turns into plain weights
PER_TENSOR, PER_ROW = (0, 0), (1, 0)  # blocks, 0 for a whole axis

_PLAIN_MODULES = ("modules_to_not_convert", "ignored_layers")
# The keys of a format and their supported values; None for any value.
_Values = dict[str, tuple[Any, ...] | None]
_FLOAT8 = ("float-quantized", "naive-quantized")
_ANY: _Values = {
    "activation_scheme": None,
    "dequantize": None,
    "ignore": None,
    "ignored_layers": None,
    "modules_to_not_convert": None,
    "quant_method": None,
}
_FP8: _Values = {
    **_ANY,
    "expert_dtype": ("fp8", None),
    "fmt": ("e4m3", None),
    "kv_cache_scheme": (None,),
    "modules_to_convert": ([], None),
    # Power-of-two scales are stored as any others; they matter to engines that round activations, too.
    "scale_fmt": ("float", "ue8m0", None),
    "weight_block_size": None,
}
_COMPRESSED: _Values = {
    **_ANY,
    "config_groups": None,
    "format": _FLOAT8,
    "global_compression_ratio": None,
    "kv_cache_scheme": (None,),
    "quantization_status": None,
    "run_compressed": None,
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "version": None,
}
_GROUP: _Values = {
    "format": (None, *_FLOAT8),
    "input_activations": None,
    "output_activations": None,
    "targets": None,
    "weights": None,
}
_WEIGHTS: _Values = {
    "actorder": (None,),
    "block_structure": None,
    "dynamic": (False, None),
    "group_size": (None,),
    "num_bits": (8,),
    "observer": None,
    "observer_kwargs": None,
    "scale_dtype": None,
    "strategy": None,
    "symmetric": (True, None),
    "type": ("float",),
    "zp_dtype": None,
}


def quantisation(raw: Mapping[str, Any]) -> str | None:
    """The method by which a config.json says that the weights are quantised, or None."""
    scheme = raw.get("quantization_config")
    if not isinstance(scheme, Mapping):
        return None
    if scheme.get("quant_method") is not None:
        return str(scheme["quant_method"])
    return BITSANDBYTES if scheme.get("load_in_8bit") or scheme.get("load_in_4bit") else None


def weight_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks with a common scale, 0 for a whole axis; None for plain weights.

    Raises:
        JaxDeltaError: another quantisation, an unknown key, or a value of the wrong type.
    """
    scheme = raw.get("quantization_config")
    if scheme is None or scheme == {}:
        return None
    if not isinstance(scheme, Mapping):
        raise JaxDeltaError(f"quantization_config must be an object, not {shown(scheme)}")
    block = float8_block(scheme)
    flag(scheme, "dequantize")
    plain = agreed({key: scheme.get(key) for key in _PLAIN_MODULES})
    if plain is not None and not (isinstance(plain, list | tuple) and all(type(one) is str for one in plain)):
        raise JaxDeltaError(f"{_PLAIN_MODULES[0]} must be a list of names, not {shown(plain)}")
    return block


def float8_block(scheme: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the blocks with a common scale, 0 for a whole axis.

    Raises:
        JaxDeltaError: another format; the message names it and what can be done.
    """
    method = quantisation({"quantization_config": scheme})
    if method == "fp8":
        found = _problem(scheme, _FP8) or _sizes(scheme.get("weight_block_size"), PER_TENSOR)
    elif method == "compressed-tensors":
        found = _problem(scheme, _COMPRESSED) or _common_block(scheme.get("config_groups"))
    else:
        found = ""
    if not isinstance(found, str):
        return found
    advice = "give the model that it was made from, before it was quantised"
    if method == BITSANDBYTES:
        advice = "--loader=torch does, where bitsandbytes is installed"
    what = f"{method}: {found}" if found else method or str(dict(scheme))
    raise JaxDeltaError(
        f"the weights are quantised (quantization_config: {what[:120]}), which jaxdelta does not read; "
        f"{advice}"
    )


def _problem(given: Mapping[str, Any], known: _Values) -> str:
    """The first key that is unknown or has an unsupported value; empty if there is none."""
    for key, value in given.items():
        if key not in known:
            return f"unknown key {key}"
        values = known[key]
        if values is not None and value not in values:
            return f"{key}={value!r}"
    return ""


def _common_block(groups: Any) -> tuple[int, int] | str:
    """The block of all groups of compressed-tensors, or what is not supported."""
    blocks = {_block(group) for group in groups.values()} if isinstance(groups, Mapping) else set()
    problems = sorted(block for block in blocks if isinstance(block, str))
    if problems or len(blocks) != 1:
        return problems[0] if problems else "config_groups of several kinds, or none"
    return blocks.pop()


def _block(group: Any) -> tuple[int, int] | str:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return f"weights={weights!r}"
    if problem := _problem(group, _GROUP) or _problem({"num_bits": None, "type": None, **weights}, _WEIGHTS):
        return problem
    strategy = weights.get("strategy")
    if strategy in ("tensor", "channel"):
        return PER_TENSOR if strategy == "tensor" else PER_ROW
    return _sizes(weights.get("block_structure")) if strategy == "block" else f"strategy={strategy!r}"


def _sizes(block: Any, default: tuple[int, int] | str = "no size of blocks") -> tuple[int, int] | str:
    if block is None:
        return default
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else [0, 0]
    if all(type(size) is int and 0 < size <= LARGEST for size in sizes):
        return sizes[0], sizes[1]
    return f"a block of {block!r}"
