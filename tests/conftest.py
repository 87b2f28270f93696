"""What all tests share: typed, strict JAX, two simulated devices, tiny checkpoints made on the spot."""

import os
from importlib import metadata

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compiling: as quickly as XLA can, see utils/compiling.py.
QUICK = "--xla_backend_optimization_level=1"
if metadata.version("jaxlib").startswith("0.10."):  # later ones end the process at a flag that they lack
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = (
    f"{QUICK} {os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

from jaxtyping import install_import_hook

install_import_hook("jaxdelta", "beartype.beartype")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

# Rank promotion stays: weights of the last axis are meant to meet any number of axes before it.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Small, and unlike a default in everything that could be mistaken: heads are grouped, and the head size is
# not hidden_size / heads.
TINY = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


TEXT = [
    "The cat sat on the mat, and looked at the moon.",
    "Über 漢字: 3x + 7 = 22.",
    "def f(n):\n    return n",
]
PHASES = "A:0-1,B:2-3"

# With these among the overrides, the model has experts.
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def torch_model(seed: int = 0, **overrides: Any) -> Any:
    """transformers' own model, all its weights random, norms and biases too; a Qwen3 if no `model_type` is
    given."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"model_type": "qwen3_moe" if "num_experts" in overrides else "qwen3"}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**kind | TINY | overrides, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def write_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer.json of 256 tokens, one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    # Otherwise transformers would read it as a Qwen3's, which normalizes and has an end token.
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """make_checkpoint(directory, **config_overrides): a random model saved by transformers, a tokenizer.

    A Qwen3, unless `model_type` is among the overrides; `EXPERTS` make it a mixture of experts. `dtype` among
    them is the weights' dtype, `seed` another draw of them; `max_shard_size` splits the file.
    """

    def make(
        directory: Path,
        *,
        dtype: str = "float32",
        seed: int = 0,
        max_shard_size: str = "1GB",
        **overrides: Any,
    ) -> Path:
        import torch

        model = torch_model(seed, **overrides).to(getattr(torch, dtype))
        model.config.dtype = dtype
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return write_tokenizer(directory)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of 4 layers with its tokenizer; not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def analysed(tiny_checkpoint: Path) -> Any:
    """A run of `tiny_checkpoint` over TEXT with all that a run has; not to be changed."""
    from jaxdelta.run.analyze import analyze

    return analyze(str(tiny_checkpoint), TEXT, top_k=4, phases=PHASES, bootstrap=20, null_draws=20)


def summarise_from(monkeypatch: pytest.MonkeyPatch, maker: str) -> None:
    """Runs that follow summarise their layers from `rows` or from `moments`, whatever either costs."""
    from jaxdelta.run.memory_plan import MemoryDemand

    monkeypatch.setattr(
        MemoryDemand, "_makers", lambda work: [work.measurement.groups if maker == "moments" else 0]
    )


@pytest.fixture
def small(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of two layers, to be spoiled."""
    return make_checkpoint(tmp_path / "small", num_hidden_layers=2)
