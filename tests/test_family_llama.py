"""Llama: published models, every layer's state against transformers' own, and runs from end to end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import (
    assert_analysed,
    assert_equals_transformers,
    assert_published,
    assert_reads_as_transformers,
    assert_weights_round_trip,
    relative,
)

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.families.registry import config_from_dict
from jaxdelta.model.rotary import rotary_frequencies

# As Llama 3.1's, for a model that was trained on 64 positions.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "llama3, tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama3, other factors, biases of attention": {
        "rope_parameters": LLAMA3 | {"factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0},
        "attention_bias": True,
        "head_dim": 32,
    },
    "linear, biases of the MLP, multi-head": {
        "rope_parameters": LINEAR,
        "mlp_bias": True,
        "num_key_value_heads": 4,
        "head_dim": 12,
    },
    "yarn, multi-query, other eps": {
        "rope_parameters": YARN,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
    },
    "all biases, other theta": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}
MODEL = {"model_type": "llama"}

# As the files were published, by transformers 4.
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_31_8B = {key: value for key, value in LLAMA_32_1B.items() if key != "head_dim"} | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "rope_scaling": {**LLAMA_32_1B["rope_scaling"], "factor": 8.0},
    "tie_word_embeddings": False,
}
SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with everything that a Llama may have."""
    biases = {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}
    return make_checkpoint(tmp_path_factory.mktemp("llama"), **MODEL, **biases)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> np.ndarray:
    """The logits of the plain case."""
    return assert_equals_transformers(make_checkpoint(tmp_path_factory.mktemp("plain"), **MODEL)).logits


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_equals_transformers(
    case: str, tmp_path: Path, make_checkpoint: Callable[..., Path], grouped: np.ndarray
) -> None:
    wanted = assert_equals_transformers(make_checkpoint(tmp_path, **MODEL, **CASES[case]))
    assert relative(wanted.logits, grouped) > 1e-3  # the weights are the same draw: what a case varies shows


def test_old_files_compute_the_same(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    file = make_checkpoint(tmp_path, **MODEL, **CASES["llama3, tied"]) / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    file.write_text(json.dumps(config))
    assert_equals_transformers(tmp_path)


def test_published_models() -> None:
    small = assert_published(LLAMA_32_1B, 1_235_814_400)
    large = assert_published(LLAMA_31_8B, 8_030_261_248)
    assert (small.head_dim, large.head_dim, small.tie_embeddings, large.dtype) == (64, 128, True, "bfloat16")
    assert small.qk_norm is None
    assert not (large.qkv_bias or large.o_bias or large.mlp_bias)


@pytest.mark.parametrize("published", [LLAMA_32_1B, LLAMA_31_8B])
def test_frequencies_of_published_models(published: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_from_dict(published)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(published)))).inv_freq.numpy()
    found = rotary_frequencies(config.rope, config.head_dim)
    np.testing.assert_array_max_ulp(found, theirs, maxulp=2)
    plain = rotary_frequencies(type(config.rope)(theta=config.rope.theta), config.head_dim)
    slowed = found / plain
    assert slowed[0] == 1
    assert slowed[-1] == pytest.approx(1 / config.rope.factor)
    assert np.any((slowed < 0.99) & (slowed > 1.01 / config.rope.factor))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True},
        {"num_key_value_heads": None, "head_dim": None, "mlp_bias": True, "torch_dtype": "float16"},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "max_position_embeddings": 512,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        },
        {"max_position_embeddings": 512, "rope_parameters": LLAMA3, "attention_bias": True},
        {"rope_parameters": YARN, "rope_interleaved": False, "is_llama_config": True},
    ],
)
def test_reads_as_transformers_does(changes: dict[str, Any]) -> None:
    assert_reads_as_transformers(SMALL | changes)


def test_the_original_range_is_the_models_where_none_is_given() -> None:
    given = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = config_from_dict(SMALL | {"rope_parameters": given, "max_position_embeddings": 96})
    assert config.rope.original_max_positions == 96


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pretraining_tp": 2}, r"pretraining_tp=2 \(only 1\)"),
        ({"rope_interleaved": True}, r"rope_interleaved=True \(only False\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": "no"}, "mlp_bias must be true or false"),
        ({"sliding_window": 8}, r"sliding_window=8 \(it is None"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "needs a low_freq_factor"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor=4 must be greater than"),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": "4"}},
            "high_freq_factor must be a positive number",
        ),
        ({"rope_parameters": LLAMA3 | {"mrope_section": [8]}}, "unknown key in rope_parameters: mrope"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_anything_else_is_an_error_that_names_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(JaxDeltaError, match=named) as caught:
        config_from_dict(SMALL | changes)
    assert "\n" not in str(caught.value)


def test_weights_round_trip(biased: Path, tmp_path: Path) -> None:
    assert_weights_round_trip(biased, tmp_path)


def test_end_to_end(biased: Path, tmp_path: Path) -> None:
    assert_analysed(biased, "llama", tmp_path)
