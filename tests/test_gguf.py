"""GGUF files: the same model as its safetensors, whatever the type of the weights, or refused by name."""

import json
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import change_config, on_disk, one_line, parameters, write
from conftest import EXPERTS, TEXT, write_tokenizer
from gguf_models import ARCHITECTURES, GGUF_SIZES, metadata_of, stored_tensors, to_gguf, write_gguf

import jaxdelta
from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint
from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.rotary import rotary_frequencies

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 |= {"factor": 8.0, "original_max_position_embeddings": 8192}
LONG = {"max_position_embeddings": 131_072}
MODELS: dict[str, dict[str, Any]] = {
    "YaRN": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "experts": {**EXPERTS, "moe_intermediate_size": 32},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3, **LONG},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "head_dim": 16, "rms_norm_eps": 3e-5},
}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A Qwen3 with YaRN and a head size that is neither 128 nor hidden_size / heads; not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), **GGUF_SIZES, rope_parameters=YARN)


@pytest.fixture
def rewritten(qwen3: Path, tmp_path: Path) -> Callable[..., Path]:
    """rewritten(**metadata) -> the directory of `qwen3` as a GGUF file with other metadata."""

    def rewrite(kind: str = "F32", **metadata: Any) -> Path:
        to_gguf(qwen3, tmp_path / "gguf" / "model.gguf", kind, **metadata)
        return tmp_path / "gguf"

    return rewrite


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(
            found[name].astype(np.float64), tensor.double().numpy(), rtol=1e-6, atol=0, err_msg=name
        )


@pytest.mark.parametrize("model", MODELS)
def test_equals_its_safetensors(model: str, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """Metadata alone, and with the config.json next to it."""
    whole = make_checkpoint(tmp_path / "whole", **GGUF_SIZES | MODELS[model])
    to_gguf(whole, tmp_path / "gguf" / "model.gguf")
    wanted = open_checkpoint(str(whole))
    for _ in range(2):
        found = open_checkpoint(str(tmp_path / "gguf"))
        assert found.config == wanted.config and found.notes == ()
        assert_close(parameters(found.load()), on_disk(whole))
        shutil.copy(whole / "config.json", tmp_path / "gguf")


def by_hand(blocks: bytes, kind: str) -> np.ndarray:
    """32 values of a block in float64: a float16 scale, and 8 or 4 bits a value."""
    (scale,) = struct.unpack_from("<e", blocks)
    if kind == "Q8_0":
        return scale * np.frombuffer(blocks[2:], np.int8).astype(float)
    nibbles = np.frombuffer(blocks[2:], np.uint8)
    return scale * (np.concatenate([nibbles & 15, nibbles >> 4]).astype(float) - 8)


@pytest.mark.parametrize(("kind", "size"), [("Q8_0", 34), ("Q4_0", 18)])
def test_dequantised_by_hand(kind: str, size: int, rewritten: Callable[..., Path]) -> None:
    import gguf

    directory = rewritten(kind)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.notes == (f"model.gguf: {kind} dequantised to float32",)
    reader = gguf.GGUFReader(directory / "model.gguf")
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    raw = stored.data.tobytes()
    blocks = [by_hand(raw[at : at + size], kind) for at in range(0, len(raw), size)]
    found = checkpoint.source.read("model.layers.1.mlp.up_proj.weight")
    assert found.dtype == np.float32 and checkpoint.config.dtype == "float32"
    np.testing.assert_allclose(found, np.reshape(blocks, found.shape), rtol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_rows_of_every_type(kind: str, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """A Llama, whose queries and keys are stored in another order; slices are those of the whole."""
    import gguf

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16}
    whole = make_checkpoint(tmp_path / "whole", **sizes, model_type="llama", num_attention_heads=16)
    config = json.loads((whole / "config.json").read_text())
    tensors = stored_tensors(on_disk(whole), config)
    if kind == "Q4_K":  # gguf cannot quantise to it: random blocks of finite scales
        dtype = gguf.GGMLQuantizationType[kind]
        stored = {
            name: random_blocks(value.shape, dtype) for name, value in tensors.items() if value.ndim == 2
        }
        values = {name: gguf.dequantize(data, dtype) for name, data in stored.items()}
        path = tmp_path / "gguf" / "model.gguf"
        write_gguf(path, "llama", metadata_of(config), tensors, kind, stored)
    else:
        values = to_gguf(whole, tmp_path / "gguf" / "model.gguf", kind)
    checkpoint = open_checkpoint(str(tmp_path / "gguf"))
    wanted = values["blk.1.attn_k.weight"].reshape(2, 8, 2, 256).swapaxes(1, 2).reshape(32, 256)
    keys = "model.layers.1.self_attn.k_proj.weight"
    for start, stop in [(0, None), (3, 9), (17, 18), (5, 5), (30, 99)]:
        found = checkpoint.source.read(keys, start, stop)
        np.testing.assert_array_equal(found.astype(np.float32), wanted[start:stop])
    embedding = values["token_embd.weight"].astype(np.float32)
    ids = np.array([[9, 2, 9]], np.int32)
    np.testing.assert_array_equal(np.asarray(checkpoint.embeddings(ids)).astype(np.float32), embedding[ids])
    assert checkpoint.config.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")


def random_blocks(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    import gguf

    stored = gguf.quants.quant_shape_to_byte_shape(shape, dtype)
    data = np.random.default_rng(0).integers(0, 255, stored, np.uint8)
    data.reshape(-1, 144)[:, [1, 3]] = 0x14  # the high bytes of two float16: 1e-3
    return data


def test_analysis(qwen3: Path, tmp_path: Path) -> None:
    """C1: YaRN is in the metadata; every number is that of the dequantised weights as safetensors."""
    to_gguf(qwen3, tmp_path / "gguf" / "model.gguf", "Q8_0")
    quantised = open_checkpoint(str(tmp_path / "gguf"))
    plain = tmp_path / "plain"
    shutil.copytree(qwen3, plain)
    import torch

    write(plain, {name: torch.from_numpy(quantised.source.read(name)) for name in quantised.source.specs})
    write_tokenizer(tmp_path / "gguf")
    found, wanted = (jaxdelta.analyze(str(path), TEXT, top_k=3) for path in (tmp_path / "gguf", plain))
    assert found.per_layer == wanted.per_layer
    assert found.run["calibration_loss"] == wanted.run["calibration_loss"]
    assert found.run["notes"] == ["model.gguf: Q8_0 dequantised to float32"]
    no_yarn = tmp_path / "no_yarn"
    shutil.copytree(plain, no_yarn)
    change_config(no_yarn, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    other = jaxdelta.analyze(str(no_yarn), TEXT, top_k=3)
    assert abs(other.run["calibration_loss"] - wanted.run["calibration_loss"]) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_type yarn, config.json default",
        ),
        ({"rope_parameters": {**YARN, "factor": 2.0}}, "factor 4.0, config.json 2.0"),
        ({"head_dim": 16}, "head_dim 32, config.json 16"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06, config.json 1e-05"),
        ({"attention_bias": True}, "attention_bias False, config.json True"),
        ({"num_hidden_layers": 3, "layer_types": None}, "num_hidden_layers 2, config.json 3"),
    ],
)
def test_a_config_that_contradicts(
    changes: dict[str, Any], message: str, qwen3: Path, rewritten: Callable[..., Path]
) -> None:
    directory = rewritten()
    shutil.copy(qwen3 / "config.json", directory)
    change_config(directory, **changes)
    found = one_line(load_model, str(directory))
    assert message in found and "model.gguf and config.json contradict each other" in found
    assert len(found) < 500


def test_what_only_the_config_says(qwen3: Path, rewritten: Callable[..., Path]) -> None:
    """A window, which GGUF has no key for."""
    directory = rewritten()
    shutil.copy(qwen3 / "config.json", directory)
    change_config(directory, use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=None)
    assert open_checkpoint(str(directory)).config.windows == (8, 8)


def test_no_head_where_the_config_has_one(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    tied = make_checkpoint(tmp_path / "tied", **GGUF_SIZES, tie_word_embeddings=True)
    to_gguf(tied, tmp_path / "gguf" / "model.gguf")
    assert open_checkpoint(str(tmp_path / "gguf")).config.tie_embeddings
    shutil.copy(tied / "config.json", tmp_path / "gguf")
    change_config(tmp_path / "gguf", tie_word_embeddings=False)
    assert "no output.weight, config.json tie_word_embeddings false" in one_line(
        load_model, str(tmp_path / "gguf")
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention__causal", True),
        ("attention__sliding_window", 0),
        ("expert_count", 0),
        ("pooling_type", 3),
        ("rope__dimension_count", 32),
        ("rope__scaling__attn_factor", 1.0),
        ("rope__scaling__finetuned", True),
        ("rope__scaling__yarn_ext_factor", 1.0),
        ("rope__scaling__yarn_beta_fast", 32.0),
        ("attention__head_count", [4, 4]),
        ("vocab_size", 256),
        ("!general__name", "any"),
        ("!mradermacher__quantized_by", "any"),
    ],
)
def test_keys_without_influence(key: str, value: Any, qwen3: Path, rewritten: Callable[..., Path]) -> None:
    assert open_checkpoint(str(rewritten(**{key: value}))).config == open_checkpoint(str(qwen3)).config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention__sliding_window", 4096, "qwen3.attention.sliding_window=4096"),
        ("attention__causal", False, "qwen3.attention.causal=False"),
        ("expert_shared_count", 1, "qwen3.expert_shared_count=1"),
        ("logit_scale", 0.5, "qwen3.logit_scale=0.5"),
        ("rope__dimension_count", 16, "qwen3.rope.dimension_count=16"),
        (
            "rope__dimension_sections",
            [8, 8, 0, 0],
            "qwen3.rope.dimension_sections differs from layer to layer",
        ),
        ("rope__scaling__alpha", 1000.0, "qwen3.rope.scaling.alpha=1000.0"),
        ("rope__scaling__type", "longrope", "rope_type='longrope' is not supported"),
        ("rope__scaling__yarn_log_multiplier", 0.1, "yarn_log_multiplier=0.1"),
        ("attention__value_length", 64, "qwen3.attention.value_length=64"),
        ("attention__head_count", [4, 2], "qwen3.attention.head_count differs from layer to layer"),
        ("attention__head_count", "4", "num_attention_heads must be a positive integer, not '4'"),
        ("!general__type", "adapter", "holds no model (general.type is 'adapter')"),
        ("!general__type", "mmproj", "holds no model (general.type is 'mmproj')"),
        ("!general__alignment", 0, "general.alignment is 0"),
    ],
)
def test_keys_that_are_refused(key: str, value: Any, message: str, rewritten: Callable[..., Path]) -> None:
    found = one_line(load_model, str(rewritten(**{key: value})))
    assert message in found and "model.gguf: " in found and len(found) < 500


@pytest.mark.parametrize("key", ["yarn_attn_factor", "attn_factor"])
def test_an_attention_factor_is_decided_by_the_config(
    key: str, qwen3: Path, rewritten: Callable[..., Path]
) -> None:
    """DeepSeek-R1-0528-Qwen3-8B: llama.cpp multiplies by the number that transformers calls the whole."""
    directory = rewritten(**{f"rope__scaling__{key}": 0.8782488562869419})
    found = one_line(load_model, str(directory))
    assert f"rope.scaling.{key}=0.878249 multiplies YaRN's factor in llama.cpp" in found
    shutil.copy(qwen3 / "config.json", directory)
    assert open_checkpoint(str(directory)).config == open_checkpoint(str(qwen3)).config
    change_config(directory, rope_parameters={**YARN, "attention_factor": 0.5})
    assert open_checkpoint(str(directory)).config.rope.attention_factor == 0.5


def test_an_attention_factor_without_yarn(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    whole = make_checkpoint(tmp_path / "whole", **GGUF_SIZES)
    to_gguf(whole, tmp_path / "gguf" / "model.gguf", rope__scaling__attn_factor=1.2)
    assert "attn_factor=1.2 is supported with YaRN only" in one_line(load_model, str(tmp_path / "gguf"))


def test_defaults_of_llama_cpp(qwen3: Path, tmp_path: Path) -> None:
    """Keys that may be absent: key/value heads, a head's size, theta; a factor of 0 is none."""
    config = json.loads((qwen3 / "config.json").read_text())
    kept = metadata_of(config)
    for key in [*kept]:
        if key.startswith("rope.") or key in (
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
        ):
            del kept[key]
    kept["rope.scaling.factor"] = 0.0
    tensors = stored_tensors(on_disk(qwen3), config)
    write_gguf(tmp_path / "model.gguf", "qwen3", kept, tensors)
    # The tensors show that the head size was another.
    assert "self_attn.q_norm.weight is (32,), not (16,)" in one_line(load_model, str(tmp_path))
    for key in ("block_count", "attention.layer_norm_rms_epsilon"):
        write_gguf(tmp_path / "model.gguf", "qwen3", {k: v for k, v in kept.items() if k != key}, tensors)
        assert f"its metadata has no qwen3.{key}" in one_line(load_model, str(tmp_path))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 32.0},  # Llama 3.2
        {
            "factor": 8.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 300,
        },
    ],
)
def test_factors_of_ropes_frequencies(
    changes: dict[str, Any], beside: bool, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    sizes = GGUF_SIZES | {"head_dim": 64}
    whole = make_checkpoint(
        tmp_path / "whole", **sizes, **LONG, model_type="llama", rope_parameters=LLAMA3 | changes
    )
    to_gguf(whole, tmp_path / "gguf" / "model.gguf")
    if beside:
        shutil.copy(whole / "config.json", tmp_path / "gguf")
    found, wanted = (open_checkpoint(str(path)).config for path in (tmp_path / "gguf", whole))
    frequencies = [rotary_frequencies(config.rope, 64) for config in (found, wanted)]
    np.testing.assert_allclose(*frequencies, rtol=1e-6)
    assert found.rope == wanted.rope or (not beside and "low_freq_factor" in changes)


def test_factors_that_are_no_llama_3s(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    whole = make_checkpoint(tmp_path / "whole", **GGUF_SIZES, model_type="llama")
    config = json.loads((whole / "config.json").read_text())
    tensors = stored_tensors(on_disk(whole), config)
    for factors, message in [
        (np.linspace(1, 3, 16), "cannot be recovered from rope_freqs.weight"),
        (np.ones(8), "rope_freqs.weight (8,) does not fit RoPE"),
    ]:
        write_gguf(
            tmp_path / "model.gguf",
            "llama",
            metadata_of(config),
            tensors | {"rope_freqs.weight": factors.astype(np.float32)},
        )
        assert message in one_line(load_model, str(tmp_path))
    write_gguf(
        tmp_path / "model.gguf",
        "llama",
        metadata_of(config),
        tensors | {"rope_freqs.weight": np.ones(16, np.float32)},
    )
    assert open_checkpoint(str(tmp_path)).config.rope.kind == "default"
    # A config.json with Llama 3's scaling, and a file from before llama.cpp stored it.
    write_gguf(tmp_path / "model.gguf", "llama", metadata_of(config), tensors)
    shutil.copy(whole / "config.json", tmp_path)
    change_config(tmp_path, rope_parameters=LLAMA3, **LONG)
    assert "rope_type default, config.json llama3" in one_line(load_model, str(tmp_path))


def test_a_mistral_is_a_llama(qwen3: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """llama.cpp has no architecture for it; the window is in config.json only."""
    to_gguf(qwen3, tmp_path / "qwen3" / "model.gguf")
    whole = make_checkpoint(tmp_path / "whole", **GGUF_SIZES, model_type="mistral", sliding_window=8)
    to_gguf(whole, tmp_path / "gguf" / "model.gguf")
    assert open_checkpoint(str(tmp_path / "gguf")).config.model_type == "llama"
    shutil.copy(whole / "config.json", tmp_path / "gguf")
    found = open_checkpoint(str(tmp_path / "gguf"))
    assert found.config == open_checkpoint(str(whole)).config
    assert_close(parameters(found.load()), on_disk(whole))
    shutil.copy(whole / "config.json", tmp_path / "qwen3")
    assert "model_type qwen3, config.json mistral" in one_line(load_model, str(tmp_path / "qwen3"))


def test_shards(qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    tensors = stored_tensors(on_disk(qwen3), config)
    parts = [{n: t for n, t in tensors.items() if n.startswith("blk.0.") == (i == 1)} for i in range(2)]
    for i, part in enumerate(parts):
        metadata = metadata_of(config) if i == 0 else {}
        write_gguf(tmp_path / f"m-Q8-0000{i + 1}-of-00002.gguf", "qwen3", metadata, part)
    assert_close(parameters(load_model(str(tmp_path))), on_disk(qwen3))
    twice = {"output_norm.weight": tensors["output_norm.weight"]}
    write_gguf(tmp_path / "m-Q8-00002-of-00002.gguf", "qwen3", {}, parts[1] | twice)
    assert "output_norm.weight is in m-Q8-00001-of-00002.gguf, too" in one_line(load_model, str(tmp_path))
    (tmp_path / "m-Q8-00002-of-00002.gguf").unlink()
    found = one_line(load_model, str(tmp_path))
    assert found == f"{tmp_path}: m-Q8-00002-of-00002.gguf is missing, 1 of 00002 shards are there"


def test_several_models(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M", "b-Q8_0", "c", "d"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    found = one_line(load_model, str(tmp_path))
    assert "several GGUF files (a-Q4_K_M.gguf, b-Q8_0.gguf, c.gguf and 1 more); leave one" in found


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("clip", "general.architecture is 'clip'; jaxdelta computes llama, qwen2"), ("qwen3vl", "is 'qwen3vl'")],
)
def test_other_architectures(architecture: str, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "mmproj.gguf", architecture, {}, {})
    assert message in one_line(load_model, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole GGUF file"),
        (b"GGUF", "is GGUF version 0"),
        (b"GGUF\x01\0\0\0", "is GGUF version 1; jaxdelta reads 2 and 3"),
        (b"GGUF\0\0\0\x03", "is a big-endian GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "is not a whole GGUF file"),
        (b"ggml" + b"\0" * 40, "it begins with b'ggml'"),
    ],
)
def test_a_damaged_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert message in one_line(load_model, str(tmp_path))


def test_a_cut_off_file(rewritten: Callable[..., Path]) -> None:
    directory = rewritten()
    whole = (directory / "model.gguf").read_bytes()
    for size in (10, 30, 100, 1000, 4000, len(whole) // 2, len(whole) - 64):
        (directory / "model.gguf").write_bytes(whole[:size])
        assert "is not a whole GGUF file" in one_line(load_model, str(directory)), size


def test_mutated_headers(rewritten: Callable[..., Path]) -> None:
    """Every failure is a JaxDeltaError of one line."""
    directory = rewritten()
    whole = (directory / "model.gguf").read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        mutated = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            mutated[draw.randrange(3000)] = draw.choice([0, 1, 8, 9, 127, 255, draw.randrange(256)])
        (directory / "model.gguf").write_bytes(mutated)
        try:
            open_checkpoint(str(directory))
        except JaxDeltaError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 3000  # names of missing tensors
    assert refused > 30


def test_types_that_cannot_be_dequantised(rewritten: Callable[..., Path]) -> None:
    directory = rewritten()
    whole = (directory / "model.gguf").read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8
    for kind, message in [(9, "has type Q8_1"), (99, "has type number 99"), (26, "has type I32")]:
        (directory / "model.gguf").write_bytes(whole[:at] + struct.pack("<I", kind) + whole[at + 4 :])
        found = one_line(load_model, str(directory))
        assert f"{name.decode()} {message}, which the installed gguf cannot dequantise" in found


def test_one_tensor_under_two_names(qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    tensors = stored_tensors(on_disk(qwen3), config)
    more = {"model.norm.weight": tensors["output_norm.weight"]}
    write_gguf(tmp_path / "model.gguf", "qwen3", metadata_of(config), tensors | more)
    found = one_line(load_model, str(tmp_path))
    assert "model.norm.weight and output_norm.weight are one tensor" in found


@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_without_torch(
    loader: str, qwen3: Path, rewritten: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = rewritten()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_checkpoint(str(directory), loader=loader).config.rope.kind == "yarn"


def test_without_gguf(rewritten: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = rewritten()
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = one_line(load_model, str(directory))
    assert found == ("a GGUF checkpoint needs gguf, which is not installed (pip install 'jaxdelta[gguf]')")


def test_conversion_to_orbax(rewritten: Callable[..., Path], tmp_path: Path, qwen3: Path) -> None:
    from jaxdelta.checkpoint.convert import convert

    convert(str(rewritten()), tmp_path / "orbax")
    assert open_checkpoint(str(tmp_path / "orbax")).config == open_checkpoint(str(qwen3)).config
    assert_close(parameters(load_model(str(tmp_path / "orbax"))), on_disk(qwen3))


def test_other_weights_count_first(rewritten: Callable[..., Path], qwen3: Path) -> None:
    directory = rewritten()
    (directory / "model.gguf").write_bytes(b"is not even opened")
    for file in qwen3.iterdir():
        shutil.copy(file, directory)
    assert_close(parameters(load_model(str(directory))), on_disk(qwen3))


def test_architectures_of_the_writer() -> None:
    """The tests cover every architecture that is read."""
    from jaxdelta.checkpoint.gguf_config import _MODEL_TYPES

    assert set(ARCHITECTURES.values()) == set(_MODEL_TYPES)
