"""The keys of a config.json that no family reads: without influence, neutral at one value, or unknown.

An unknown key is an error: one that is silently ignored lets a model compute something else than its
checkpoint. `ignored` is the way past, for whoever knows that a key has no influence.
"""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.families.values import listed, shown

_GENERATION = """assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config
    constraints continuous_batching_config decoder_start_token_id disable_compile diversity_penalty do_sample
    dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids
    forced_eos_token_id generation_config guidance_scale is_assistant length_penalty
    low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time min_length
    min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_return_sequences output_logits output_scores penalty_alpha
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind
    temperature token_healing top_h top_k top_p typical_p use_cache use_mtp watermarking_config"""
# Dropout is off, and losses are not computed, in a forward pass.
_TRAINING = """attention_dropout attention_probs_dropout_prob attn_pdrop aux_loss_alpha classifier_dropout
    dropout embd_pdrop embedding_dropout gradient_checkpointing hidden_dropout hidden_dropout_prob
    initializer_factor mlp_dropout neftune_noise_alpha output_router_logits resid_pdrop residual_dropout
    router_aux_loss_coef router_z_loss_coef seq_aux"""
_TOKENS = """bos_token_id cls_token_id eod_token_id eos_token_id mask_token_id pad_token_id sep_token_id
    tokenizer_class unk_token_id"""
# What transformers, its versions and heads, trainers, exporters and converters note down.
_METADATA = """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class
    _commit_hash _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
    _from_model_config _name_or_path _output_attentions architectures attn_implementation
    base_model_name_or_path chunk_size_feed_forward classifier_bias experts_implementation
    finetuning_task id2label is_decoder is_llama_config keys_to_ignore_at_inference label2id
    max_sequence_length model_max_length model_name mtp_num_hidden_layers name_or_path num_labels
    num_nextn_predict_layers output_attentions output_hidden_states output_past prefix problem_type
    return_dict sentence_transformers task_specific_params tf_legacy_loss tie_last_hidden_states torchscript
    transformers.js_config transformers_version trl_version use_bfloat16 use_flash_attn use_return_dict
    xla_device"""
# Keys without influence on a forward pass without cache, dropout and generation, whatever their value.
INERT_KEYS = frozenset(" ".join((_GENERATION, _TRAINING, _TOKENS, _METADATA)).split())
_INERT_PREFIX = "unsloth_"

# Keys of a computation that jaxdelta has in one form -> the values that mean it, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    # of attention
    "add_cross_attention": (False,),
    "attention_chunk_size": (),
    "attention_out_bias": (False,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "cross_attention_hidden_size": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "no_rope_layers": ([],),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    # of the stream and the logits
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "lm_head_bias": (False,),
    "logits_scaling": (1,),
    "pretraining_tp": (1,),
    "residual_multiplier": (1,),
    "tie_encoder_decoder": (False,),
    # of experts
    "first_k_dense_replace": (0,),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "topk_group": (1,),
    # of models within models, and of weights in other formats
    "quantization": ({},),
    "text_config": ({},),
    "vision_config": ({},),
}
# In transformers null is false here, and means attention to all positions.
_NOT_NULL = frozenset({"is_causal"})

# Keys of other families or programs that describe a model -> what they have to say, besides null.
STATED: dict[str, Callable[[ModelConfig], Any]] = {
    "attention_bias": lambda config: config.qkv_bias,
    "layer_types": lambda config: [
        "full_attention" if window is None else "sliding_attention" for window in config.windows
    ],
    "max_window_layers": lambda _: 0,
    "mlp_bias": lambda config: config.mlp_bias,
    "n_routed_experts": lambda config: _experts(config)[0],
    "norm_eps": lambda config: config.rms_norm_eps,
    "num_experts": lambda config: _experts(config)[0],
    "num_experts_per_tok": lambda config: _experts(config)[1],
    "num_layers": lambda config: config.num_layers,
    "num_local_experts": lambda config: _experts(config)[0],
    "qk_norm": lambda config: config.qk_norm is not None,
    "qkv_bias": lambda config: config.qkv_bias,
    "sliding_window": lambda config: next(filter(None, config.windows), None),
    "use_qk_norm": lambda config: config.qk_norm is not None,
    "use_qkv_bias": lambda config: config.qkv_bias,
    "use_sliding_window": lambda config: any(config.windows),
}


def _experts(config: ModelConfig) -> tuple[int, int]:
    return (config.experts.count, config.experts.per_token) if config.experts else (0, 0)


def is_known(key: str, read: Collection[str]) -> bool:
    """Whether a key may stand in a config.json of a family that reads the keys `read`."""
    return any(key in keys for keys in (read, INERT_KEYS, NEUTRAL, STATED)) or key.startswith(_INERT_PREFIX)


def unsupported(raw: Mapping[str, Any], read: Collection[str], config: ModelConfig) -> Iterator[str]:
    """A message for every key that the family does not read and that says something else than `config`."""
    silent = set(read)
    if not any(config.windows):
        silent.add("max_window_layers")
    if raw.get("use_sliding_window") is False:
        silent.add("sliding_window")
    for key, value in raw.items():
        if key in silent or (value is None and key not in _NOT_NULL):
            continue
        if key in NEUTRAL and value not in NEUTRAL[key]:
            yield f"{key}={shown(value)} (only {', '.join(map(repr, NEUTRAL[key])) or 'null'})"
        elif key in STATED and value != (wanted := STATED[key](config)):
            yield f"{key}={shown(value)} (it is {shown(wanted)} in the model that the other keys describe)"


def without(raw: Mapping[str, Any], ignored: Collection[str], read: Collection[str]) -> dict[str, Any]:
    """The contents of a file without the unknown keys `ignored`.

    Raises:
        UsageError: one of them is not in the file, or is known.
    """
    for key in ignored:
        if key not in raw:
            near = difflib.get_close_matches(key, raw, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"ignore_config_keys: config.json has no key {shown(key)}{hint}")
        if is_known(key, read):
            raise UsageError(
                f"ignore_config_keys: jaxdelta knows what {key}={shown(raw[key])} means; only unknown keys "
                "can be ignored"
            )
    return {key: value for key, value in raw.items() if key not in ignored}


def key_names(given: str | None) -> tuple[str, ...]:
    """The keys in the option ignore_config_keys, such as `a,b`.

    Raises:
        UsageError: a name is empty.
    """
    names = tuple(name.strip() for name in given.split(",")) if given is not None else ()
    if "" in names:
        raise UsageError(f"ignore_config_keys must be keys of config.json, such as a,b, not {shown(given)}")
    return tuple(dict.fromkeys(names))


def unknown_keys(where: str, unknown: Collection[str], advice: str = "") -> JaxDeltaError:
    """The error of unknown keys."""
    counted = "unknown key" if len(unknown) == 1 else f"{len(unknown)} unknown keys"
    return JaxDeltaError(
        f"{counted} in {where}: {listed(unknown)} "
        f"(a key that jaxdelta does not know may change what the model computes{advice})"
    )
