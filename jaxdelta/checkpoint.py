"""Weights on disk -> parameters: safetensors read directly, everything else through PyTorch.

The model's parameter tree carries Hugging Face's names, with all layers stacked: `layers.mlp.up_proj.weight`
of shape (L, F, D) is `model.layers.{0..L-1}.mlp.up_proj.weight`. Each stacked parameter is filled in one host
buffer, so loading needs the weights' own size and little more.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxdelta import hub
from jaxdelta.config import ModelConfig
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model import Qwen3
from jaxdelta.tensors import Source, Spec, open_safetensors, safetensors_files

LOADERS = ("auto", "safetensors", "torch")
ALIGNMENT = 64  # What XLA's CPU client needs to use a host buffer as it lies instead of copying it.

# Buffers that old checkpoints carry beside their weights.
_DERIVED = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.bias|self_attn\.masked_bias)")


def load_model(model: str, *, revision: str | None = None, loader: str = "auto") -> Qwen3:
    """Loads a Qwen3 checkpoint; the weights keep the dtype they have on disk.

    Args:
        model: `demo`, a local directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        loader: `safetensors`, `torch` (transformers' PyTorch model and its state dict: .bin files, GGUF,
            quantised formats), or `auto`: safetensors where there are any.

    Raises:
        JaxDeltaError: whatever is wrong with the directory, its files or their tensors, all names given.
        UsageError: an unknown loader.
    """
    if loader not in LOADERS:
        raise UsageError(f"loader must be one of {', '.join(LOADERS)}, not {loader!r}")
    directory = hub.resolve(model, revision)
    files = safetensors_files(directory)
    if loader == "safetensors" and not files:
        raise JaxDeltaError(f"{directory}: has no {hub.WEIGHTS} and no {hub.INDEX}; try --loader=torch")
    if loader == "torch" or not files:
        from jaxdelta.torch_loader import torch_source

        config, source = torch_source(directory)
    else:
        config = ModelConfig.from_file(directory / hub.CONFIG)
        source = open_safetensors(files)
    return _build(config, source, directory)


def save_model(model: Qwen3, directory: Path) -> None:
    """Writes config.json and model.safetensors in Hugging Face's layout, in the weights' own dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        for name, index in _names(path, model.config):
            tensors[name] = np.ascontiguousarray(value[index])
    save_file(tensors, directory / hub.WEIGHTS, metadata={"format": "pt"})
    dtype = model.embed_tokens.weight[...].dtype
    config = dataclasses.replace(model.config, dtype=str(dtype)).to_dict()
    (directory / hub.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def first_bad_tensor(model: Qwen3) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, if any."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        for name, index in _names(path, model.config):
            if not np.isfinite(np.asarray(variable[...][index], np.float32)).all():
                return name
    return None


def _build(config: ModelConfig, source: Source, directory: Path) -> Qwen3:
    """Checks every name and shape both ways, then fills the model parameter by parameter."""
    abstract = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    wanted = {
        name: variable.shape[1:] if _is_stacked(path) else variable.shape
        for path, variable in flat
        for name, _ in _names(path, config)
    }
    _check_names(wanted, source.specs, config, directory)
    filled = []
    for path, variable in flat:
        parts = list(_names(path, config))
        dtype = np.result_type(*{source.specs[name].dtype for name, _ in parts})
        buffer = _aligned(variable.shape, dtype)
        for name, index in parts:
            buffer[index] = source.read(name)
        filled.append((path, variable.replace(jax.device_put(buffer, may_alias=True))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return path[0] == "layers"


def _names(path: tuple[Any, ...], config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Hugging Face's name of each tensor within a parameter, and where in the parameter it lies."""
    if _is_stacked(path):
        rest = ".".join(path[1:])
        for i in range(config.num_layers):
            yield f"model.layers.{i}.{rest}", i
    else:
        yield ("" if path[0] == "lm_head" else "model.") + ".".join(path), ...


def _check_names(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Spec], config: ModelConfig, directory: Path
) -> None:
    extra = {name for name in set(found) - set(wanted) if not _DERIVED.fullmatch(name)}
    if config.tie_embeddings:
        extra.discard("lm_head.weight")
    wrong = [
        f"{name} is {found[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{what}: {', '.join(sorted(names, key=_natural))}"
        for what, names in (
            ("missing", set(wanted) - set(found)),
            ("unexpected", extra),
            ("wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise JaxDeltaError(f"{directory}: the weights do not fit {hub.CONFIG}: {'; '.join(problems)}")


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
