"""Checkpoints that only PyTorch opens: .bin files, GGUF, quantised formats. Imported on demand."""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.names import causal
from jaxdelta.checkpoint.safetensors_files import safetensors_files, shard_files
from jaxdelta.checkpoint.source import TensorSource, TensorSpec, expert_parts, held_twice
from jaxdelta.errors import JaxDeltaError, first_line
from jaxdelta.model.config import DTYPE_BYTES, ModelConfig
from jaxdelta.model.families.registry import config_from_dict, read_json


def torch_source(directory: Path, ignored: Collection[str] = ()) -> tuple[ModelConfig, TensorSource]:
    """Opens a directory as transformers' PyTorch model, whose state dict holds the tensors.

    Raises:
        JaxDeltaError: there are no weights, PyTorch is not installed, or transformers cannot open them.
    """
    options = _options(directory)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise JaxDeltaError(
            f"{directory}: only PyTorch can open this checkpoint, and it is not installed (pip install torch)"
        ) from error
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        theirs = transformers.AutoConfig.from_pretrained(directory, **options)
        # transformers decides silently between statements that disagree: the file itself is read.
        raw = theirs.to_dict() if "gguf_file" in options else read_json(directory / hub.CONFIG)
        quantization = raw.pop("quantization_config", None) or {}
        config = config_from_dict(raw, ignored)  # Before the weights: it may be another architecture.
        if hasattr(theirs, "quantization_config") and not quantization:
            del theirs.quantization_config  # transformers refuses an empty one
        if quantization.get("quant_method") == "fp8":
            theirs.quantization_config = quantization | {"dequantize": True}
        if "gguf_file" not in options:
            _refuse_doubles(directory)
        tensors, specs = _load(directory, {"config": theirs, **options})
    except JaxDeltaError as error:
        raise type(error)(f"{directory}: {error}") from error
    except Exception as error:  # transformers and the formats behind it raise errors of any type.
        raise JaxDeltaError(f"{directory}: transformers cannot open it ({_reason(error)})") from error

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return _to_numpy(tensors[name][start:stop])

    return config, TensorSource(specs, read)


def _reason(error: Exception) -> str:
    """Without PyTorch's advice to load files that may run programs."""
    if "weights_only" in str(error) or "Weights only load failed" in str(error):
        return "a file holds no plain tensors, or is damaged"
    return first_line(error)


def _options(directory: Path) -> dict[str, Any]:
    """The file that transformers opens; a GGUF file only where there is nothing else."""
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    others = safetensors_files(directory) or any((directory / name).exists() for name in hub.TORCH_WEIGHTS)
    if (others or not gguf) and not (directory / hub.CONFIG).exists():
        raise JaxDeltaError(f"{directory}: has no {hub.CONFIG}; is it a model's directory?")
    if others:
        return {"trust_remote_code": False}
    if not gguf:
        raise JaxDeltaError(f"{directory}: has no {hub.WEIGHTS}, nor any other weights")
    if len(gguf) > 1:
        raise JaxDeltaError(f"{directory}: has several GGUF files ({', '.join(gguf)}); leave one of them")
    return {"trust_remote_code": False, "gguf_file": gguf[0]}


def _refuse_doubles(directory: Path) -> None:
    """Refuses files with one tensor twice, of which transformers takes the last."""
    single, index = (directory / name for name in hub.TORCH_WEIGHTS)
    files = safetensors_files(directory) or ([single] if single.exists() else shard_files(index))
    found: dict[str, TensorSpec] = {}
    for file in files:
        for name in _stored_names(file):
            if name in found:
                raise held_twice(file.name, name, name)
            found[name] = TensorSpec((), np.dtype(np.float32))
    causal(files[0].name, TensorSource(found, lambda name: name), (), layers=10**9)


def _stored_names(file: Path) -> list[str]:
    import torch

    if file.suffix == ".safetensors":
        with safe_open(file, framework="np") as opened:
            return list(opened.keys())
    # Only the first of PyTorch's formats is no zip file, and cannot be mapped.
    return list(torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file)))


def _load(directory: Path, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """The model's tensors, and the specs of the stored ones: transformers draws the others at random."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        adapter_kwargs={
            "subfolder": "none"
        },  # or transformers applies an adapter that lies beside the weights
        **options,
    )
    tensors = model.state_dict()
    if any(_dtype(tensor) is None for tensor in tensors.values()):
        tensors = model.dequantize().state_dict()
    specs = {}
    for name, tensor in tensors.items():
        if (dtype := _dtype(tensor)) is None:
            raise JaxDeltaError(f"transformers cannot dequantise {name} ({tensor.dtype})")
        specs[name] = TensorSpec(tuple(tensor.shape), dtype)
    for name, shape, _ in report["mismatched_keys"]:
        specs[name] = TensorSpec(tuple(shape), specs[name].dtype)
    for name in report["unexpected_keys"]:
        specs[name] = TensorSpec((), np.dtype(np.float32))
    for name in report["missing_keys"]:
        specs.pop(name, None)
    return _by_expert(tensors, specs)


def _by_expert(
    tensors: dict[str, Any], specs: dict[str, TensorSpec]
) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """Splits fused experts into views under their published names."""
    views, parts = {}, {}
    for name, spec in specs.items():
        for part, first, shape in expert_parts(name, spec.shape):
            parts[part] = TensorSpec(shape, spec.dtype)
            if part != name:
                views[part] = tensors[name].flatten(0, 1)[first : first + shape[0]]
            elif name in tensors:
                views[part] = tensors[name]
    return views, parts


def _dtype(tensor: Any) -> np.dtype | None:
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(name) if name in DTYPE_BYTES else None


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
