"""Checkpoints with random weights of real shapes, and texts of any length, for the benchmarks."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import save_model
from jaxdelta.model.config import ModelConfig, Rope
from jaxdelta.model.decoder import Decoder
from jaxdelta.model.families.registry import config_to_dict
from jaxdelta.text.documents import shipped_prompts

# layers, hidden, heads, key/value heads, head size, MLP
SHAPES = {
    "0.6B": (28, 1024, 16, 8, 128, 3072),
    "1.7B": (28, 2048, 16, 8, 128, 6144),
    "4B": (36, 2560, 32, 8, 128, 9728),
}
VOCABULARY = 151_936


def config_of(shape: tuple[int, ...], vocabulary: int = VOCABULARY) -> ModelConfig:
    """A Qwen3 configuration with tied embeddings."""
    layers, hidden, heads, kv_heads, head_dim, mlp = shape
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e6),
        windows=(None,) * layers,
        qk_norm="per_head",
        tie_embeddings=True,
        dtype="bfloat16",
    )


def random_checkpoint(directory: Path, shape: str, layers: int | None = None) -> Path:
    """A checkpoint with random bfloat16 weights, a file for each layer, and the demo model's tokenizer."""
    if (directory / hub.INDEX).exists():
        return directory
    print(f"making a random checkpoint of {shape} shape ...", flush=True)
    depth, *sizes = SHAPES[shape]
    config = config_of((layers or depth, *sizes))
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for i in range(config.num_layers):
        # The first file also has the embeddings.
        part = config_of((1, *sizes), vocabulary=1 if i else VOCABULARY)
        with tempfile.TemporaryDirectory() as scratch:
            save_model(Decoder(part, dtype=jnp.bfloat16, rngs=nnx.Rngs(i)), Path(scratch))
            tensors = load_file(Path(scratch) / hub.WEIGHTS)
        chosen = {
            name.replace("layers.0.", f"layers.{i}."): tensor
            for name, tensor in tensors.items()
            if i == 0 or ".layers." in name
        }
        save_file(chosen, directory / f"model-{i:05}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(chosen, f"model-{i:05}.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hub.resolve(hub.DEMO) / name, directory)
    (directory / hub.CONFIG).write_text(json.dumps(config_to_dict(config)))
    (directory / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def text_of(tokens: int, path: Path) -> Path:
    """Writes documents of at least this many tokens: the shipped prompts, then their words shuffled."""
    documents, generator = shipped_prompts(), np.random.default_rng(0)
    words = " ".join(documents).split()
    documents += [" ".join(generator.permutation(words)) for _ in range(tokens // len(words))]
    path.write_text(json.dumps(documents), encoding="utf-8")
    return path
