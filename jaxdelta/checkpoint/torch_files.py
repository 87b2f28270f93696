"""Checkpoints that only PyTorch opens: .bin files, and bitsandbytes' formats.

Imported on demand. Values are those on disk: transformers' PyTorch model, which may cast them, draw absent
ones at random or rewrite settings, is only used to dequantise.
"""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.safetensors_files import open_safetensors, safetensors_files, shard_files
from jaxdelta.checkpoint.source import TensorSource, TensorSpec, expert_parts, held_twice
from jaxdelta.errors import JaxDeltaError, first_line, plain_errors
from jaxdelta.model.config import DTYPE_BYTES, ModelConfig
from jaxdelta.model.families.quantisation import BITSANDBYTES, quantisation
from jaxdelta.model.families.registry import config_from_dict, read_config, read_json
from jaxdelta.utils.files import check_whole


def torch_source(directory: Path, ignored: Collection[str] = ()) -> tuple[ModelConfig, TensorSource]:
    """Opens a directory: its safetensors or .bin files as they are, or through transformers where quantised.

    Returns:
        The configuration and the tensors, with notes of what was rounded.

    Raises:
        JaxDeltaError: there are no weights, PyTorch is not installed, or the files cannot be read.
    """
    if not (directory / hub.CONFIG).exists():
        raise JaxDeltaError(f"{directory}: has no {hub.CONFIG}; is it a model's directory?")
    safetensors, files = safetensors_files(directory), _torch_files(directory)
    if not safetensors and not files:
        raise JaxDeltaError(f"{directory}: has no {hub.WEIGHTS}, nor any other weights")
    method = quantisation(read_json(directory / hub.CONFIG))
    if safetensors and method != BITSANDBYTES:
        return read_config(directory / hub.CONFIG, ignored), open_safetensors(directory, safetensors)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise JaxDeltaError(
            f"{directory}: only PyTorch can open this checkpoint, and it is not installed (pip install torch)"
        ) from error
    if method == BITSANDBYTES:
        return _dequantised(directory, ignored)
    config = read_config(
        directory / hub.CONFIG, ignored
    )  # Before the weights: it may be another architecture.
    return config, tensor_source(directory, _load(files))


def _torch_files(directory: Path) -> list[Path]:
    """The .bin files: the one, or those in the index."""
    single, index = (directory / name for name in hub.TORCH_WEIGHTS)
    if single.exists():
        return [single]
    return shard_files(index) if index.exists() else []


def _load(files: list[Path]) -> dict[str, Any]:
    """All tensors of the files, mapped rather than read where the format allows it, and no other objects."""
    import torch

    # torch.load raises errors of any type, and some of their messages advise to load the file unsafely.
    messages = {
        OSError: "{}: cannot be read ({})",
        Exception: "{}: is damaged, or holds other objects than tensors; save the tensors as safetensors",
    }
    tensors: dict[str, Any] = {}
    for file in files:
        check_whole(file)
        with plain_errors(file, messages):
            held = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        entries = held.items() if isinstance(held, dict) else [(None, held)]
        if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in entries):
            raise JaxDeltaError(f"{file}: holds no tensors by name")
        if twice := tensors.keys() & held.keys():
            raise held_twice(file, min(twice), min(twice))
        tensors |= held
    return tensors


def tensor_source(where: object, tensors: dict[str, Any], notes: tuple[str, ...] = ()) -> TensorSource:
    """PyTorch's tensors, experts one by one, float64 rounded to float32; `where` is for messages."""
    import torch

    if wide := sum(tensor.dtype == torch.float64 for tensor in tensors.values()):
        notes += (f"{wide} tensors rounded from float64 to float32",)
    views, specs = {}, {}
    for name, tensor in tensors.items():
        for part, first, shape in expert_parts(name, tuple(tensor.shape)):
            if part in views:
                raise held_twice(where, name, part)
            views[part] = tensor if part == name else tensor.flatten(0, 1)[first : first + shape[0]]
            specs[part] = TensorSpec(shape, _dtype(name, tensor))

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        view = views[name]
        return _to_numpy(view[start:stop] if view.ndim else view)

    return TensorSource(specs, read, notes=notes)


def _dtype(name: str, tensor: Any) -> np.dtype:
    """The dtype that `_to_numpy` gives."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype == "float64":
        return np.dtype(np.float32)
    try:
        return np.dtype(getattr(ml_dtypes, dtype, dtype))
    except TypeError as error:
        raise JaxDeltaError(f"{name} has dtype {dtype}, which jaxdelta does not read") from error


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return tensor.numpy()


def _dequantised(directory: Path, ignored: Collection[str]) -> tuple[ModelConfig, TensorSource]:
    """The tensors of transformers' PyTorch model, dequantised to float32."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    raw = read_json(directory / hub.CONFIG)
    del raw["quantization_config"]
    try:
        config = config_from_dict(raw, ignored)
        tensors = _transformers_tensors(directory)
    except JaxDeltaError as error:
        raise type(error)(f"{directory}: {error}") from error
    except Exception as error:  # transformers and the formats behind it raise errors of any type.
        raise JaxDeltaError(f"{directory}: transformers cannot open it ({first_line(error)})") from error
    return config, tensor_source(directory, tensors, (f"dequantised to float32 from {BITSANDBYTES}",))


def _transformers_tensors(directory: Path) -> dict[str, Any]:
    """The stored tensors by name: transformers draws absent ones at random, and drops unexpected ones."""
    import torch
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        adapter_kwargs={"subfolder": "none"},  # or it applies an adapter in the same directory
        trust_remote_code=False,
    )
    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):  # in 4 bits, which are dequantised to the dtype they once had
            parameter.quant_state.dtype = torch.float32
    tensors = model.dequantize().state_dict()
    for name, shape, _ in report["mismatched_keys"]:
        tensors[name] = torch.empty(shape, device="meta")
    for name in report["unexpected_keys"]:
        tensors[name] = torch.empty((), device="meta")
    for name in report["missing_keys"]:
        tensors.pop(name, None)
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPE_BYTES:
            raise JaxDeltaError(f"transformers cannot dequantise {name} ({tensor.dtype})")
    return tensors
