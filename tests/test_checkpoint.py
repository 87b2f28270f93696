"""Weights on disk: every layout is read, and written, bit for bit, in little more room than they take."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    assert_same,
    bits,
    by_expert,
    fuse_experts,
    on_disk,
    parameters,
    write,
)
from conftest import EXPERTS
from flax import nnx

from jaxdelta.checkpoint.checkpoint import Checkpoint, load_model, open_checkpoint, save_model
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import Decoder, count_parameters
from jaxdelta.model.families.registry import config_from_dict, config_to_dict


def logits_of(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        tokens = torch.arange(40)[None] * 5 % 256
        return AutoModelForCausalLM.from_pretrained(directory)(tokens).logits.float().numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_every_dtype_bit_for_bit(
    dtype: str, shard: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    make_checkpoint(tmp_path, dtype=dtype, max_shard_size=shard, attention_bias=True)
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (shard == "40KB")
    assert (tmp_path / WEIGHTS).exists() == (shard == "1GB")
    model = load_model(str(tmp_path))
    assert_same(parameters(model), on_disk(tmp_path))
    assert model.config.dtype == dtype


def test_bits_of_extreme_numbers(small: Path) -> None:
    import torch

    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in on_disk(small).items()}
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    flat = tensors[EMBEDDING].flatten()
    flat[:] = everything[24_000 : 24_000 + flat.numel()]  # Through the infinity and NaNs to subnormals.
    tensors[EMBEDDING] = flat.view(256, 48)
    write(small, tensors)
    checkpoint = open_checkpoint(str(small))
    assert_same(parameters(checkpoint.load()), tensors)
    assert checkpoint.first_bad_tensor() == EMBEDDING


def test_layers_of_different_dtypes_keep_their_values(small: Path) -> None:
    import torch

    tensors = on_disk(small)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    write(small, tensors)
    found = parameters(load_model(str(small)))
    np.testing.assert_array_equal(found[name], tensors[name].float().numpy())
    layer = open_checkpoint(str(small)).layer(1)
    assert layer["mlp"]["up_proj"]["weight"].dtype == jnp.bfloat16


def layer_tensors(checkpoint: Checkpoint, index: int) -> dict[str, np.ndarray]:
    found = {}
    for path, variable in nnx.to_flat_state(checkpoint.layer(index)):
        found |= by_expert(f"model.layers.{index}." + ".".join(path), np.asarray(variable[...]))
    return found


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_one_layer_and_some_rows(shard: str, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(tmp_path, dtype="bfloat16", max_shard_size=shard)
    checkpoint, wanted = open_checkpoint(str(tmp_path)), on_disk(tmp_path)
    for i in range(4):
        own = {name: t for name, t in wanted.items() if name.startswith(f"model.layers.{i}.")}
        assert_same(layer_tensors(checkpoint, i), own)
    ids = np.array([[3, 255, 0], [3, 3, 17]], np.int32)
    for name, rows in ((EMBEDDING, checkpoint.embeddings(ids)), (HEAD, checkpoint.head_rows(ids))):
        np.testing.assert_array_equal(bits(rows), bits(wanted[name][ids]))
    np.testing.assert_array_equal(bits(checkpoint.head_slice(200, 256)), bits(wanted[HEAD][200:]))
    np.testing.assert_array_equal(bits(checkpoint.final_norm()), bits(wanted["model.norm.weight"]))
    assert checkpoint.first_bad_tensor() is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_experts(fused: bool, step: int, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(tmp_path, dtype="bfloat16", **EXPERTS | {"decoder_sparse_step": step})
    wanted = on_disk(tmp_path)
    assert len([name for name in wanted if ".mlp.experts.5." in name]) == 12 // step
    if fused:
        write(tmp_path, fuse_experts(wanted))
        assert len(on_disk(tmp_path)) < len(wanted) - 12 // step
    checkpoint = open_checkpoint(str(tmp_path))
    assert_same(parameters(checkpoint.load()), wanted)
    layers: dict[str, np.ndarray] = {}
    for i in range(4):
        layers |= layer_tensors(checkpoint, i)
    assert_same(layers, {name: t for name, t in wanted.items() if ".layers." in name})


@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_of_another_dtype(
    fused: bool, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    import torch

    tensors = on_disk(make_checkpoint(tmp_path, dtype="bfloat16", **EXPERTS))
    for name in (name for name in tensors if name.startswith("model.layers.2.mlp.experts.")):
        tensors[name] = tensors[name].float() * 1.001
    write(tmp_path, fuse_experts(tensors) if fused else tensors)
    wanted = {
        name: tensor.to(torch.float32) if ".mlp.experts." in name else tensor
        for name, tensor in tensors.items()
    }
    checkpoint = open_checkpoint(str(tmp_path))
    assert_same(parameters(checkpoint.load()), wanted)
    assert checkpoint.layer(2)["mlp"]["experts"]["up_proj"]["weight"].dtype == jnp.float32
    assert checkpoint.layer(1)["mlp"]["experts"]["up_proj"]["weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("head", ["absent", "same", "different"])
def test_tied_head(head: str, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    tensors = on_disk(tmp_path)
    assert HEAD not in tensors
    if head != "absent":
        tensors[HEAD] = tensors[EMBEDDING] * (1 + (head == "different"))
        write(tmp_path, tensors)
    model = load_model(str(tmp_path))
    # transformers 5 does not tie a head that is there and differs.
    assert model.config.tie_embeddings == (head != "different")
    if head == "same":
        del tensors[HEAD]
    assert_same(parameters(model), tensors)
    rows = open_checkpoint(str(tmp_path)).head_rows(np.arange(256, dtype=np.int32)[None])[0]
    np.testing.assert_array_equal(rows, model.head)
    save_model(model, tmp_path / "saved")
    np.testing.assert_array_equal(logits_of(tmp_path / "saved"), logits_of(tmp_path))


def test_bare_model(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """Embedding models are saved without the prefix `model.`."""
    make_checkpoint(tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    tensors = on_disk(tmp_path)
    write(tmp_path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert_same(parameters(load_model(str(tmp_path))), tensors)


def test_buffers_of_old_checkpoints_are_passed_over(small: Path) -> None:
    tensors = on_disk(small)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": tensors["model.norm.weight"][:8]}
    write(small, tensors | old)
    assert_same(parameters(load_model(str(small))), tensors)


@pytest.mark.parametrize(
    "overrides",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16", "tie_word_embeddings": True},
        {"dtype": "bfloat16", **EXPERTS},
        {**EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": False, "use_sliding_window": True},
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 3e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "truncate": False,
            },
        },
    ],
)
def test_save(overrides: dict[str, Any], tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    model = load_model(str(make_checkpoint(first, **overrides)))
    save_model(model, second)
    assert_same(on_disk(second), on_disk(first))
    assert_same(parameters(load_model(str(second))), parameters(model))
    assert load_model(str(second)).config == model.config
    np.testing.assert_array_equal(logits_of(second), logits_of(first))


def test_save_of_a_new_model(tmp_path: Path) -> None:
    config = config_from_dict(
        {
            "model_type": "qwen3",
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "head_dim": 6,
        }
    )
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # Compiles in a tenth of the default's time.
    model = Decoder(config, dtype=jnp.bfloat16, rngs=rngs)
    save_model(model, tmp_path / "new" / "model")
    again = load_model(str(tmp_path / "new" / "model"))
    assert_same(parameters(again), parameters(model))
    assert again.config.dtype == "bfloat16"


def python(code: str, *args: object) -> str:
    """Runs code in a fresh interpreter; what it printed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_safetensors_need_neither_torch_nor_transformers(tiny_checkpoint: Path) -> None:
    code = """
import sys
from pathlib import Path
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta import load_model
load_model(sys.argv[1])
print(load_encoder(Path(sys.argv[1]))(["abc"]))
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    encoded, heavy = python(code, tiny_checkpoint).splitlines()
    assert len(eval(encoded)[0][0]) == 3
    assert heavy == "[]"


BIG = {
    "model_type": "qwen3",
    "vocab_size": 20_000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "dtype": "bfloat16",
}
BIG_EXPERTS = {
    **BIG,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 16,
    "num_experts": 32,
    "moe_intermediate_size": 256,
}
MEASURE = """
import resource, sys
import jax
from jaxdelta.checkpoint.checkpoint import open_checkpoint
jax.block_until_ready(jax.device_put(0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
checkpoint = open_checkpoint(sys.argv[1])
if sys.argv[2] == "whole":
    jax.block_until_ready(checkpoint.load())
for i in range(checkpoint.config.num_layers) if sys.argv[2] == "layers" else ():
    jax.block_until_ready(checkpoint.layer(i))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("big", [BIG, BIG_EXPERTS], ids=["dense", "experts"])
def test_peak_memory(big: dict[str, Any], tmp_path: Path) -> None:
    """A whole model takes its own size and little more, a pass over its layers the size of a few of them."""
    config = config_from_dict(big)
    write_holes(config, tmp_path)
    size = 2 * count_parameters(config)
    assert size > 350e6
    assert int(python(MEASURE, tmp_path, "whole")) < 1.15 * size + 30e6
    assert int(python(MEASURE, tmp_path, "layers")) < 0.15 * size + 30e6


def write_holes(config: ModelConfig, directory: Path) -> None:
    """A checkpoint of zeros that takes no room on the disk: a header, then a hole."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoConfig.for_model(**config_to_dict(config))
        tensors = AutoModelForCausalLM.from_config(theirs).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(directory / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(config_to_dict(config)))


def test_the_weights_are_used_where_they_were_read(tiny_checkpoint: Path) -> None:
    """On a CPU the device's buffer is the one the file was read into."""
    from jaxdelta.checkpoint.source import aligned

    buffer = aligned((300, 7), np.dtype(ml_dtypes.bfloat16))
    buffer[:] = 1
    array = jax.device_put(buffer, jax.devices("cpu")[0], may_alias=True)
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
