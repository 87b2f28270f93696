"""config.json: published models, both spellings, and an error for everything else."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FLOAT8_SCHEME

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import Experts, Rope
from jaxdelta.model.decoder import count_parameters
from jaxdelta.model.families.registry import config_from_dict, config_to_dict, read_config

# What the published files have in common, and then each by its own.
PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SIZE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_window_layers",
    "num_attention_heads",
    "tie_word_embeddings",
)
SIZES = {
    "0.6B": ((1024, 3072, 28, 28, 16, True), 596_049_920),
    "1.7B": ((2048, 6144, 28, 28, 16, True), 1_720_574_976),
    "4B": ((2560, 9728, 36, 36, 32, True), 4_022_468_096),
    "8B": ((4096, 12288, 36, 36, 32, False), 8_190_735_360),
    "14B": ((5120, 17408, 40, 40, 40, False), 14_768_307_200),
    "32B": ((5120, 25600, 64, 64, 64, False), 32_762_123_264),
}
# Of experts: hidden, layers, heads, experts' size.
EXPERT_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size")
EXPERT_SIZES = {
    "30B-A3B": ((2048, 48, 32, 768), 30_532_122_624),
    "235B-A22B": ((4096, 94, 64, 1536), 235_093_634_560),
}
PUBLISHED_EXPERTS = PUBLISHED | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}

SMALL: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL_EXPERTS = SMALL | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}


def published(size: str) -> dict[str, Any]:
    if size in EXPERT_SIZES:
        return PUBLISHED_EXPERTS | dict(zip(EXPERT_KEYS, EXPERT_SIZES[size][0], strict=True))
    return PUBLISHED | dict(zip(SIZE_KEYS, SIZES[size][0], strict=True))


@pytest.mark.parametrize("size", [*SIZES, *EXPERT_SIZES])
def test_published_sizes(size: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_from_dict(published(size))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published(size)))
    count = count_parameters(config)
    assert count == (SIZES | EXPERT_SIZES)[size][1]
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    assert config.rope == Rope(theta=1e6)
    assert config.windows == (None,) * config.num_layers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True, "moe_intermediate_size": 24, "mlp_only_layers": [1, 7]},
        {"decoder_sparse_step": 3, "rope_parameters": YARN, "dtype": "bfloat16"},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "attention_bias": True, "num_experts": 128, "num_experts_per_tok": 8},
        {"num_experts": None, "num_local_experts": 5, "router_aux_loss_coef": 0.1},
        {"head_dim": None},
    ],
)
def test_experts_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    given = {key: value for key, value in (SMALL_EXPERTS | changes).items() if value is not None}
    config = config_from_dict(given)
    theirs = Qwen3MoeConfig(**given)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert config_from_dict(theirs.to_dict()) == config
    assert config_from_dict(Qwen3MoeConfig(**config_to_dict(config)).to_dict()) == config
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json") == config
    assert config.experts is not None
    assert (config.experts.count, config.experts.per_token) == (
        theirs.num_experts,
        theirs.num_experts_per_tok,
    )
    assert config.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert set(config.windows) == {theirs.sliding_window}


def test_defaults_of_experts() -> None:
    from transformers import Qwen3MoeConfig

    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = config_from_dict({"model_type": "qwen3_moe", **sizes})
    assert config == config_from_dict(Qwen3MoeConfig(**sizes).to_dict())
    assert config.experts == Experts(128, 8, 768, False, (0, 1, 2, 3))
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (8, 4, 6144)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 3}, [2]),
        ({"mlp_only_layers": [0, 2]}, [1, 3]),
        ({"mlp_only_layers": [1, 9], "decoder_sparse_step": 2}, [3]),
        ({"mlp_only_layers": [0, 1, 2, 3]}, []),
        ({"decoder_sparse_step": 5}, []),
        ({"num_experts": 0}, []),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], sparse: list[int]) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = config_from_dict(SMALL_EXPERTS | changes)
    with torch.device("meta"):
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL_EXPERTS | changes))
    assert [i for i in range(4) if config.is_sparse(i)] == sparse
    assert [i for i, layer in enumerate(theirs.model.layers) if hasattr(layer.mlp, "gate")] == sparse
    assert config.layers_of(sparse=True) == tuple(sparse)
    assert sorted((*sparse, *config.layers_of(sparse=False))) == [0, 1, 2, 3]
    # Without any, it is a dense model.
    assert (config.experts is None) == (config_to_dict(config)["model_type"] == "qwen3") == (not sparse)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"num_experts": -1}, "num_experts must be"),
        ({"num_experts": None, "num_local_experts": "8"}, "num_local_experts must be"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of integers, not 3"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types=.*it is"),
        ({"shared_expert_intermediate_size": 64}, r"shared_expert_intermediate_size=64 \(only 0\)"),
    ],
)
def test_impossible_experts(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(JaxDeltaError, match=named) as caught:
        config_from_dict(SMALL_EXPERTS | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "dtype": "bfloat16", "rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0}},
        {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16, "mscale": 2, "mscale_all_dim": 1}},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ],
)
def test_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import Qwen3Config

    config = config_from_dict(SMALL | changes)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    theirs = Qwen3Config(**config_to_dict(config))
    assert config_to_dict(config).items() <= theirs.to_dict().items()
    assert config_from_dict(theirs.to_dict()) == config
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_theta": 2e6, "rope_parameters": {"rope_type": "default"}},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"num_key_value_heads": None},
        {"torch_dtype": "float16"},
    ],
)
def test_reads_as_transformers_does(changes: dict[str, Any]) -> None:
    from transformers import Qwen3Config

    ours = config_from_dict(SMALL | changes)
    theirs = Qwen3Config(**json.loads(json.dumps(SMALL | changes)))
    assert config_from_dict(theirs.to_dict()) == ours
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    windowed = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert [window is not None for window in ours.windows] == windowed
    assert {window for window in ours.windows if window} <= {theirs.sliding_window}


def test_a_config_saved_by_transformers(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = read_config(make_checkpoint(tmp_path, dtype="bfloat16") / "config.json")
    wanted = config_from_dict(SMALL | {"max_position_embeddings": 512, "dtype": "bfloat16"})
    assert config == dataclasses.replace(wanted, rope=Rope())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": ["qwen3"]}, "qwen3"),
        ({"model_type": None}, "None"),
        ({"is_causal": False}, "is_causal"),
        ({"num_experts": 8, "mlp_bias": True}, "num_experts=8 .*; mlp_bias=True"),
        ({"quantization_config": FLOAT8_SCHEME | {"quant_method": "gptq"}}, "quantization_config: gptq"),
        ({"quantization_config": FLOAT8_SCHEME | {"fmt": "e5m2"}}, "fp8: fmt='e5m2'"),
        ({"quantization_config": FLOAT8_SCHEME | {"weight_block_size": [128]}}, "a block of"),
        ({"quantization_config": FLOAT8_SCHEME | {"weight_block_size": [128, 0]}}, "a block of"),
        ({"quantization_config": FLOAT8_SCHEME | {"twist": 1}}, "unknown key twist"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_attention_heads": 4.0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"head_dim": True}, "head_dim"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"use_sliding_window": "no"}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": 4}, "layer_types"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling.*'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type='llama3'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": YARN | {"factor": "4"}}, "factor"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 64.5}}, "original_max_position"),
        ({"rope_parameters": YARN | {"attention_factor": [1]}}, "attention_factor"),
        ({"rope_parameters": YARN | {"mscale": "x", "mscale_all_dim": 1}}, "mscale"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)
def test_anything_else_is_an_error_that_names_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(JaxDeltaError, match=named) as caught:
        config_from_dict(SMALL | changes)
    assert "\n" not in str(caught.value)


def test_all_unsupported_values_are_told_at_once() -> None:
    changes = {"hidden_act": "relu", "num_key_value_heads": 3, "head_dim": 7}
    with pytest.raises(JaxDeltaError, match=r"hidden_act='relu'.*3 key/value.*head_dim=7"):
        config_from_dict(SMALL | changes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        (b"", "is not JSON"),
        (b'{"model_type": "qwen3"', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"model_type": "gpt2"}', "'gpt2'"),
    ],
)
def test_a_bad_file_is_named(text: bytes | None, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(JaxDeltaError, match=problem) as caught:
        read_config(file)
    assert str(caught.value).startswith(f"{file}: ")
