"""Mistral: a published model, every layer's state against transformers' own, and runs from end to end."""

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

WINDOW = 24  # of texts of 136 tokens
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": WINDOW},
    "window, tied, large heads": {"sliding_window": WINDOW, "tie_word_embeddings": True, "head_dim": 32},
    "window of one, multi-query": {"sliding_window": 1, "num_key_value_heads": 1},
    "window, yarn": {"sliding_window": WINDOW, "rope_parameters": YARN},
    "linear, multi-head, other eps": {
        "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
    },
    "window longer than the text, other theta, small heads": {
        "sliding_window": 500,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "head_dim": 10,
    },
}
MODEL = {"model_type": "mistral"}

# As the file of Mistral-7B-v0.3 was published.
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
SMALL = {
    "model_type": "mistral",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mistral"), **MODEL, sliding_window=WINDOW)


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> np.ndarray:
    """The logits of the same weights without a window."""
    directory = make_checkpoint(tmp_path_factory.mktemp("plain"), **MODEL, sliding_window=None)
    return assert_equals_transformers(directory).logits


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(
    case: str, tmp_path: Path, make_checkpoint: Callable[..., Path], unlimited: np.ndarray
) -> None:
    wanted = assert_equals_transformers(make_checkpoint(tmp_path, **MODEL, **CASES[case]))
    assert (
        relative(wanted.logits, unlimited) > 1e-3
    )  # the weights are the same draw: what a case varies shows


def test_a_published_model() -> None:
    config = assert_published(MISTRAL_7B, 7_248_023_552)
    assert (config.head_dim, config.rope.theta, set(config.windows)) == (128, 1e6, {None})


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, {4096}),
        ({"sliding_window": None}, {None}),
        ({"sliding_window": 8, "num_key_value_heads": 2, "head_dim": 10}, {8}),
        ({"sliding_window": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}, {8}),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, {4096}),
    ],
)
def test_reads_as_transformers_does(changes: dict[str, Any], windows: set[int | None]) -> None:
    from transformers import MistralConfig

    config = assert_reads_as_transformers(SMALL | changes)
    theirs = MistralConfig(**SMALL | changes)
    assert set(config.windows) == windows == {theirs.sliding_window}
    assert config.num_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        ({"sliding_window": "8"}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"use_sliding_window": False}, "use_sliding_window=False"),
    ],
)
def test_anything_else_is_an_error_that_names_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(JaxDeltaError, match=named):
        config_from_dict(SMALL | changes)


def test_weights_round_trip(windowed: Path, tmp_path: Path) -> None:
    assert_weights_round_trip(windowed, tmp_path)


def test_end_to_end(windowed: Path, tmp_path: Path) -> None:
    assert_analysed(windowed, "mistral", tmp_path)
