"""Qwen2 and Qwen2.5: published models, every layer's state against transformers' own, and whole runs."""

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

SLIDING = {"use_sliding_window": True, "sliding_window": 24}  # of texts of 136 tokens
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "tied, large heads": {"tie_word_embeddings": True, "head_dim": 32},
    "window by max_window_layers": {**SLIDING, "max_window_layers": 2},
    "window by layer_types, multi-query": {
        **SLIDING,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_key_value_heads": 1,
    },
    "yarn, window in all layers": {**SLIDING, "max_window_layers": 0, "rope_parameters": YARN},
    "yarn, attention_factor, tied": {
        "rope_parameters": YARN | {"attention_factor": 1.3},
        "tie_word_embeddings": True,
    },
    "linear, multi-head, other eps": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
    },
    "other theta, small heads": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "head_dim": 10,
    },
}
MODEL = {"model_type": "qwen2"}

# As the files of Qwen2.5 were published; Qwen2-0.5B's says the same of the forward pass.
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_05B = {key: value for key, value in QWEN25_05B.items() if key != "use_mrope"} | {
    "max_position_embeddings": 131072,
    "sliding_window": 131072,
}
QWEN25_7B = QWEN25_05B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
SMALL = {
    "model_type": "qwen2",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen2"), **MODEL, **SLIDING, max_window_layers=2)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> np.ndarray:
    """The logits of the plain case."""
    return assert_equals_transformers(make_checkpoint(tmp_path_factory.mktemp("plain"), **MODEL)).logits


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(
    case: str, tmp_path: Path, make_checkpoint: Callable[..., Path], grouped: np.ndarray
) -> None:
    wanted = assert_equals_transformers(make_checkpoint(tmp_path, **MODEL, **CASES[case]))
    assert relative(wanted.logits, grouped) > 1e-3  # the weights are the same draw: what a case varies shows


def test_published_models() -> None:
    small = assert_published(QWEN25_05B, 494_032_768)
    large = assert_published(QWEN25_7B, 7_615_616_512)
    assert assert_published(QWEN2_05B, 494_032_768).rope == small.rope
    assert (small.head_dim, large.head_dim) == (64, 128)
    assert set(small.windows) == set(large.windows) == {None}
    assert (large.qkv_bias, large.o_bias, large.qk_norm) == (True, False, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 10, "tie_word_embeddings": True, "torch_dtype": "float16"},
        {"num_key_value_heads": None},
        {**SLIDING, "max_window_layers": 3},
        {**SLIDING, "layer_types": ["full_attention", "sliding_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_theta": 1e6, "use_mrope": False},
    ],
)
def test_reads_as_transformers_does(changes: dict[str, Any]) -> None:
    from transformers import Qwen2Config

    config, theirs = assert_reads_as_transformers(SMALL | changes), Qwen2Config(**SMALL | changes)
    windows = [theirs.sliding_window if kind.startswith("sliding") else None for kind in theirs.layer_types]
    assert list(config.windows) == windows
    assert config.num_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_mrope": True}, r"use_mrope=True \(only False\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({**SLIDING, "max_window_layers": "all"}, "max_window_layers"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "rope_type='mrope'"),
        ({"num_experts": 60}, "num_experts"),
    ],
)
def test_anything_else_is_an_error_that_names_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(JaxDeltaError, match=named):
        config_from_dict(SMALL | changes)


def test_weights_round_trip(windowed: Path, tmp_path: Path) -> None:
    assert_weights_round_trip(windowed, tmp_path)


def test_end_to_end(windowed: Path, tmp_path: Path) -> None:
    assert_analysed(windowed, "qwen2", tmp_path)
