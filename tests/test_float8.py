"""Float8 checkpoints: the weights are those that NumPy makes of them, whole or layer by layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    assert_same,
    by_expert,
    change_config,
    dequantised,
    on_disk,
    one_line,
    parameters,
    to_float8,
    write,
)
from conftest import EXPERTS
from flax import nnx

import jaxdelta
from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint, save_model
from jaxdelta.checkpoint.float8 import dequantise

UP = "model.layers.1.mlp.up_proj.weight"
# No size is a multiple of 128: hidden 200, MLP 300, queries 144, keys 72.
UNEVEN = {"hidden_size": 200, "intermediate_size": 300, "head_dim": 36, "num_hidden_layers": 2}


@pytest.fixture
def float8(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    to_float8(make_checkpoint(tmp_path / "float8", **UNEVEN))
    return tmp_path / "float8"


def test_every_number_in_float8() -> None:
    everything = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(16, 16)
    scale = np.array([[1.7, 3e-5]], np.float32)
    found = dequantise(jax.numpy.asarray(everything), jax.numpy.asarray(scale), (16, 8))
    wanted = everything.astype(np.float32) * np.repeat(scale, 8, axis=1)
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(found).sum() == 2


@pytest.mark.parametrize(
    ("overrides", "scale_dtype", "block"),
    [
        ({}, "bfloat16", (128, 128)),
        ({}, "float32", (64, 128)),
        ({**EXPERTS, "moe_intermediate_size": 150}, "bfloat16", (128, 128)),
        ({**EXPERTS, "mlp_only_layers": [0], "tie_word_embeddings": True}, "float32", (128, 128)),
    ],
    ids=["dense", "other blocks", "experts", "mixed"],
)
def test_equals_numpy(
    overrides: dict[str, Any],
    scale_dtype: str,
    block: tuple[int, int],
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
) -> None:
    to_float8(make_checkpoint(tmp_path, **UNEVEN | overrides), scale_dtype, block)
    wanted = dequantised(on_disk(tmp_path), block)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_same(parameters(checkpoint.load()), wanted)
    for i in range(2):
        layer, abstract = checkpoint.layer(i), checkpoint.abstract_layer(i)
        found = {}
        for path, variable in nnx.to_flat_state(layer):
            found |= by_expert(f"model.layers.{i}." + ".".join(path), np.asarray(variable[...]))
        assert_same(found, {n: t for n, t in wanted.items() if n.startswith(f"model.layers.{i}.")})
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), layer)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract)
    assert checkpoint.first_bad_tensor() is None


def test_modules_that_were_not_converted(float8: Path) -> None:
    """One layer's projection is plain: it keeps its values beside those that are dequantised."""
    tensors = on_disk(float8)
    tensors[UP] = dequantised(tensors)[UP].bfloat16()
    del tensors[f"{UP}_scale_inv"]
    write(float8, tensors)
    wanted = dequantised(tensors)
    found = parameters(load_model(str(float8)))
    assert_same(found, wanted | {UP: wanted[UP].float()})
    assert open_checkpoint(str(float8)).layer(1)["mlp"]["up_proj"]["weight"].dtype == "bfloat16"


def test_bfloat16_would_round(float8: Path) -> None:
    """Why float32: what bfloat16 would lose is far more than the arithmetic does."""
    weight = np.asarray(parameters(load_model(str(float8)))[UP])
    lost = weight - weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert 5e-4 < np.linalg.norm(lost) / np.linalg.norm(weight) < 4e-3


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_analysis(experts: dict[str, Any], tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    to_float8(make_checkpoint(tmp_path / "float8", **UNEVEN | experts))
    plain = make_checkpoint(tmp_path / "plain", **UNEVEN | experts)
    write(plain, dequantised(on_disk(tmp_path / "float8")))
    found, wanted = (
        jaxdelta.analyze(str(tmp_path / name), ["some text to be measured"] * 4, top_k=3)
        for name in ("float8", "plain")
    )
    assert found.per_layer == wanted.per_layer
    np.testing.assert_array_equal(found.directions, wanted.directions)
    assert found.run["calibration_loss"] == wanted.run["calibration_loss"]


def test_save_writes_what_is_in_memory(float8: Path, tmp_path: Path) -> None:
    model = load_model(str(float8))
    save_model(model, tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert again.config == model.config
    assert_same(parameters(again), dequantised(on_disk(float8)))


@pytest.mark.parametrize("experts", [{}, {**EXPERTS, "mlp_only_layers": [1]}], ids=["dense", "experts"])
def test_shards_and_orbax_hold_the_same(
    experts: dict[str, Any], tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    from jaxdelta.checkpoint.convert import convert

    to_float8(make_checkpoint(tmp_path / "float8", **UNEVEN | experts))
    wanted = dequantised(on_disk(tmp_path / "float8"))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        axis = next(i for i in reversed(range(len(shape))) if shape[i] % 2 == 0)
        return jax.NamedSharding(mesh, jax.P(*[None] * axis, "x"))

    assert_same(parameters(load_model(str(tmp_path / "float8"), sharding=place)), wanted)
    convert(str(tmp_path / "float8"), tmp_path / "orbax")
    assert_same(parameters(load_model(str(tmp_path / "orbax"))), wanted)
    assert open_checkpoint(str(tmp_path / "orbax")).config == open_checkpoint(str(tmp_path / "float8")).config


WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax"}
ROUNDED = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {
        "weights": WEIGHTS | {"strategy": strategy} | changes,
        "input_activations": ROUNDED,
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


@pytest.mark.parametrize("loader", ["safetensors", "torch"])
@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("scheme", "name", "axes"),
    [
        (compressed("channel"), "weight_scale", lambda rows: (rows, 1)),
        (compressed("tensor"), "weight_scale", lambda rows: (1,)),
        (PER_TENSOR, "weight_scale", lambda rows: ()),
        (PER_TENSOR | {"weight_block_size": None}, "weight_scale_inv", lambda rows: ()),
    ],
    ids=["channel", "tensor", "AutoFP8", "transformers"],
)
def test_one_scale_a_row_or_a_tensor(
    scheme: dict[str, Any],
    name: str,
    axes: Callable[[int], tuple[int, ...]],
    experts: dict[str, Any],
    loader: str,
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
) -> None:
    """Float64 by hand, 1e-6; both loaders; scales of activations are left out, and said."""
    import torch

    make_checkpoint(tmp_path, **UNEVEN, **experts)
    stored, wanted = {}, {}
    for key, tensor in on_disk(tmp_path).items():
        stored[key] = wanted[key] = tensor.bfloat16()
        if "_proj.weight" in key:
            scale = torch.rand(axes(tensor.shape[0])).add(0.5).div(300)
            scale = scale.bfloat16() if name == "weight_scale" else scale
            stored[key] = (tensor / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[key.removesuffix("weight") + name] = scale
            wanted[key] = stored[key].double() * scale.double()
            if scheme is PER_TENSOR:
                stored[key.removesuffix("weight") + "input_scale"] = torch.tensor([0.5])
    write(tmp_path, stored)
    change_config(tmp_path, quantization_config=scheme, dtype="bfloat16")
    checkpoint = open_checkpoint(str(tmp_path), loader=loader)
    found = parameters(checkpoint.load())
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key].astype(float), value.double().numpy(), rtol=1e-6, err_msg=key)
        np.testing.assert_array_equal(checkpoint.source.read(key, 1, 3), found[key][1:3])
    left_out = sum(key.endswith("input_scale") for key in stored)
    said = f"{left_out} scales of activations left out: activations are not rounded to float8"
    assert checkpoint.notes == ((said,) if left_out else ())
    assert checkpoint.first_bad_tensor() is None


def test_blocks_of_compressed_tensors(float8: Path) -> None:
    """Qwen's blocks under the other names."""
    tensors = on_disk(float8)
    wanted = dequantised(tensors)
    write(float8, {name.replace("_scale_inv", "_scale"): tensor for name, tensor in tensors.items()})
    change_config(float8, quantization_config=compressed("block", block_structure=[128, 128]))
    assert_same(parameters(load_model(str(float8), loader="torch")), wanted)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (compressed("group", group_size=128), "group_size=128"),
        (compressed("tensor", num_bits=4), "num_bits=4"),
        (compressed("tensor", type="int"), "type='int'"),
        (compressed("tensor", symmetric=False), "symmetric=False"),
        (compressed("tensor", odd=1), "unknown key odd"),
        (compressed("tensor") | {"config_groups": {}}, "config_groups of several kinds, or none"),
        (compressed("tensor") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme={'num_bits': 8}"),
        (compressed("block"), "no size of blocks"),
        (PER_TENSOR | {"weight_block_size": [128, 0]}, "a block of [128, 0]"),
        (PER_TENSOR | {"odd": 1}, "unknown key odd"),
    ],
)
def test_float8_that_is_refused(scheme: dict[str, Any], message: str, float8: Path) -> None:
    change_config(float8, quantization_config=scheme)
    found = one_line(load_model, str(float8))
    assert f"{scheme['quant_method']}: {message}" in found and len(found) < 500


def test_scales_of_another_shape_are_named(float8: Path) -> None:
    """Blocks where the configuration says one scale a tensor; and two scales of one weight."""
    change_config(float8, quantization_config=PER_TENSOR)
    assert "mlp.up_proj.weight_scale_inv is (3, 2), not (1, 1)" in one_line(load_model, str(float8))
    tensors = on_disk(float8)
    write(float8, tensors | {f"{UP}_scale": tensors[f"{UP}_scale_inv"]})
    assert "are the scales of one weight" in one_line(load_model, str(float8))


def test_wrong_scales_are_named(float8: Path) -> None:
    tensors = on_disk(float8)
    down = "model.layers.0.mlp.down_proj.weight"
    del tensors[f"{UP}_scale_inv"]
    tensors[f"{down}_scale_inv"] = tensors[f"{down}_scale_inv"].T
    tensors["model.norm.weight_scale_inv"] = tensors["model.norm.weight"][:1]
    write(float8, tensors)
    assert one_line(load_model, str(float8)) == (
        f"{float8}: the weights do not fit config.json: missing: {UP}_scale_inv; "
        "unexpected: model.norm.weight_scale_inv; "
        f"wrong shape: {down}_scale_inv is (3, 2), not (2, 3)"
    )


def test_float8_without_its_scheme(float8: Path) -> None:
    change_config(float8, quantization_config=None)
    assert "_proj.weight has dtype F8_E4M3, which jaxdelta reads only" in one_line(load_model, str(float8))
