"""What the tests of every family share: comparisons with transformers' models and configurations."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from checkpoints import assert_same, on_disk, parameters
from conftest import PHASES, TEXT
from safetensors.numpy import load_file

from jaxdelta.checkpoint.checkpoint import load_model, save_model
from jaxdelta.checkpoint.convert import convert
from jaxdelta.model.config import ModelConfig
from jaxdelta.model.decoder import Decoder, ResidualStream, count_parameters, residual_stream
from jaxdelta.model.families.registry import config_from_dict, config_to_dict
from jaxdelta.model.loss import sliced_loss, vocabulary_slices

TOLERANCE = 1e-5  # relative, Frobenius
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 136), dtype=np.int32)


class Reference(NamedTuple):
    """What transformers computes: as a ResidualStream, and the logits and the loss of every token."""

    stream: ResidualStream
    logits: np.ndarray
    loss: np.ndarray


def reference(directory: Path, tokens: np.ndarray) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    stream, scores = stream_of(model, tokens)
    targets = torch.from_numpy(tokens[:, 1:]).long()
    loss = torch.nn.functional.cross_entropy(scores[:, :-1].mT, targets, reduction="none")
    return Reference(stream, scores.numpy(), loss.numpy())


def stream_of(model: Any, tokens: np.ndarray) -> tuple[ResidualStream, Any]:
    """The residual stream and the logits of transformers' model."""
    import torch

    kept: dict[str, list[Any]] = {"states": [], "attention": [], "mlp": [], "normed": []}
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: kept["states"].append(inputs[0]))
        layer.self_attn.register_forward_hook(lambda _, inputs, out: kept["attention"].append(out[0]))
        layer.mlp.register_forward_hook(lambda _, inputs, out: kept["mlp"].append(out))
    model.model.norm.register_forward_pre_hook(lambda _, inputs: kept["states"].append(inputs[0]))
    model.model.norm.register_forward_hook(lambda _, inputs, out: kept["normed"].append(out))
    with torch.no_grad():
        scores = model(torch.from_numpy(tokens).long()).logits
    parts = {name: jnp.stack([jnp.asarray(x.numpy()) for x in values]) for name, values in kept.items()}
    normed = parts.pop("normed")[0]
    return ResidualStream(**parts, normed=normed), scores


def relative(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def next_token_loss(model: Decoder, normed: Any, tokens: np.ndarray) -> np.ndarray:
    slices = (model.head[start:stop] for start, stop in vocabulary_slices(len(model.head)))
    targets = model.head[tokens[:, 1:]]
    return sliced_loss(len(model.head), slices, targets, normed[:, :-1], jnp.float32)


def assert_equals_transformers(directory: Path) -> Reference:
    """Every layer's state and both sublayers' writes, the normed state, logits and loss; returns theirs."""
    wanted = reference(directory, TOKENS)
    model = load_model(str(directory))
    found = residual_stream(model, TOKENS, final_norm=True)
    errors = {"normed": relative(found.normed, wanted.stream.normed)}
    for name in ("states", "attention", "mlp"):
        pairs = zip(getattr(found, name), getattr(wanted.stream, name), strict=True)
        errors |= {f"{name}[{i}]": relative(*pair) for i, pair in enumerate(pairs)}
    errors["logits"] = relative(np.asarray(found.normed) @ np.asarray(model.head).T, wanted.logits)
    errors["loss"] = relative(next_token_loss(model, found.normed, TOKENS), wanted.loss)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    return wanted


def assert_published(raw: dict[str, Any], count: int) -> ModelConfig:
    """A published config.json describes a model of as many parameters as published; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = assert_reads_as_transformers(raw)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(raw))))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    assert count_parameters(config) == count
    return config


def assert_reads_as_transformers(raw: dict[str, Any]) -> ModelConfig:
    """A file is read as by transformers, written so that both read the same again; returns what is read."""
    from transformers import AutoConfig

    config = config_from_dict(raw)
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    assert config_from_dict(theirs.to_dict()) == config
    written = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(written) == config
    again = AutoConfig.for_model(**written).to_dict()
    assert {key: again.get(key) for key in written if key != "dtype"} == {
        key: value for key, value in written.items() if key != "dtype"
    }
    return config


def assert_weights_round_trip(directory: Path, scratch: Path) -> None:
    """All weights are read, saved as they were, and the same from Orbax's format."""
    wanted, model = on_disk(directory), load_model(str(directory))
    assert_same(parameters(model), wanted)
    save_model(model, scratch / "saved")
    assert_same(on_disk(scratch / "saved"), wanted)
    assert load_model(str(scratch / "saved")).config == model.config
    convert(str(directory), scratch / "orbax")
    again = load_model(str(scratch / "orbax"))
    assert_same(parameters(again), wanted)
    assert again.config == model.config


def assert_analysed(directory: Path, model_type: str, scratch: Path) -> None:
    """A run with default views agrees with the PyTorch reference, and one over two devices with it; controls
    run too."""
    from test_reference_scripts import comparison, torch_reference

    from jaxdelta.run.analyze import analyze

    run = analyze(str(directory), TEXT, top_k=4, phases=PHASES, bootstrap=20, null_draws=20)
    assert run.run["model_type"] == model_type
    assert run.run["closure_error"] < 1e-5
    model = torch_reference.load_model(str(directory), "main", "float32", "cpu")
    tokenizer = torch_reference.pretrained("AutoTokenizer", str(directory), "main")
    tokens = torch_reference.tokenize(tokenizer, "\n\n".join(TEXT), 2048)
    states, normed, loss = torch_reference.forward(model, tokens)
    report, arrays = torch_reference.analyze(states, normed, list("AABB"), k=4)
    report |= {"model": str(directory), "run": {"last_state": "residual"}}
    assert abs(run.run["calibration_loss"] - loss) < 1e-5 * loss
    run.save(scratch / "run.json")
    saved, saved_arrays = (
        json.loads((scratch / "run.json").read_text()),
        load_file(scratch / "run.safetensors"),
    )
    rows = comparison.compare(report, saved, arrays, saved_arrays)
    assert [row for row in rows if row.verdict == "FAIL"] == []

    few = {"top_k": 4, "phases": PHASES, "views": "none", "bootstrap": 0, "null_draws": 0}
    split = analyze(str(directory), TEXT, mesh="model:2", **few)
    np.testing.assert_allclose(split.singular_values, run.singular_values, rtol=1e-4, atol=1e-5)
    for control in ("random_init", "permuted_weights"):
        of_control = analyze(str(directory), TEXT, control=control, **few)
        assert np.isfinite(of_control.singular_values).all()
        assert relative(of_control.singular_values, run.singular_values) > 0.01
