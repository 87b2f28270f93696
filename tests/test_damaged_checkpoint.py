"""Whatever is wrong with a checkpoint is told in one line, and names the file or the tensors."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import (
    EMBEDDING,
    WEIGHTS,
    change_config,
    fuse_experts,
    on_disk,
    one_line,
    to_torch_file,
    write,
)
from conftest import EXPERTS

from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint
from jaxdelta.errors import UsageError


@pytest.mark.parametrize("loader", ["safetensors", "torch"])
def test_all_wrong_tensors_are_named_at_once(loader: str, small: Path) -> None:
    """transformers would fill the missing and the misshapen ones at random."""
    tensors = on_disk(small)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_norm.weight"]
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:70]
    write(small, tensors)
    if loader == "torch":
        to_torch_file(small)
    message = one_line(load_model, str(small), loader=loader)
    assert message == (
        f"{small}: the weights do not fit config.json (the names are of another architecture: Phi-3, or "
        "fused projections, as model.layers.0.mlp.gate_up_proj.weight): "
        "missing: model.layers.1.self_attn.k_norm.weight, model.norm.weight; "
        "unexpected: model.layers.0.mlp.gate_up_proj.weight; "
        "wrong shape: model.layers.1.mlp.up_proj.weight is (70, 48), not (80, 48)"
    )


@pytest.mark.parametrize("fused", [False, True])
def test_wrong_experts_are_named(fused: bool, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    tensors = on_disk(make_checkpoint(tmp_path, **EXPERTS | {"num_experts": 2, "num_hidden_layers": 2}))
    if fused:
        tensors = fuse_experts(tensors)
        down = tensors.pop("model.layers.1.mlp.experts.down_proj")
        tensors["model.layers.0.mlp.experts.down_proj"] = down.flatten(0, 1)
        wanted = [f"model.layers.{i}.mlp.experts.{e}.down_proj.weight" for i in (0, 1) for e in (0, 1)][:3]
        problems = (
            f"missing: 4 tensors ({', '.join(wanted)}, …); unexpected: model.layers.0.mlp.experts.down_proj"
        )
    else:
        experts = "model.layers.1.mlp.experts"
        tensors[f"{experts}.2.up_proj.weight"] = tensors.pop(f"{experts}.0.up_proj.weight")
        tensors[f"{experts}.1.up_proj.weight"] = tensors[f"{experts}.1.up_proj.weight"][:7]
        problems = (
            f"missing: {experts}.0.up_proj.weight; unexpected: {experts}.2.up_proj.weight; "
            f"wrong shape: {experts}.1.up_proj.weight is (7, 48), not (24, 48)"
        )
    write(tmp_path, tensors)
    assert one_line(load_model, str(tmp_path)).endswith(f"config.json: {problems}")


def spoil_nothing_there(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def spoil_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def spoil_no_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def spoil_architecture(directory: Path) -> None:
    change_config(directory, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def spoil_end(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, (directory / WEIGHTS).stat().st_size - 1)


def spoil_header(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def spoil_empty(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"")


def spoil_pointer(directory: Path) -> None:
    (directory / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def spoil_offsets(directory: Path) -> None:
    """The header says of one tensor that it lies where another one does."""
    data = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start, stop = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [start - 192, stop - 192]
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def spoil_shape(directory: Path) -> None:
    """The header says that a tensor has more numbers than bytes."""
    data = (directory / WEIGHTS).read_bytes()
    changed = data.replace(b'"shape":[256,48]', b'"shape":[257,48]')
    assert changed != data
    (directory / WEIGHTS).write_bytes(changed)


def spoil_dtype(directory: Path) -> None:
    import torch

    tensors = on_disk(directory)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)
    write(directory, tensors)


def spoil_float8(directory: Path) -> None:
    import torch

    tensors = on_disk(directory)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    write(directory, tensors)


def spoil_shard(directory: Path) -> None:
    files = {"model.norm.weight": "model-1.safetensors", EMBEDDING: "model-2.safetensors"}
    (directory / WEIGHTS).rename(directory / "model-1.safetensors")
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))


def index(text: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / f"{WEIGHTS}.index.json").write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_nothing_there, "small: is empty; give the directory that holds config.json and the weights"),
        (spoil_no_config, "config.json: cannot be read (No such file or directory)"),
        (spoil_no_weights, "small: has no model.safetensors, nor any other weights"),
        (spoil_architecture, "config.json: model_type is 'gpt2'"),
        (spoil_end, "model.safetensors: is not a whole safetensors file ("),
        (spoil_header, "model.safetensors: is not a whole safetensors file ("),
        (spoil_empty, "model.safetensors: is not a whole safetensors file ("),
        (spoil_pointer, "model.safetensors: is a git-lfs pointer, not the file itself; run `git lfs pull`"),
        (spoil_offsets, "model.safetensors: is not a whole safetensors file ("),
        (spoil_shape, "model.safetensors: is not a whole safetensors file ("),
        (spoil_dtype, "model.layers.1.mlp.up_proj.weight has dtype I8; jaxdelta reads BF16, F16, F32"),
        (spoil_float8, "model.norm.weight has dtype F8_E4M3, which jaxdelta reads only in the projections"),
        (spoil_shard, "model.safetensors.index.json: names model-2.safetensors, which is missing"),
        (index('{"weight_map": {"a": "x", "b": "y"}}'), "index.json: names x, y, which are missing"),
        (index('{"weight_map": {"model.'), "index.json: cannot be read as an index of shards ("),
        (index("[]"), "index.json: cannot be read as an index of shards ("),
        (index("{}"), "index.json: cannot be read as an index of shards ("),
        (index('{"weight_map": []}'), "index.json: cannot be read as an index of shards ("),
        (index('{"weight_map": {}}'), "index.json: cannot be read as an index of shards ("),
        (index('{"weight_map": {"a": 1}}'), "index.json: cannot be read as an index of shards ("),
        (index('{"weight_map": {"a": []}}'), "index.json: cannot be read as an index of shards ("),
    ],
)
def test_a_spoilt_checkpoint(spoil: Callable[[Path], None], problem: str, small: Path) -> None:
    spoil(small)
    message = one_line(load_model, str(small))
    assert problem in message
    assert message.startswith(str(small))


def test_a_file_that_shrinks_while_it_is_read(small: Path) -> None:
    checkpoint = open_checkpoint(str(small))
    os.truncate(small / WEIGHTS, 20_000)
    message = one_line(checkpoint.load)
    assert re.search(r"model\.safetensors: .+ cannot be read \(the file has become shorter\)", message)


def test_no_such_directory(tmp_path: Path) -> None:
    assert one_line(load_model, str(tmp_path / "none")) == f"{tmp_path / 'none'}: no such directory"
    assert one_line(load_model, "./none/at/all") == "./none/at/all: no such directory"
    file = tmp_path / "file"
    file.touch()
    assert "is a file; give the directory" in one_line(load_model, str(file))


def test_an_unknown_loader(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="loader must be one of auto, safetensors, torch, not 'pickle'"):
        load_model(str(tiny_checkpoint), loader="pickle")
