"""What the tests of checkpoints share: tensors on disk, tensors in a model, and their bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.decoder import Decoder

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def on_disk(directory: Path) -> dict[str, Any]:
    """All tensors of all safetensors files of a directory, as PyTorch reads them."""
    from safetensors.torch import load_file

    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def write(directory: Path, tensors: dict[str, Any], name: str = WEIGHTS) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: t.clone().contiguous() for k, t in tensors.items()}, directory / name, metadata={"format": "pt"}
    )


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def parameters(model: Decoder) -> dict[str, np.ndarray]:
    """The model's parameters under the names they have on disk."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value, name = np.asarray(variable[...]), ".".join(path)
        if path[0] in ("layers", "sparse_layers"):
            layers = model.config.layers_of(sparse=path[0] == "sparse_layers")
            for i, row in zip(layers, value, strict=True):
                found |= by_expert(f"model.layers.{i}." + name.partition(".")[2], row)
        else:
            found["model." * (path[0] != "lm_head") + name] = value
    return found


def by_expert(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """A layer's parameter under its name on disk, or under its experts'."""
    if ".experts." not in name:
        return {name: value}
    return {name.replace(".experts.", f".experts.{e}."): row for e, row in enumerate(value)}


def fuse_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """All experts of a layer in two tensors, as transformers 5 holds them in memory."""
    import torch

    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".mlp.experts.")[0] for name in set(tensors) - set(fused)}:
        prefix = f"{layer}.mlp.experts."
        count = sum(name.startswith(prefix) and name.endswith("down_proj.weight") for name in tensors)
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{e}.{part}_proj.weight"] for e in range(count)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    return fused


def bits(tensor: Any) -> np.ndarray:
    import torch

    if isinstance(tensor, torch.Tensor):
        return tensor.detach().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(tensor).view(np.uint8)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert str(found[name].dtype).removeprefix("torch.") == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(bits(found[name]), bits(tensor), err_msg=name)


FLOAT8_SCHEME = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def to_float8(directory: Path, scale_dtype: str = "bfloat16", block: tuple[int, int] = (128, 128)) -> None:
    """Rewrites a checkpoint as Qwen publishes float8: projections in blocks, all else in bfloat16."""
    import torch

    stored = {}
    for name, tensor in on_disk(directory).items():
        if "_proj.weight" not in name:
            stored[name] = tensor.bfloat16()
            continue
        rows, columns = (-(-n // size) for n, size in zip(tensor.shape, block, strict=True))
        scale = torch.rand(rows, columns).add(0.5).div(300).to(getattr(torch, scale_dtype))
        spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        spread = spread[: tensor.shape[0], : tensor.shape[1]]
        stored[name] = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    write(directory, stored)
    scheme = FLOAT8_SCHEME | {"weight_block_size": list(block), "modules_to_not_convert": ["lm_head"]}
    change_config(directory, quantization_config=scheme, dtype="bfloat16")


def dequantised(tensors: dict[str, Any], block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """The same tensors in float32, by NumPy, block by block; those without scales as they are."""
    import torch

    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name in [name for name in found if f"{name}_scale_inv" in tensors]:
        weight, scale = found[name].float().numpy().copy(), tensors[f"{name}_scale_inv"].float().numpy()
        for i, j in np.ndindex(*scale.shape):
            weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale[i, j]
        found[name] = torch.from_numpy(weight)
    return found


def to_torch_file(directory: Path, shards: int = 1) -> dict[str, Any]:
    """Rewrites a checkpoint as pytorch_model.bin; returns its tensors."""
    import torch

    tensors = on_disk(directory)
    (directory / WEIGHTS).unlink()
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return tensors
    files = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name, f in files.items() if f == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


def one_line(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the JaxDeltaError that a call must end in."""
    with pytest.raises(JaxDeltaError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
