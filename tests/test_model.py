"""The forward pass against transformers' own, at every layer, and what it promises about itself."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS
from families import (
    TOKENS,
    TOLERANCE,
    Reference,
    assert_equals_transformers,
    next_token_loss,
    reference,
    relative,
)
from flax import nnx

from jaxdelta.checkpoint.checkpoint import load_model
from jaxdelta.model import attention, decoder, loss
from jaxdelta.model.attention import causal_mask
from jaxdelta.model.config import ModelConfig, Rope
from jaxdelta.model.decoder import (
    Block,
    Decoder,
    ResidualStream,
    abstract_block,
    abstract_model,
    attention_windows,
    block_context,
    logits,
    residual_stream,
)
from jaxdelta.model.families.registry import config_from_dict, config_to_dict
from jaxdelta.model.rotary import rotary_frequencies, rotary_tables

WINDOW = 24


def yarn(**options: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            **options,
        }
    }


def default(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
ALTERNATING = ["full_attention", "sliding_attention"] * 2

# `old` is how config.json spells RoPE before transformers 5.
CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head, linear": {"num_key_value_heads": 4, **LINEAR},
    "multi-query, other theta and eps": {
        "num_key_value_heads": 1,
        "head_dim": 10,
        "rms_norm_eps": 1e-3,
        **default(300.0),
    },
    "large heads, biases, tied": {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    "yarn": yarn(),
    "yarn, attention_factor": yarn(attention_factor=1.3, factor=8.0),
    "yarn, mscale": yarn(mscale=1.4, mscale_all_dim=0.7, beta_fast=12, beta_slow=2),
    "yarn, not truncated": yarn(truncate=False, rope_theta=50_000.0),
    "window by max_window_layers": {**SLIDING, "max_window_layers": 2},
    "window by layer_types, multi-head": {
        **SLIDING,
        "layer_types": ALTERNATING,
        "num_key_value_heads": 4,
        **default(1_000_000.0),
    },
    "everything": {
        **SLIDING,
        **yarn(attention_factor=0.8, truncate=False),
        "layer_types": ALTERNATING[::-1],
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
    "experts": EXPERTS,
    "experts, one a token, shares as they are": {
        **EXPERTS,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
    "experts, all of them, tied": {
        **EXPERTS,
        "num_experts_per_tok": 6,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "experts, most of which get no token": {
        **EXPERTS,
        **SLIDING,
        "num_experts": 700,
        "num_experts_per_tok": 1,
    },
    "experts in every other layer": {**EXPERTS, **yarn(), "decoder_sparse_step": 2, "num_experts_per_tok": 3},
    "experts in the second and third layer": {**EXPERTS, "mlp_only_layers": [0, 3], "norm_topk_prob": False},
    "experts, not one layer": {**EXPERTS, "mlp_only_layers": [0, 1, 2, 3], **SLIDING},
    "old form, yarn": {
        "old": {
            "rope_theta": 20_000,
            "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        },
    },
    "old form, linear": {"old": {"rope_theta": 2e5, "rope_scaling": {"rope_type": "linear", "factor": 2}}},
}


def write_old_form(directory: Path, rope: dict[str, Any]) -> None:
    """Rewrites config.json as transformers 4 wrote it."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "layer_types"):
        del config[key]
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config | rope))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Decoder:
    return load_model(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def stream(model: Decoder) -> ResidualStream:
    return residual_stream(model, TOKENS, final_norm=True)


@pytest.fixture(scope="module")
def grouped(tiny_checkpoint: Path) -> Reference:
    return reference(tiny_checkpoint, TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(
    case: str, tmp_path: Path, make_checkpoint: Callable[..., Path], grouped: Reference
) -> None:
    overrides = dict(CASES[case])
    old = overrides.pop("old", None)
    directory = make_checkpoint(tmp_path, **overrides)
    if old:
        write_old_form(directory, old)
    wanted = assert_equals_transformers(directory)
    # The weights are the same draw: what the case varies must show, and by far.
    assert case == "grouped" or relative(wanted.logits, grouped.logits) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "case", [default(1e6), default(1e4), LINEAR, yarn(), yarn(truncate=False, rope_theta=1e6)]
)
def test_rotation_of_long_texts(case: dict[str, Any]) -> None:
    """A frequency that is one rounding off shows only far into a text: PyTorch's own are, on some processors,
    in a few places, and there the angles may differ by as much."""
    import torch
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(head_dim=128, **case)
    embedding = Qwen3RotaryEmbedding(config)
    theirs = embedding(torch.zeros(1), torch.arange(4096)[None])
    rope = config_from_dict(config.to_dict()).rope
    frequencies, wanted = rotary_frequencies(rope, 128), embedding.inv_freq.numpy()
    np.testing.assert_array_max_ulp(frequencies, wanted, maxulp=2)
    assert np.mean(frequencies != wanted) <= 0.25  # computed in another precision, half of them would differ

    positions = np.arange(4096, dtype=np.float32)[:, None]
    angles = np.abs(positions * frequencies - positions * wanted)
    for found, table in zip(rotary_tables(rope, 128, 4096), theirs, strict=True):
        assert np.all(np.abs(found[:, 1] - table[0, :, :64].numpy()) <= 1e-5 + rope.attention_factor * angles)


def test_closure(stream: ResidualStream) -> None:
    assert relative(stream.states[:-1] + stream.attention + stream.mlp, stream.states[1:]) <= 1e-6
    assert relative(stream.states[0] + stream.updates.sum(0), stream.states[-1]) <= 1e-6


def test_scan_equals_loop(model: Decoder, stream: ResidualStream) -> None:
    config, length = model.config, TOKENS.shape[1]
    context = block_context(config, TOKENS.shape, jnp.float32)
    graph = nnx.graphdef(abstract_block(config))
    stacked = nnx.state(model.layers)

    @jax.jit
    def step(layer: nnx.State, h: jax.Array, window: jax.Array) -> tuple[jax.Array, ...]:
        return nnx.merge(graph, layer)(h, dataclasses.replace(context, window=window))

    h = model.embed_tokens(jnp.asarray(TOKENS))
    for i, window in enumerate(attention_windows(config, length)):
        h, attention, mlp = step(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), h, window)
        assert relative(h, stream.states[i + 1]) <= 1e-6
        assert relative(attention, stream.attention[i]) <= 1e-6
        assert relative(mlp, stream.mlp[i]) <= 1e-6


@pytest.mark.parametrize(("queries", "score_bytes"), [(10, 1), (10, 1 << 20), (1000, 1)])
def test_spans_of_queries(
    queries: int, score_bytes: int, model: Decoder, stream: ResidualStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that no query of a span sees are left out of it, whether or not it is cut further, and whether the
    heads' scores are taken one after the other or all at once."""
    monkeypatch.setattr(attention, "MIN_SPAN", 30)
    monkeypatch.setattr(decoder, "query_block", lambda config, length: queries)
    monkeypatch.setattr(attention, "score_bytes", lambda: score_bytes)
    jax.clear_caches()
    try:
        found = residual_stream(model, TOKENS)
    finally:
        jax.clear_caches()
    for name in ("states", "attention", "mlp"):
        assert relative(getattr(found, name), getattr(stream, name)) <= 1e-6


def test_a_later_token_changes_no_earlier_state(model: Decoder, stream: ResidualStream) -> None:
    changed = TOKENS.copy()
    changed[:, 70] = (changed[:, 70] + 1) % 256
    states = residual_stream(model, changed, final_norm=True).states
    np.testing.assert_array_equal(states[:, :, :70], stream.states[:, :, :70])
    assert (states != stream.states)[:, :, 70].any(-1).all()
    assert (states != stream.states)[1:, :, 71:].any(-1).all()


def test_a_token_outside_all_windows_has_no_influence(model: Decoder) -> None:
    window, layers = 8, model.config.num_layers
    graph, weights = nnx.split(model)
    narrow = nnx.merge(graph, weights)
    narrow.config = config_from_dict(
        config_to_dict(model.config)
        | {
            "use_sliding_window": True,
            "sliding_window": window,
            "layer_types": ["sliding_attention"] * layers,
        }
    )
    changed = TOKENS.copy()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    before, after = (residual_stream(narrow, tokens).states for tokens in (TOKENS, changed))
    reached = np.asarray((before != after).any(axis=(1, 3)))  # states, positions
    for i, row in enumerate(reached):
        # Each layer carries it on by a window, its own position included.
        assert np.flatnonzero(row).tolist() == list(range(10, 11 + i * (window - 1)))


@pytest.mark.parametrize(("window", "seen"), [(1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])])
def test_causal_mask(window: int, seen: list[int]) -> None:
    assert np.flatnonzero(causal_mask(jnp.arange(6), 6, window)[3]).tolist() == seen


def test_logits(model: Decoder, grouped: Reference) -> None:
    graph, weights = nnx.split(model)
    found = jax.jit(lambda weights: logits(nnx.merge(graph, weights), TOKENS))(weights)
    assert relative(found, grouped.logits) <= TOLERANCE


def test_the_gradient_of_logits(tiny_checkpoint: Path, model: Decoder) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    graph, weights = nnx.split(model)

    def mean_square(weights: nnx.State) -> jax.Array:
        return jnp.square(logits(nnx.merge(graph, weights), TOKENS)).mean()

    gradient = jax.jit(jax.grad(mean_square))(weights)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    theirs(torch.from_numpy(TOKENS).long()).logits.square().mean().backward()
    ours = gradient["layers"]["self_attn"]["q_proj"]["weight"][0], gradient["embed_tokens"]["weight"][...]
    wanted = theirs.model.layers[0].self_attn.q_proj.weight.grad, theirs.model.embed_tokens.weight.grad
    for pair in zip(ours, wanted, strict=True):
        assert relative(*pair) <= TOLERANCE


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_bfloat16(residual: str, model: Decoder, stream: ResidualStream) -> None:
    found = residual_stream(
        model, TOKENS, compute_dtype=jnp.bfloat16, residual_dtype=residual, final_norm=True
    )
    assert found.states.dtype == residual
    assert {found.attention.dtype, found.mlp.dtype, found.updates.dtype, found.normed.dtype} == {
        jnp.dtype("float32")
    }
    for name in ("states", "attention", "mlp", "normed"):
        error = relative(getattr(found, name), getattr(stream, name))
        assert 1e-4 < error < 0.03, name


@pytest.mark.parametrize("rows", [7, 100, 128, 256, 1000])
def test_next_token_loss_in_slices(
    rows: int, model: Decoder, stream: ResidualStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "VOCAB_SLICE", rows)
    normed = stream.normed[:, :9]
    scores = np.asarray(normed, np.float64) @ np.asarray(model.head, np.float64).T
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_p[:, :-1], TOKENS[:, 1:9, None], axis=-1)[..., 0]
    assert relative(next_token_loss(model, normed, TOKENS[:, :9]), wanted) <= 1e-6


def test_float32_products_are_whole_on_a_gpu(model: Decoder) -> None:
    """TF32 and its like would round the factors: every product must ask for the highest precision."""
    graph, weights = nnx.split(model)
    args = graph, weights, jnp.asarray(TOKENS), (jnp.dtype("float32"),) * 2, True, None
    forward = decoder._residual_stream.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    add_slice = jax.jit(loss._add_slice).trace(jnp.zeros((1, 4)), jnp.zeros((1, 4, 48)), model.head, 256)
    for text, count in ((forward, 9), (add_slice.lower(lowering_platforms=("cuda",)).as_text(), 1)):
        products = re.findall(r"stablehlo\.(?:dot_general|dot|convolution)\b.*", text)
        assert len(products) == count
        assert [p for p in products if "precision = [HIGHEST, HIGHEST]" not in p] == []


def equations(jaxpr: Any) -> int:
    inner = (x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr))
    return len(jaxpr.eqns) + sum(equations(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))


def is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def test_one_layer_is_traced_whatever_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    call = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *args: (calls.append(1), call(self, *args))[1])

    def count(layers: int) -> int:
        config = ModelConfig("qwen3", 256, 48, 80, layers, 4, 2, 16, 1e-6, Rope(), (None,) * layers)
        graph, weights = nnx.split(abstract_model(config))
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        return equations(jax.make_jaxpr(lambda w, t: logits(nnx.merge(graph, w), t))(weights, tokens).jaxpr)

    assert count(8) == count(64) > 50
    assert len(calls) == 2
