"""Checkpoints that only PyTorch opens: .bin files, GGUF, quantised formats. Imported only when asked for."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdelta import hub
from jaxdelta.config import ModelConfig
from jaxdelta.errors import JaxDeltaError
from jaxdelta.tensors import Source, Spec


def torch_source(directory: Path) -> tuple[ModelConfig, Source]:
    """Opens a directory with transformers' PyTorch model; its state dict serves as the tensors.

    Raises:
        JaxDeltaError: PyTorch is not installed, or transformers cannot open the directory.
    """
    model = _load(directory)
    raw = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    tensors = model.state_dict()
    if left := [name for name, tensor in tensors.items() if tensor.dtype not in _dtypes()]:
        raise JaxDeltaError(
            f"{directory}: transformers cannot dequantise {left[0]} ({tensors[left[0]].dtype})"
        )
    specs = {name: Spec(tuple(tensor.shape), _dtypes()[tensor.dtype]) for name, tensor in tensors.items()}
    return ModelConfig.from_dict(raw), Source(
        specs, lambda name, start=None, stop=None: _to_numpy(tensors[name][start:stop])
    )


def _load(directory: Path) -> Any:
    if not (directory / hub.CONFIG).exists() and not list(directory.glob("*.gguf")):
        raise JaxDeltaError(f"{directory}: has no {hub.CONFIG}; is it a model's directory?")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise JaxDeltaError(
            f"{directory}: only PyTorch can open this checkpoint, and it is not installed (pip install torch)"
        ) from error
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", gguf_file=gguf[0] if gguf else None
        )
        if getattr(model, "hf_quantizer", None) is not None:
            model = model.dequantize()
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0]
        raise JaxDeltaError(f"{directory}: transformers cannot open it ({line})") from error
    return model


def _dtypes() -> dict[Any, np.dtype]:
    import torch

    return {
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
        torch.float16: np.dtype(np.float16),
        torch.float32: np.dtype(np.float32),
    }


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
