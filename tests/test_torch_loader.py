"""Checkpoints that transformers opens: the same weights, or the reason why not in one line."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import assert_same, change_config, fuse_experts, on_disk, one_line, parameters, to_torch_file
from conftest import EXPERTS

from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint
from jaxdelta.errors import JaxDeltaError


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_loader_equals_the_safetensors_loader(
    dtype: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=2, dtype=dtype, tie_word_embeddings=dtype == "float16")
    wanted = load_model(str(tmp_path), loader="safetensors")
    by_torch = open_checkpoint(str(tmp_path), loader="torch")
    assert_same(parameters(by_torch.load()), parameters(wanted))
    assert by_torch.config == wanted.config
    ids = np.array([[9, 2, 9]], np.int32)
    np.testing.assert_array_equal(by_torch.embeddings(ids), open_checkpoint(str(tmp_path)).embeddings(ids))
    np.testing.assert_array_equal(by_torch.head_slice(99, 200), wanted.head[99:200])


@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_experts(loader: str, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=2, **EXPERTS | {"mlp_only_layers": [0]})
    tensors = to_torch_file(tmp_path)
    assert_same(parameters(load_model(str(tmp_path), loader=loader)), tensors)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_torch_files(shards: int, loader: str, small: Path) -> None:
    tensors = to_torch_file(small, shards)
    assert_same(parameters(load_model(str(small), loader=loader)), tensors)
    with pytest.raises(JaxDeltaError, match=r"has no model\.safetensors .*--loader=auto"):
        load_model(str(small), loader="safetensors")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut off", pickle.dumps(print)])
def test_a_damaged_torch_file(content: bytes, small: Path) -> None:
    """PyTorch's own messages advise to load the file unsafely."""
    to_torch_file(small)
    (small / "pytorch_model.bin").write_bytes(content)
    message = "is damaged, or holds other objects than tensors; save the tensors as safetensors"
    assert one_line(load_model, str(small)) == f"{small / 'pytorch_model.bin'}: {message}"


@pytest.mark.parametrize("held", [[1], {"state_dict": {}}, {"step": 3}, {1: None}])
def test_a_torch_file_of_something_else(held: Any, small: Path) -> None:
    import torch

    to_torch_file(small)
    torch.save(held, small / "pytorch_model.bin")
    assert "pytorch_model.bin: holds no tensors by name" in one_line(load_model, str(small))


def test_experts_fused_and_one_by_one(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    import torch

    make_checkpoint(tmp_path, num_hidden_layers=1, **EXPERTS)
    tensors = to_torch_file(tmp_path)
    fused = {name: t for name, t in fuse_experts(tensors).items() if name.endswith("experts.down_proj")}
    torch.save(tensors | fused, tmp_path / "pytorch_model.bin")
    assert "experts.0.down_proj.weight; remove one" in one_line(load_model, str(tmp_path))


def test_one_tensor_in_two_torch_files(small: Path) -> None:
    import torch

    tensors = to_torch_file(small, 2)
    torch.save(
        {"model.norm.weight": tensors["model.norm.weight"]} | torch.load(small / "pytorch_model-0.bin"),
        small / "pytorch_model-0.bin",
    )
    torch.save(
        {"model.norm.weight": tensors["model.norm.weight"]} | torch.load(small / "pytorch_model-1.bin"),
        small / "pytorch_model-1.bin",
    )
    assert "model.norm.weight in two files" in one_line(load_model, str(small))
    (small / "pytorch_model-1.bin").unlink()
    assert "names pytorch_model-1.bin, which is missing" in one_line(load_model, str(small))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64", "mixed"])
@pytest.mark.parametrize("said", ["bfloat16", "float32"])
@pytest.mark.parametrize("zipped", [True, False])
def test_values_are_those_on_disk(stored: str, said: str, zipped: bool, small: Path) -> None:
    """Whatever dtype config.json gives, to which transformers casts; in both of PyTorch's formats."""
    import torch

    tensors = to_torch_file(small)
    for i, name in enumerate(tensors):
        dtype = ("float32", "bfloat16", "float16")[i % 3] if stored == "mixed" else stored
        tensors[name] = (tensors[name].double() * (1 + 1e-9)).to(getattr(torch, dtype))
    torch.save(tensors, small / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    change_config(small, dtype=said)
    checkpoint = open_checkpoint(str(small))
    wanted = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
    assert_same({name: checkpoint.source.read(name) for name in wanted}, wanted)
    rounded = (f"{len(tensors)} tensors rounded from float64 to float32",) if stored == "float64" else ()
    assert checkpoint.notes == rounded


@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_safetensors_are_not_cast(loader: str, small: Path) -> None:
    """The class of errors that rounded float8 to bfloat16: a dtype in config.json is no cast."""
    change_config(small, dtype="bfloat16")
    assert_same(parameters(load_model(str(small), loader=loader)), on_disk(small))


@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_settings_that_transformers_rewrites(loader: str, small: Path) -> None:
    """The strict check reads the file, and not what transformers made of it."""
    to_torch_file(small)
    change_config(small, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "odd": 1})
    assert "unknown key in rope_parameters: odd" in one_line(load_model, str(small), loader=loader)


@pytest.mark.parametrize("loader", ["auto", "torch"])
@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantization_config: gptq), which jaxdelta does not read; give the",
        ),
        ({"quant_method": "awq", "bits": 4}, "quantization_config: awq), which"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quantization_config: modelopt), which"),
        ({"group_size": 64, "bits": 4}, "{'group_size': 64, 'bits': 4}), which"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8: fmt='e5m2'), which"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "format='pack-quantized'), which",
        ),
    ],
)
def test_formats_that_nobody_dequantises(
    loader: str, scheme: dict[str, Any], message: str, small: Path
) -> None:
    change_config(small, quantization_config=scheme)
    assert message in one_line(load_model, str(small), loader=loader)


@pytest.mark.parametrize(
    "scheme", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True}]
)
def test_a_format_whose_library_is_missing(scheme: dict[str, Any], small: Path) -> None:
    change_config(small, quantization_config=scheme)
    message = one_line(load_model, str(small))
    assert "bitsandbytes), which jaxdelta does not read; --loader=torch does, where" in message
    message = one_line(load_model, str(small), loader="torch")
    assert message.startswith(f"{small}: transformers cannot open it (") and "bitsandbytes" in message


def test_torch_files_of_another_architecture(small: Path) -> None:
    to_torch_file(small)
    (small / "pytorch_model.bin").write_bytes(b"is not even opened")
    change_config(small, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert "model_type is 'gpt2'" in one_line(load_model, str(small))


@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_without_torch(loader: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_torch_file(small)
    monkeypatch.setitem(sys.modules, "torch", None)
    message = one_line(load_model, str(small), loader=loader)
    assert message == (
        f"{small}: only PyTorch can open this checkpoint, and it is not installed (pip install torch)"
    )
