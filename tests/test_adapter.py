"""LoRA adapters: equal to PEFT's merged model, or refused by name."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from checkpoints import WEIGHTS, change_config, dequantised, on_disk, one_line, parameters, to_float8, write
from conftest import EXPERTS, TEXT, torch_model, write_tokenizer

from jaxdelta.checkpoint import adapter as adapters
from jaxdelta.checkpoint.adapter import open_adapter
from jaxdelta.checkpoint.adapter_config import read_adapter_config
from jaxdelta.checkpoint.checkpoint import Checkpoint, load_model, open_checkpoint
from jaxdelta.checkpoint.convert import convert
from jaxdelta.checkpoint.source import TensorSource, expert_parts
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.run.analyze import analyze

QUERY, EMBEDDING, HEAD = "model.layers.1.self_attn.q_proj", "model.embed_tokens", "lm_head"
ADAPTER = "adapter_model.safetensors"


def train(directory: Path, dtype: str = "float32", **config: Any) -> tuple[Path, Path]:
    """A base model with `model` among the overrides, and an adapter of it that PEFT saved, all at random."""
    from peft import LoraConfig, get_peft_model

    model = torch_model(**{"num_hidden_layers": 2} | config.pop("model", {})).to(getattr(torch, dtype))
    model.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    adapted.save_pretrained(directory / "adapter")
    return directory / "base", directory / "adapter"


def loaded_by_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter).eval()


def by_name(model: Any) -> dict[str, np.ndarray]:
    """A model's tensors in float32, experts one by one."""
    found = {}
    for name, tensor in model.state_dict().items():
        for part, first, shape in expert_parts(name, tuple(tensor.shape)):
            fused = tensor.flatten(0, 1)[first : first + shape[0]] if part != name else tensor
            found[part] = fused.float().numpy()
    return found


def by_us(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    source = checkpoint.source
    return {name: source.read(name).astype(np.float32) for name in source.specs}


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-6) -> None:
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of two layers and an adapter of all its linear layers; not to be changed."""
    return train(tmp_path_factory.mktemp("plain"), target_modules="all-linear", r=4, lora_alpha=12)


@pytest.fixture
def own(plain: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the adapter, to be spoiled, and its base."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (ADAPTER, "adapter_config.json"):
        (adapter / file).write_bytes((plain[1] / file).read_bytes())
    return plain[0], adapter


def stored(adapter: Path) -> dict[str, Any]:
    return on_disk(adapter)


def store(adapter: Path, tensors: dict[str, Any]) -> None:
    write(adapter, tensors, ADAPTER)


def change(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


EMBEDDINGS = ["embed_tokens", "lm_head"]
TIED = {"tie_word_embeddings": True}
QWEN2 = {"model_type": "qwen2"}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 12},
        {"target_modules": r".*\.1\..*(q|up)_proj", "r": 3, "use_rslora": True, "fan_in_fan_out": True},
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.0.*q_proj": 2, "v_proj": 6, "0.mlp.down_proj": 1},
            "alpha_pattern": {r"model\.layers\.1\..*": 32, "v_proj": 3},
            "use_rslora": True,
        },
        {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "modules_to_save": [*EMBEDDINGS, "norm"]},
        {"target_modules": ["q_proj", *EMBEDDINGS], "r": 5},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "model": TIED},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "model": TIED},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
            "model": TIED,
        },
        {"target_modules": ["q_proj"], "bias": "all", "model": QWEN2},
        {"target_modules": ["q_proj"], "bias": "lora_only", "model": QWEN2},
        {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "model": QWEN2},
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 4, "model": EXPERTS},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"],
            "rank_pattern": {"down_proj": 2, "gate.weight": 1},
            "alpha_pattern": {"mlp.gate.weight": 3},
            "model": EXPERTS,
        },
    ],
    ids=lambda config: "-".join(config)[:60],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_equals_the_model_that_peft_merges(config: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = train(tmp_path, **config)
    ours = open_checkpoint(str(base), adapter=str(adapter))
    merged = loaded_by_peft(base, adapter).merge_and_unload()
    assert_close(by_us(ours), by_name(merged))
    head, embedding = (by_name(merged)[f"{name}.weight"] for name in (HEAD, EMBEDDING))
    assert ours.config.tie_embeddings == (bool((head == embedding).all()) and "model" in config)
    plain = by_us(open_checkpoint(str(base)))
    changed = {name for name, value in plain.items() if not np.array_equal(value, by_us(ours)[name])}
    assert changed and str(adapter)[-50:] in ours.notes[0]
