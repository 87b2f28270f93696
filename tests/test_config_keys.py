"""What a config.json may say: two statements that disagree, keys that change nothing, keys to be ignored."""

import importlib
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FLOAT8_SCHEME
from families import assert_equals_transformers
from test_config import SMALL, SMALL_EXPERTS, YARN

from jaxdelta.checkpoint.checkpoint import load_model, open_checkpoint
from jaxdelta.checkpoint.convert import convert
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.inert_keys import INERT_KEYS, NEUTRAL, STATED, key_names
from jaxdelta.model.families.quantisation import _FP8
from jaxdelta.model.families.registry import (
    MODULES,
    config_from_dict,
    config_to_dict,
    find_family,
    read_config,
)
from jaxdelta.model.families.rope_keys import _KNOWN as ROPE_BLOCK_KEYS
from jaxdelta.model.rotary import rotary_frequencies
from jaxdelta.run.analyze import analyze
from jaxdelta.run.options import Options

BASE = {name: SMALL | {"model_type": name} for name in MODULES} | {"qwen3_moe": SMALL_EXPERTS}
LINEAR = {"type": "linear", "factor": 2.0}
# As DeepSeek-R1-0528-Qwen3-8B: attn_factor is a key of YaRN's own code.
DEEPSEEK = {
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "rope_scaling": {
        "attn_factor": 0.8782488562869419,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_type": "yarn",
    },
}
# What the versions of transformers before 5 wrote into every config.json where it is not the default.
OLD_DUMP: dict[str, Any] = json.loads(
    """{"return_dict": true, "output_hidden_states": false, "output_attentions": false, "torchscript": false,
    "torch_dtype": "float32", "use_bfloat16": false, "tf_legacy_loss": false, "pruned_heads": {},
    "tie_word_embeddings": false, "chunk_size_feed_forward": 0, "is_encoder_decoder": false,
    "is_decoder": false, "cross_attention_hidden_size": null, "add_cross_attention": false,
    "tie_encoder_decoder": false, "max_length": 20, "min_length": 0, "do_sample": false,
    "early_stopping": false, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": null, "num_return_sequences": 1, "output_scores": false,
    "return_dict_in_generate": false, "forced_bos_token_id": null, "forced_eos_token_id": null,
    "remove_invalid_values": false, "exponential_decay_length_penalty": null, "suppress_tokens": null,
    "begin_suppress_tokens": null, "architectures": ["Qwen3ForCausalLM"], "finetuning_task": null,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": null, "prefix": null, "bos_token_id": 1, "pad_token_id": null, "eos_token_id": [2, 3],
    "sep_token_id": null, "decoder_start_token_id": null, "task_specific_params": null,
    "problem_type": null, "_name_or_path": "", "_attn_implementation_autoset": true,
    "transformers_version": "4.51.3", "use_cache": true, "hidden_act": "silu", "attention_dropout": 0.0}"""
)


def assert_as_transformers(raw: dict[str, Any]) -> ModelConfig:
    """Sizes, windows, experts and rotary frequencies are those of transformers; returns what is read."""
    from transformers import AutoConfig

    config, family = config_from_dict(raw), raw["model_type"]
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(modeling, type(theirs).__name__.removesuffix("Config") + "RotaryEmbedding")(theirs)
    wanted = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "rms_norm_eps": theirs.rms_norm_eps,
        "tie_embeddings": theirs.tie_word_embeddings,
        "qkv_bias": getattr(theirs, "attention_bias", False) or family == "qwen2",
        "windows": _windows(theirs),
    }
    assert {name: getattr(config, name) for name in wanted} == wanted
    if config.experts:
        found = (config.experts.count, config.experts.per_token, config.experts.renormalise)
        assert found == (theirs.num_experts, theirs.num_experts_per_tok, theirs.norm_topk_prob)
    frequencies = rotary_frequencies(config.rope, config.head_dim)
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-5)
    assert config.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    return config


def _windows(theirs: Any) -> tuple[int | None, ...]:
    layers, window = theirs.num_hidden_layers, getattr(theirs, "sliding_window", None)
    if theirs.model_type in ("qwen2", "qwen3"):
        return tuple(window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    return ((None if theirs.model_type == "llama" else window),) * layers


def refusal(raw: dict[str, Any], ignored: tuple[str, ...] = ()) -> str:
    with pytest.raises(JaxDeltaError) as caught:
        config_from_dict(raw, ignored)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        # transformers computes theta 10,000: the second block counts, and has none.
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_scaling": LINEAR},
            ["rope_scaling={'factor': 2.0, 'type': 'linear'}", "rope_parameters={'rope_theta': 1000000.0"],
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
            ["rope_scaling={'rope_type': 'default'}", "rope_parameters={'rope_theta': 1000000.0}"],
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 8.0}},
            ["rope_scaling={'factor': 8.0", "rope_parameters={'factor': 4.0"],
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            ["rope_theta=10000.0", "rope_parameters.rope_theta=1000000.0"],
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
            ["original_max_position_embeddings=4096", "rope_scaling.original_max_position_embeddings=64"],
        ),
        (
            {"rope_scaling": YARN | {"type": "linear"}},
            ["rope_scaling.rope_type='yarn'", "rope_scaling.type='linear'"],
        ),
        (
            {"partial_rotary_factor": 1.0, "rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
            ["partial_rotary_factor=1.0", "rope_scaling.partial_rotary_factor=0.5"],
        ),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, ["dtype='bfloat16'", "torch_dtype='float32'"]),
        ({"dtype": "float64", "torch_dtype": "float32"}, ["dtype='float64'", "torch_dtype='float32'"]),
        (
            {"quantization_config": FLOAT8_SCHEME | {"ignored_layers": [], "modules_to_not_convert": ["x"]}},
            ["modules_to_not_convert=['x']", "ignored_layers=[]"],
        ),
    ],
)
def test_statements_that_disagree_are_shown(changes: dict[str, Any], both: list[str]) -> None:
    message = refusal(SMALL | changes)
    assert message.endswith("disagree; remove the wrong one")
    assert [part for part in both if part not in message] == []


def test_numbers_of_experts_that_disagree() -> None:
    message = refusal(SMALL_EXPERTS | {"num_experts": 8, "num_local_experts": 4})
    assert message == "num_experts=8 and num_local_experts=4 disagree; remove the wrong one"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
        {"rope_parameters": YARN, "rope_scaling": YARN},
        {"rope_parameters": YARN, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}
        | {"rope_theta": 5e5},
        {"rope_parameters": YARN, "rope_scaling": {}},
        {"rope_parameters": YARN, "rope_scaling": None},
        {"rope_scaling": YARN | {"type": "yarn"}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 96},
        {"rope_scaling": YARN, "partial_rotary_factor": 1},
        {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        {"dtype": "half", "torch_dtype": "float16"},
        {"dtype": None, "torch_dtype": "bfloat16"},
    ],
)
@pytest.mark.parametrize("family", MODULES)
def test_statements_that_agree(family: str, changes: dict[str, Any]) -> None:
    assert_as_transformers(BASE[family] | changes)


def test_dtypes_that_only_the_weights_tell() -> None:
    for name in ("auto", "float64", "double", "torch.float64", None):
        assert config_from_dict(SMALL | {"torch_dtype": name}).dtype == "float32"
    assert config_from_dict(SMALL | {"dtype": "auto", "torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert "dtype='int8' (only" in refusal(SMALL | {"dtype": "int8"})
    assert "dtype=" in refusal(SMALL | {"dtype": ["float32"]})


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"attn_factor": 0.878, "finetuned": True, "rope_type": "yarn", "factor": 4.0}, "attn_factor=0.878"),
        (YARN | {"low_freq_factor": 1.0}, "low_freq_factor=1.0, which rope_type yarn does not read"),
        (LINEAR | {"beta_fast": 32, "attention_factor": 2.0}, "beta_fast=32, attention_factor=2.0, which"),
        ({"rope_type": "default", "factor": 4.0}, "factor=4.0"),
        ({"factor": 4.0, "mscale": 1.0, "truncate": False, "finetuned": True}, "and 1 more, which"),
    ],
)
@pytest.mark.parametrize("family", MODULES)
def test_keys_that_a_rope_type_does_not_read(family: str, rope: dict[str, Any], named: str) -> None:
    config = assert_as_transformers(BASE[family] | {"rope_scaling": rope})
    assert len(config.notes) == 1
    assert config.notes[0].startswith("config.json: rope_scaling has ") and named in config.notes[0]
    assert len(config.notes[0]) < 300


def test_attn_factor_of_deepseek_is_computed_as_in_transformers() -> None:
    config = assert_as_transformers(SMALL | DEEPSEEK)
    assert config.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert config.notes == (
        "config.json: rope_scaling has attn_factor=0.8782488562869419, which rope_type yarn does not read in "
        "transformers",
    )


def test_a_forward_pass_with_keys_that_change_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers computes from the same file, with all of its keys."""
    rope = YARN | {"attn_factor": 0.878, "finetuned": True, "factor": None}
    sizes = {"max_position_embeddings": 256, "num_hidden_layers": 2, "tie_word_embeddings": False}
    file = make_checkpoint(tmp_path, **sizes, rope_parameters=rope) / "config.json"
    changes = OLD_DUMP | NEUTRAL_ANYWHERE | {"num_layers": 2, "use_qk_norm": True, "qkv_bias": False}
    del changes["quantization_config"]  # transformers cannot load with an empty one
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert_equals_transformers(tmp_path)


@pytest.mark.parametrize("key", ["mrope_section", "short_factor", "alpha"])
def test_other_keys_of_rope_are_refused(key: str) -> None:
    assert f"unknown key in rope_scaling: {key} (" in refusal(SMALL | {"rope_scaling": YARN | {key: [1]}})


@pytest.mark.parametrize(
    "changes", [{"factor": None}, {"factor": None, "mscale": 0.7, "mscale_all_dim": 1.0}]
)
def test_a_null_factor_is_the_ratio_of_the_ranges(changes: dict[str, Any]) -> None:
    config = assert_as_transformers(SMALL | {"max_position_embeddings": 512, "rope_scaling": YARN | changes})
    assert config.rope.factor == 8.0
    for other in (LINEAR | {"factor": None}, {"rope_type": "yarn"}):
        assert "needs a factor" in refusal(SMALL | {"rope_scaling": other})


def test_a_null_truncate_is_false() -> None:
    assert not assert_as_transformers(SMALL | {"rope_scaling": YARN | {"truncate": None}}).rope.truncate


@pytest.mark.parametrize("family", MODULES)
def test_whole_dumps_pass(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    raw = BASE[family]
    wanted = config_from_dict(raw)
    assert assert_as_transformers(raw | OLD_DUMP) == wanted
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    assert config_from_dict(json.loads(json.dumps(theirs.to_dict()))) == wanted
    generation = json.loads(json.dumps(GenerationConfig().to_dict()))
    assert config_from_dict(raw | generation) == wanted
    odd = dict.fromkeys(generation, 0.7) | {"temperature": 0.0, "top_k": -1, "bad_words_ids": [[1]]}
    assert config_from_dict(raw | odd) == wanted


@pytest.mark.parametrize("family", MODULES)
def test_metadata_passes_at_any_value(family: str) -> None:
    raw = BASE[family] | {key: {"any": [1]} for key in INERT_KEYS}
    raw |= {
        "sentence_transformers": {"version": "5.1.0"},
        "transformers.js_config": {"dtype": "q4"},
        "attn_implementation": "flash_attention_2",
        "_attn_implementation_internal": "sdpa",
        "model_name": "x",
        "num_labels": 3,
        "unsloth_fixed": True,
        "unsloth_lately_added": 1,
        "is_decoder": True,
        "classifier_dropout": 0.1,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    assert config_from_dict(raw) == config_from_dict(BASE[family])


NEUTRAL_ANYWHERE = {
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "shared_expert_intermediate_size": 0,
    "pretraining_tp": 1,
    "quantization_config": {},
    "is_causal": True,
    "attention_chunk_size": None,
    "use_mrope": False,
    "rope_interleaved": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "text_config": None,
    "hidden_activation": "silu",
    "final_logit_softcapping": None,
    "num_layers": 4,
}


@pytest.mark.parametrize("family", MODULES)
def test_neutral_values_pass(family: str) -> None:
    wanted = config_from_dict(BASE[family])
    windowed = family == "mistral"
    stated = {
        "qkv_bias": family == "qwen2",
        "attention_bias": family == "qwen2",
        "use_qk_norm": family.startswith("qwen3"),
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * 4,
        "use_sliding_window": windowed,
    }
    if family != "qwen3_moe":
        stated |= {"num_experts": 0, "num_experts_per_tok": 0}
    assert assert_as_transformers(BASE[family] | NEUTRAL_ANYWHERE | stated) == wanted
    for key, values in NEUTRAL.items():
        for value in values:
            assert config_from_dict(BASE[family] | {key: value}) == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": False},
        {"is_causal": None},
        {"use_bidirectional_attention": True},
        {"use_bidirectional_attention": "all"},
        {"dual_chunk_attention_config": {"chunk_size": 8}},
        {"auto_map": {"AutoConfig": "configuration.Config"}},
        {"attention_chunk_size": 8192},
        {"shared_expert_intermediate_size": 8},
        {"use_qk_norm": "sometimes"},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"pruned_heads": {"0": [1]}},
        {"hidden_act": "gelu"},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"text_config": {"hidden_size": 48}},
        {"quantization": {"bits": 4}},
        {"routed_scaling_factor": 2.5},
        {"num_layers": 5},
        {"final_logit_softcapping": 30.0},
    ],
    ids=lambda changes: json.dumps(changes),
)
@pytest.mark.parametrize("family", MODULES)
def test_other_values_are_refused_by_name(family: str, changes: dict[str, Any]) -> None:
    if family == "llama" and "mlp_bias" in changes:
        assert config_from_dict(BASE[family] | changes).mlp_bias  # the one family that has it
        return
    message = refusal(BASE[family] | changes)
    assert next(iter(changes)) in message


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"attention_bias": False}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen2", {"use_qk_norm": True}),
        ("qwen3", {"use_qk_norm": False}),
        ("qwen3", {"qkv_bias": True}),
        ("qwen3", {"num_experts": 8}),
        ("llama", {"sliding_window": 8}),
        ("llama", {"use_sliding_window": True}),
        ("mistral", {"use_sliding_window": False}),
        ("mistral", {"layer_types": ["full_attention"] * 4}),
        ("mistral", {"max_window_layers": 2}),
    ],
)
def test_statements_about_another_model_are_refused(family: str, changes: dict[str, Any]) -> None:
    key, value = next(iter(changes.items()))
    assert f"{key}={value!r} (it is " in refusal(BASE[family] | changes)


def test_a_window_that_is_switched_off_states_nothing() -> None:
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    assert assert_as_transformers(BASE["llama"] | off).windows == (None,) * 4


@pytest.mark.parametrize("value", [False, None])
def test_why_a_null_is_causal_is_refused(value: bool | None) -> None:
    """transformers attends to later tokens then."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def logits(**changes: Any) -> Any:
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, attn_implementation="eager", **changes))
        with torch.no_grad():
            return model(torch.arange(8)[None]).logits

    assert torch.equal(logits(is_causal=True), logits())
    assert not torch.allclose(logits(is_causal=value), logits())


@pytest.mark.parametrize(
    ("scheme", "block"),
    [
        ({}, None),
        (None, None),
        (FLOAT8_SCHEME, (128, 128)),
        (FLOAT8_SCHEME | {"scale_fmt": "ue8m0"}, (128, 128)),
        (FLOAT8_SCHEME | {"scale_fmt": "float", "kv_cache_scheme": None, "fmt": None}, (128, 128)),
        (FLOAT8_SCHEME | {"ignored_layers": ["lm_head"]}, (128, 128)),
        (FLOAT8_SCHEME | {"ignored_layers": ["a"], "modules_to_not_convert": ["a"]}, (128, 128)),
        (FLOAT8_SCHEME | {"weight_block_size": [64, 32], "dequantize": False}, (64, 32)),
    ],
)
def test_quantization_that_is_read(scheme: dict[str, Any] | None, block: tuple[int, int] | None) -> None:
    assert config_from_dict(SMALL | {"quantization_config": scheme}).weight_block == block


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantization_config"),
        ({"quant_method": None}, "quantization_config"),
        ({"quant_method": ["fp8"]}, "quantization_config"),
        ({"fmt": {"e4m3": 1}}, "quantization_config"),
        ({"ignored_layers": "lm_head"}, "modules_to_not_convert must be a list of names"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert must be a list of names"),
        ({"dequantize": 1}, "dequantize must be true or false"),
        ({"twist": 1}, "unknown key twist"),
    ],
)
def test_other_quantization_is_refused(changes: dict[str, Any], named: str) -> None:
    assert named in refusal(SMALL | {"quantization_config": FLOAT8_SCHEME | changes})


def test_unknown_keys_are_counted_and_can_be_ignored() -> None:
    odd = {"twist": 1, "bend": {"x": 2}, "auto_map": {}, "zeal": 0, "\ud800": 1}
    message = refusal(SMALL | odd)
    assert message.startswith("5 unknown keys in config.json: auto_map, bend, twist and 2 more (")
    assert "--ignore_config_keys=auto_map,bend,twist" in message
    assert refusal(SMALL | {"twist": 1}).startswith("unknown key in config.json: twist (")
    assert refusal(SMALL | odd, ("twist", "zeal")).startswith(
        "3 unknown keys in config.json: auto_map, bend, "
    )
    refusal(SMALL | {"\ud800\n": 1}).encode()
    config = config_from_dict(SMALL | odd, tuple(odd))
    assert config == config_from_dict(SMALL)
    assert config.notes == (
        "config.json: 5 unknown keys are ignored: twist, bend, auto_map and 2 more (--ignore_config_keys)",
    )


@pytest.mark.parametrize(
    ("ignored", "problem"),
    [
        (("twits",), "config.json has no key 'twits'; did you mean twist?"),
        (("hidden_size",), "jaxdelta knows what hidden_size=48 means"),
        (("is_causal",), "jaxdelta knows what is_causal=False means"),
        (("temperature",), "config.json has no key 'temperature'"),
    ],
)
def test_keys_that_cannot_be_ignored(ignored: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"ignore_config_keys: {problem}")):
        config_from_dict(SMALL | {"twist": 1, "is_causal": False}, ignored)


def test_the_option_names_keys() -> None:
    assert key_names(None) == ()
    assert key_names("a, b,a") == ("a", "b")
    for wrong in ("", "a,,b", ","):
        with pytest.raises(UsageError, match="ignore_config_keys must be keys"):
            Options(ignore_config_keys=wrong)


def test_a_checkpoint_with_keys_to_ignore(small: Path, tmp_path: Path) -> None:
    file = small / "config.json"
    raw = json.loads(file.read_text())
    raw["rope_parameters"] |= {"attn_factor": 2.0}
    file.write_text(json.dumps(raw | {"twist": 1, "bend": 2, "quantization_config": {}}))
    with pytest.raises(JaxDeltaError, match=f"{re.escape(str(file))}: 2 unknown keys in config.json"):
        load_model(small)
    with pytest.raises(UsageError, match="did you mean twist"):
        load_model(small, ignore_config_keys="twists")
    for loader in ("torch", "safetensors"):
        checkpoint = open_checkpoint(str(small), loader=loader, ignore_config_keys="twist,bend")
        rope, ignored = checkpoint.notes
        assert "attn_factor=2.0, which rope_type default does not read" in rope
        assert ignored == "config.json: 2 unknown keys are ignored: twist, bend (--ignore_config_keys)"
    convert(str(small), tmp_path / "orbax", ignore_config_keys="twist,bend")
    assert open_checkpoint(str(tmp_path / "orbax")).config == checkpoint.config
    said: list[str] = []
    few = {"top_k": 2, "max_tokens": 40, "bootstrap": 0, "null_draws": 0, "views": "none"}
    run = analyze(small, ["one two"] * 9, ignore_config_keys="twist,bend", listener=said.append, **few)
    assert run.run["flags"]["ignore_config_keys"] == "twist,bend"
    assert run.run["notes"] == [rope, ignored]
    assert f" note: {ignored}" in said


def test_the_dtype_is_that_of_the_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path, num_hidden_layers=1, dtype="bfloat16") / "config.json"
    for stated in ("float64", "auto", "float32"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": stated}))
        assert open_checkpoint(str(tmp_path)).config.dtype == "bfloat16"
        assert str(load_model(tmp_path).embed_tokens.weight[...].dtype) == "bfloat16"


def test_the_torch_loader_reads_the_file_and_not_what_transformers_makes_of_it(small: Path) -> None:
    file = small / "config.json"
    raw = json.loads(file.read_text()) | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": LINEAR}
    file.write_text(json.dumps(raw))
    with pytest.raises(JaxDeltaError, match=r"rope_scaling=.* and rope_parameters=.* disagree"):
        open_checkpoint(str(small), loader="torch")


PLAIN = json.dumps(SMALL)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"\xef\xbb\xbf" + PLAIN.encode(), None),
        (PLAIN[:-1] + ', "head_dim": 16}', None),
        (PLAIN[:-1] + ', "head_dim": 8}', "head_dim=16 and a second head_dim=8 disagree"),
        (
            PLAIN[:-1] + ', "rope_scaling": {"type": "linear", "factor": 2, "factor": 4}}',
            "factor=2 and a second factor=4 disagree",
        ),
        (PLAIN.encode("utf-16"), "is not JSON"),
        (PLAIN.replace("qwen3", "qwen3\xff").encode("latin-1"), "is not JSON"),
        (PLAIN[:-1] + ', "architectures": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        (PLAIN[:-1] + ', "x": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
        (PLAIN.replace("256", "1" + "0" * 5000), "is not JSON"),
        (PLAIN.replace("256", "1" + "0" * 400), "vocab_size must be at most"),
        (PLAIN.replace("256", "1e400"), "vocab_size must be a positive integer, not inf"),
        (PLAIN[:-1] + ', "rms_norm_eps": NaN}', "rms_norm_eps must be a positive number, not nan"),
        ("\x00", "is not JSON"),
        ("{}", "model_type is None"),
    ],
    ids=lambda value: None if value is None else str(value)[-24:],
)
def test_files(text: str | bytes, problem: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if problem is None:
        assert read_config(file) == config_from_dict(SMALL)
        return
    with pytest.raises(JaxDeltaError, match=problem) as caught:
        read_config(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**18},
        {"vocab_size": 10**18},
        {"num_experts": 10**6},
        {"hidden_size": 10**12},
    ],
)
def test_sizes_that_no_model_has(changes: dict[str, int]) -> None:
    assert next(iter(changes)).removeprefix("num_") in refusal(SMALL_EXPERTS | changes)


# Values of every JSON type, and of keys the values that they may have.
HOSTILE: list[Any] = json.loads(
    """[null, true, false, 0, 1, -1, 2, 8, 1000000000000000000, 1e400, -1e400, NaN, 0.5, 1.0, 1e-320, -0.0,
    "", "4", "yarn", "silu", "auto", [], [1], [[]], [null], {}, {"a": 1}, {"a": {"b": 1}}]"""
)
HOSTILE += [10**400, "x" * 10_000, "\ud800", {"rope_type": "yarn"}]
USUAL: dict[str, list[Any]] = {
    "head_dim": [8, 16, 15],
    "num_key_value_heads": [1, 4, 3],
    "rope_theta": [1e4, 1e6, 1],
    "factor": [1, 4.0, 0.5, None],
    "rope_type": ["default", "linear", "yarn", "llama3", "dynamic"],
    "type": ["default", "linear", "yarn", "llama3"],
    "original_max_position_embeddings": [64, 4096],
    "max_position_embeddings": [64, 40960],
    "use_sliding_window": [True, False],
    "sliding_window": [8, 4096, None],
    "max_window_layers": [0, 2, 28],
    "layer_types": [["full_attention"] * 4, ["sliding_attention", "full_attention"] * 2],
    "num_experts": [0, 4, 8],
    "num_local_experts": [4, 8],
    "mlp_only_layers": [[], [0], [1, 9]],
    "dtype": ["float32", "bfloat16", "float64"],
    "torch_dtype": ["float32", "bfloat16", "half"],
    "low_freq_factor": [1.0, 2],
    "high_freq_factor": [4.0],
    "mscale": [1.0, 0.707, 0],
    "truncate": [True, False, None],
    "partial_rotary_factor": [1.0, 0.5, None],
    "quantization_config": [{}, FLOAT8_SCHEME],
}


def draw(source: random.Random) -> dict[str, Any]:
    """A config.json with values of any type at a few keys that jaxdelta knows."""

    def value(key: str) -> Any:
        return source.choice(USUAL[key] if key in USUAL and source.random() < 0.7 else HOSTILE)

    def block() -> Any:
        if source.random() < 0.1:
            return source.choice(HOSTILE)
        keys = source.sample([*sorted(ROPE_BLOCK_KEYS), "mrope_section"], source.randint(0, 3))
        usual = {"rope_type": source.choice(["linear", "yarn", "llama3", "default"]), "factor": 2.0}
        return (usual if source.random() < 0.9 else {}) | {key: value(key) for key in keys}

    def scheme() -> Any:
        keys = source.sample([*_FP8, "ignored_layers"], 2)
        return FLOAT8_SCHEME | {key: value(key) for key in keys}

    raw = dict(BASE[source.choice(list(BASE))])
    read = sorted(find_family(raw["model_type"]).read_keys - {"rope_scaling", "rope_parameters"})
    for key in source.sample(read, source.randint(0, 3)):
        raw[key] = value(key)
    for key in ("rope_scaling", "rope_parameters"):
        if source.random() < 0.4:
            raw[key] = block()
    if source.random() < 0.2:
        raw["quantization_config"] = scheme()
    for key in source.sample([*sorted(NEUTRAL), *sorted(STATED), "top_k"], source.randint(0, 1)):
        raw[key] = value(key)
    return raw


def test_values_of_every_type() -> None:
    """Drawn configurations are read as transformers reads them, or refused in a line, and nothing else."""
    source, compared = random.Random(20), 0
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    for index in range(2000):
        raw = draw(source)
        try:
            config = config_from_dict(raw)
        except JaxDeltaError as error:
            assert "\n" not in str(error) and len(str(error)) < 800
            str(error).encode()
            continue
        written = json.loads(json.dumps(config_to_dict(config), allow_nan=False))
        assert config_from_dict(written | {"quantization_config": raw.get("quantization_config")}) == config
        if index % 3 == 0 and _transformers_reads(raw):
            assert_as_transformers(raw)
            compared += 1
    assert compared > 50


def _transformers_reads(raw: dict[str, Any]) -> bool:
    """It is stricter: about null in places, integers for floats, and labels."""
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    except Exception:
        return False
    needed = [theirs.rope_parameters["rope_theta"], theirs.rope_parameters.get("partial_rotary_factor", 1)]
    needed += [getattr(theirs, key, 1) for key in ("head_dim", "num_experts")]
    return None not in needed
