"""Checkpoints as people bring them, drawn at random: configurations, names, files, keys that do not belong.

Sizes are fixed, so that operations compile once. `Example.write` makes the directory; `truth` is
transformers' own model of the same config.json with the weights it was made from.
"""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from conftest import EXPERTS, TINY, torch_model, write_tokenizer
from hypothesis import strategies as st

FAMILIES = ("qwen3", "qwen3_moe", "llama", "mistral", "qwen2")
SIZES = {"num_hidden_layers": 2, "vocab_size": 128}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    YARN,
    YARN | {"attention_factor": 1.2},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    YARN | {"truncate": False},
    YARN | {"attn_factor": 0.8},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    LLAMA3,
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    {"rope_type": "default", "mrope_section": [2, 3, 3]},
)
# Keys without influence at these values, in any family.
INERT: tuple[tuple[str, Any], ...] = (
    ("use_cache", False),
    ("temperature", 0.6),
    ("num_beams", 4),
    ("do_sample", True),
    ("_name_or_path", "somewhere/else"),
    ("transformers_version", "4.51.0"),
    ("pretraining_tp", 1),
    ("mlp_bias", False),
    ("partial_rotary_factor", 1.0),
    ("quantization_config", {}),
    ("attention_dropout", 0.1),
    ("torchscript", False),
    ("problem_type", None),
    ("id2label", {"0": "LABEL_0"}),
    ("use_sliding_window", False),
)
# Keys that change the model in some family, are unknown, or have impossible values.
DOUBTFUL: tuple[tuple[str, Any], ...] = (
    ("rms_norm_eps", 1e-3),
    ("rope_theta", 5_000.0),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("qkv_bias", True),
    ("hidden_act", "gelu"),
    ("partial_rotary_factor", 0.5),
    ("is_causal", False),
    ("use_bidirectional_attention", True),
    ("auto_map", {"AutoModel": "modeling.Model"}),
    ("dual_chunk_attention_config", {"chunk_size": 8}),
    ("sliding_window", 5),
    ("use_sliding_window", True),
    ("layer_types", ["sliding_attention", "full_attention"]),
    ("max_window_layers", 1),
    ("head_dim", None),
    ("head_dim", 12),
    ("num_key_value_heads", None),
    ("num_attention_heads", 2),
    ("tie_word_embeddings", True),
    ("dtype", "bfloat16"),
    ("torch_dtype", "float64"),
    ("intermediate_size", 79),
    ("logit_scale", 0.5),
    ("final_logit_softcapping", 30.0),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("vocab_size", "128"),
    ("hidden_size", 48.0),
    ("num_experts_per_tok", 3),
    ("norm_topk_prob", False),
    ("shared_expert_intermediate_size", 16),
    ("mystery", 1),
)
PREFIXES = ("", "_orig_mod.", "module.", "base_model.model.", "_orig_mod.module.")
# Tensors that no layer needs, and tensors that change what a layer computes: name -> shape.
LEFTOVERS: dict[str, tuple[int, ...]] = {
    "score.weight": (2, 48),
    "v_head.summary.weight": (1, 48),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
}
INTRUDERS: dict[str, tuple[int, ...]] = {
    "model.layers.1.self_attn.sinks": (4,),
    "model.layers.1.post_feedforward_layernorm.weight": (48,),
    "model.layers.2.input_layernorm.weight": (48,),
    "model.embed_positions.weight": (512, 48),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A checkpoint to be written.

    `stated`: the scaling under transformers 5's key (new), the earlier one (old), or both with different
    factors. `bare`: names without `model.`. `doubled`: one tensor under two names. `plain`: nothing about it
    may be refused.
    """

    family: str
    tied: bool
    scaling: dict[str, Any]
    stated: str
    keys: tuple[tuple[str, Any], ...]
    prefix: str
    bare: bool
    dtype: str
    shards: int
    extra: tuple[str, ...]
    doubled: bool
    plain: bool

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        config = dict(_base(self.family, self.tied)[0])
        theta = config.pop("rope_parameters")["rope_theta"]
        old = {"rope_theta": theta, "rope_scaling": None if _unscaled(self.scaling) else self.scaling}
        new = {"rope_parameters": {"rope_theta": theta, **self.scaling}}
        config |= {"new": new, "old": old, "both": new | {"rope_scaling": self.scaling | {"factor": 3.0}}}[
            self.stated
        ]
        return config | {"dtype": self.dtype} | dict(self.keys)

    def tensors(self) -> dict[str, Any]:
        """The tensors that the model has, by transformers' names."""
        import torch

        dtype = getattr(torch, self.dtype)
        return {name: tensor.to(dtype) for name, tensor in _base(self.family, self.tied)[1].items()}

    def write(self, directory: Path) -> Path:
        """Writes config.json, tokenizer.json and the weights."""
        import torch
        from safetensors.torch import save_file

        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.config))
        generator = torch.Generator().manual_seed(0)
        more = {name: (LEFTOVERS | INTRUDERS)[name] for name in self.extra}
        tensors = self.tensors() | {
            name: torch.rand(shape, generator=generator) for name, shape in more.items()
        }
        tensors = {self._stored(name): tensor for name, tensor in tensors.items()}
        if self.doubled:
            name = self._stored("model.layers.1.input_layernorm.weight")
            other = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
            tensors[other] = tensors[name] + 1
        names = sorted(tensors)
        files = {name: f"model-{i % self.shards}.safetensors" for i, name in enumerate(names)}
        if self.shards == 1:
            files = dict.fromkeys(names, "model.safetensors")
        else:
            index = {"metadata": {}, "weight_map": files}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        for file in set(files.values()):
            part = {name: tensors[name].contiguous() for name in names if files[name] == file}
            save_file(part, directory / file, metadata={"format": "pt"})
        return write_tokenizer(directory)

    def _stored(self, name: str) -> str:
        return self.prefix + (name.removeprefix("model.") if self.bare else name)


@lru_cache
def _base(family: str, tied: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the tensors of a model of the family, with experts one by one."""
    overrides = SIZES | {"model_type": family, "tie_word_embeddings": tied}
    if family == "qwen3_moe":
        overrides |= EXPERTS
    if family == "mistral":
        overrides |= {"sliding_window": None}
    model = torch_model(0, **overrides)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    config = TINY | overrides | {"architectures": [type(model).__name__]}
    return config, _by_expert(state)


def _by_expert(state: dict[str, Any]) -> dict[str, Any]:
    """The published names of experts: transformers 5 fuses them in memory."""
    from jaxdelta.checkpoint.source import expert_parts

    return {
        part: tensor.flatten(0, 1)[first : first + shape[0]].clone() if part != name else tensor
        for name, tensor in state.items()
        for part, first, shape in expert_parts(name, tuple(tensor.shape))
    }


def _unscaled(scaling: dict[str, Any]) -> bool:
    return scaling == {"rope_type": "default"}


def truth(example: Example) -> Any:
    """transformers' model of the example's config.json; None where transformers refuses it."""
    from checkpoints import fuse_experts
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {
        key: value for key, value in example.config.items() if key not in ("auto_map", "quantization_config")
    }
    if "lm_head.weight" in example.tensors():  # from_pretrained ties only equal ones
        raw["tie_word_embeddings"] = False
    try:
        config = AutoConfig.for_model(raw.pop("model_type"), **json.loads(json.dumps(raw)))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    except Exception:  # whatever transformers raises
        return None
    state = {name: tensor.float() for name, tensor in example.tensors().items()}
    if example.family == "qwen3_moe":
        state = fuse_experts(state)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError:  # another shape
        return None
    return None if set(missing) - {"lm_head.weight"} or unexpected else model


@st.composite
def checkpoints(draw: st.DrawFn) -> Example:
    """A third of them plain, a third with one doubtful thing, a third with several."""
    doubt = draw(st.integers(0, 2))
    family = draw(st.sampled_from(FAMILIES))
    keys = draw(st.lists(st.sampled_from(INERT), max_size=4, unique_by=lambda item: item[0]))
    scaling = draw(st.sampled_from((*SCALINGS[:4], LLAMA3) if doubt == 0 else SCALINGS))
    stated, prefix, doubled = draw(st.sampled_from(("new", "old"))), draw(st.sampled_from(PREFIXES)), False
    extra = draw(st.lists(st.sampled_from(sorted(LEFTOVERS)), max_size=2, unique=True))
    bare = not prefix and not extra and draw(st.booleans())
    kinds = draw(
        st.sets(st.sampled_from(("key", "rope", "extra", "doubled")), min_size=doubt, max_size=2 * doubt)
    )
    if "key" in kinds:
        keys += draw(st.lists(st.sampled_from(DOUBTFUL), min_size=1, max_size=2))
    if "rope" in kinds:
        stated = draw(st.sampled_from(("new", "old", "both")))
    if "extra" in kinds:
        extra.append(draw(st.sampled_from(sorted(INTRUDERS))))
    if "doubled" in kinds:
        doubled, prefix = True, ""
    return Example(
        family,
        draw(st.booleans()),
        scaling,
        stated,
        tuple(keys),
        prefix,
        bare,
        draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        draw(st.sampled_from((1, 2, 3))),
        tuple(extra),
        doubled,
        plain=doubt == 0,
    )
