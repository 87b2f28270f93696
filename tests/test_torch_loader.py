"""Checkpoints that transformers opens: the same weights, or the reason why not in one line."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import assert_same, change_config, on_disk, one_line, parameters, to_torch_file, write
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


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut off"])
def test_a_damaged_torch_file(content: bytes, small: Path) -> None:
    to_torch_file(small)
    (small / "pytorch_model.bin").write_bytes(content)
    assert re.search(f"{small}: transformers cannot open it", one_line(load_model, str(small)))


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


def test_gguf_that_cannot_be_read(tmp_path: Path) -> None:
    """Without the packages it takes, or because it is no GGUF: one line either way."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF, or so it says")
    assert re.search(f"{tmp_path}: transformers cannot open it \\(.+\\)", one_line(load_model, str(tmp_path)))
    (tmp_path / "other.gguf").write_bytes(b"")
    assert "several GGUF files (model.gguf, other.gguf)" in one_line(load_model, str(tmp_path))


def test_gguf(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    import gguf

    tensors = on_disk(make_checkpoint(tmp_path / "whole", num_hidden_layers=2, head_dim=128))
    (tmp_path / "gguf").mkdir()
    writer = gguf.GGUFWriter(str(tmp_path / "gguf" / "model.gguf"), "qwen3")
    sizes = {"block_count": 2, "context_length": 512, "embedding_length": 48, "feed_forward_length": 80}
    heads = {"head_count": 4, "head_count_kv": 2, "key_length": 128, "value_length": 128, "vocab_size": 256}
    floats = {"layer_norm_rms_eps": 1e-6, "rope_freq_base": 10_000.0}
    for name, value in (sizes | heads | floats).items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name, tensor in tensors.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert_same(parameters(load_model(str(tmp_path / "gguf"))), tensors)


def test_fp8_is_dequantised(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    import torch

    make_checkpoint(tmp_path, num_hidden_layers=2, hidden_size=128, intermediate_size=128, head_dim=32)
    plain = on_disk(tmp_path)
    stored = {name: tensor.bfloat16() for name, tensor in plain.items()}
    for name in [name for name in plain if "_proj" in name]:
        stored[name] = plain[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.ones([-(-n // 128) for n in plain[name].shape])
    write(tmp_path, stored)
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    change_config(tmp_path, quantization_config=scheme, dtype="bfloat16")
    wanted = {name: stored[name].float() for name in plain}
    found = parameters(load_model(str(tmp_path), loader="torch"))
    assert_same({name: value.astype(np.float32) for name, value in found.items()}, wanted)
    found = parameters(load_model(str(tmp_path), loader="safetensors"))
    assert_same({name: value.astype(np.float32) for name, value in found.items()}, wanted)
