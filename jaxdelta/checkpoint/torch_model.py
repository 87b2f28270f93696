"""A transformers model in memory as a checkpoint: the same checks, the weights read where they lie."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxdelta.checkpoint.checkpoint import Checkpoint, checked
from jaxdelta.checkpoint.source import TensorSource
from jaxdelta.checkpoint.torch_files import tensor_source
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.config import DTYPE_BYTES
from jaxdelta.model.families.registry import config_from_dict

# Modules around a model, and the attribute that holds it.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint(Checkpoint):
    """A model in memory; `directory` only names it."""


def is_torch_model(value: Any) -> bool:
    """Whether a value is a PyTorch module, without importing PyTorch."""
    return any(
        f"{kind.__module__}.{kind.__name__}" == "torch.nn.modules.module.Module" for kind in _kinds(value)
    )


def unwrapped(model: Any) -> Any:
    """The model within torch.compile's module, or one of several devices."""
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def open_torch_model(model: Any) -> LoadedCheckpoint:
    """Opens a model of transformers, such as AutoModelForCausalLM returns; a layer is copied as it is read.

    Raises:
        UsageError: another module, a PEFT adapter that is not merged, weights without values or of a dtype
            that is not read.
        JaxDeltaError: the configuration is not supported, or the tensors do not fit it.
    """
    name = type(model).__name__
    adapted = any(getattr(model, mark, False) for mark in ("peft_config", "_hf_peft_config_loaded"))
    if adapted or any(kind.__module__.startswith("peft.") for kind in _kinds(model)):
        raise UsageError(f"model: {name} has a PEFT adapter; give model.merge_and_unload()")
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise UsageError(f"model: {name} is no transformers model; give AutoModelForCausalLM's")
    if getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False):
        raise UsageError(f"model: {name} is quantised; give model.dequantize(), or its directory")
    where = Path(f"{name} in memory")
    source = _source(model)
    try:
        return LoadedCheckpoint(**vars(checked(where, config_from_dict(model.config.to_dict()), source)))
    except JaxDeltaError as error:
        raise JaxDeltaError(f"model: {str(error).removeprefix(f'{where}: ')}") from error


def _source(model: Any) -> TensorSource:
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise UsageError(f"model: {name} is on the meta device and has no values; load the weights first")
        if str(tensor.dtype).removeprefix("torch.") not in DTYPE_BYTES:
            raise UsageError(f"model: {name} has dtype {tensor.dtype}; cast it to float32 or bfloat16")
    return tensor_source("model", tensors)


def _kinds(value: Any) -> tuple[type, ...]:
    return type(value).__mro__
