"""Names of tensors as people store them: read under the model's own, left out and said, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    assert_same,
    change_config,
    fuse_experts,
    on_disk,
    one_line,
    parameters,
    to_torch_file,
    write,
)
from conftest import EXPERTS, TEXT

from jaxdelta.checkpoint.checkpoint import Checkpoint, load_model, open_checkpoint
from jaxdelta.checkpoint.convert import convert
from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.decoder import logits, residual_stream

LAYER = "model.layers.1."
UP = f"{LAYER}mlp.up_proj.weight"
Tensors = dict[str, Any]


def said(directory: Path) -> str:
    """The error of a checkpoint, which is short."""
    message = one_line(open_checkpoint, str(directory))
    assert len(message) <= 800
    assert message.startswith(str(directory))
    return message


def opened(directory: Path) -> Checkpoint:
    """A checkpoint, whose notes are short."""
    checkpoint = open_checkpoint(str(directory))
    assert all(len(note) <= 300 and "\n" not in note for note in checkpoint.notes)
    return checkpoint


def shards(directory: Path, files: dict[str, Tensors], owners: dict[str, str]) -> None:
    (directory / WEIGHTS).unlink(missing_ok=True)
    for name, tensors in files.items():
        write(directory, tensors, name)
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": owners}))


# One tensor under two names, or in two files.


def bare(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize(
    "other",
    [bare(UP), f"_orig_mod.{UP}", f"base_model.model.{UP}", UP.replace("layers.1", "layers.1._orig_mod")],
)
def test_one_tensor_under_two_names(other: str, small: Path) -> None:
    tensors = on_disk(small)
    write(small, tensors | {other: tensors[UP] * 2})
    message = said(small)
    assert "one tensor twice" in message
    assert UP in message
    assert other in message


def test_two_names_in_two_shards(small: Path) -> None:
    tensors = on_disk(small)
    files = {"a.safetensors": tensors, "b.safetensors": {bare(UP): tensors[UP] * 2}}
    shards(small, files, {name: file for file, held in files.items() for name in held})
    message = said(small)
    assert f"{UP} and {bare(UP)}" in message or f"{bare(UP)} and {UP}" in message


@pytest.mark.parametrize("shards", [1, 2])
def test_two_names_in_files_of_pytorch(shards: int, small: Path) -> None:
    import torch

    tensors = to_torch_file(small, shards)
    file = "pytorch_model.bin" if shards == 1 else "pytorch_model-0.bin"
    held = torch.load(small / file, weights_only=True)
    torch.save(held | {bare(UP): tensors[UP] * 2}, small / file)
    assert f"{UP} and {bare(UP)}" in said(small) or f"{bare(UP)} and {UP}" in said(small)
    if shards == 2:
        torch.save(held | {name: tensors[name] * 2 for name in (UP, EMBEDDING)}, small / file)
        assert "in two files" in said(small)


def test_two_names_with_the_torch_loader(small: Path) -> None:
    """transformers would take the last of both."""
    tensors = on_disk(small)
    write(small, tensors | {bare(UP): tensors[UP] * 2})
    assert "one tensor twice" in one_line(open_checkpoint, str(small), loader="torch")
    shards(
        small,
        {"a.safetensors": tensors, "b.safetensors": {UP: tensors[UP] * 2}},
        dict.fromkeys(tensors, "a.safetensors") | {EMBEDDING: "b.safetensors"},
    )
    message = one_line(open_checkpoint, str(small), loader="torch")
    assert f"{EMBEDDING} is not in the file it names (b.safetensors)" in message


@pytest.mark.parametrize("name", ["score.weight", "_orig_mod."])
def test_names_in_files_of_pytorch(name: str, small: Path) -> None:
    """A prefix is stripped, and what no layer needs is left out, as in safetensors."""
    import torch

    tensors = on_disk(small)
    (small / WEIGHTS).unlink()
    if name == "score.weight":
        torch.save(tensors | stray(name), small / "pytorch_model.bin")
        checkpoint = opened(small)
        assert_same(parameters(checkpoint.load()), tensors)
        assert "a head of another task" in checkpoint.notes[0]
    else:
        torch.save({f"{name}{key}": tensor for key, tensor in tensors.items()}, small / "pytorch_model.bin")
        assert_same(parameters(opened(small).load()), tensors)


def test_names_in_messages_are_those_on_disk(small: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in on_disk(small).items()}
    tensors[f"module.{UP}"] = tensors[f"module.{UP}"][:7]
    write(small, tensors | {f"module.{LAYER}extra": tensors[f"module.{UP}"]})
    message = said(small)
    assert f"unexpected: module.{LAYER}extra; wrong shape: module.{UP} is (7, 48)" in message


def test_a_fused_expert_and_one_of_its_own(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    tensors = on_disk(make_checkpoint(tmp_path, **EXPERTS | {"num_experts": 2, "num_hidden_layers": 2}))
    own = "model.layers.1.mlp.experts.1.up_proj.weight"
    fused = fuse_experts(tensors)
    write(tmp_path, fused | {own: tensors[own] * 2})
    assert {own, "model.layers.1.mlp.experts.gate_up_proj"} <= set(said(tmp_path).replace(";", " ").split())
    write(tmp_path, {bare(name): tensor for name, tensor in fused.items()} | {own: tensors[own] * 2})
    assert "one tensor twice" in said(tmp_path)


@pytest.mark.parametrize("first", [True, False])
def test_a_stale_copy_in_another_shard(first: bool, small: Path) -> None:
    """The index decides, whichever file is read first."""
    tensors = on_disk(small)
    stale = "a.safetensors" if first else "z.safetensors"
    shards(
        small,
        {"m.safetensors": tensors, stale: {UP: tensors[UP] * 2, EMBEDDING: tensors[EMBEDDING]}},
        dict.fromkeys(tensors, "m.safetensors") | {EMBEDDING: stale},
    )
    checkpoint = opened(small)
    assert_same(parameters(checkpoint.load()), tensors)
    assert checkpoint.notes == (
        f"{EMBEDDING}, {UP}: another copy is in a shard, and the one in the file that the index names counts",
    )


def test_the_index_and_its_files_disagree(small: Path) -> None:
    tensors = on_disk(small)
    owners = dict.fromkeys(tensors, "m.safetensors")
    shards(small, {"m.safetensors": tensors | {"old.weight": tensors[UP]}}, owners)
    checkpoint = opened(small)
    assert_same(parameters(checkpoint.load()), tensors)
    assert checkpoint.notes == ("old.weight: in a shard but not in its index, and left out",)
    shards(small, {"m.safetensors": tensors}, owners | {"lost.weight": "m.safetensors"})
    assert "lost.weight is not in the file it names (m.safetensors)" in said(small)
    del owners[UP]
    shards(small, {"m.safetensors": tensors}, owners)
    assert f"missing: {UP}" in said(small)


def test_an_index_beside_a_single_file(small: Path) -> None:
    """As in transformers the single file counts."""
    from transformers import AutoModelForCausalLM

    tensors = on_disk(small)
    shards(
        small,
        {"m.safetensors": {name: tensor * 2 for name, tensor in tensors.items()}},
        {UP: "m.safetensors"},
    )
    write(small, tensors)
    checkpoint = opened(small)
    assert "model.safetensors is read, and not the shards" in checkpoint.notes[0]
    theirs = AutoModelForCausalLM.from_pretrained(small).state_dict()
    assert_same(parameters(checkpoint.load()), dict(theirs))


# Prefixes.


PREFIXES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "image and text": lambda name: name.replace("model.", "model.language_model.", 1),
    "LLaVA": lambda name: f"language_model.{name}",
    "value model": lambda name: f"pretrained_model.{name}",
    "only the trunk compiled": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "blocks compiled": lambda name: name.replace("layers.1.", "layers.1._orig_mod.", 1),
    "FSDP": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module.", 1),
    "checkpointed": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp.", 1),
    "PEFT without LoRA": lambda name: name.replace("_proj.weight", "_proj.base_layer.weight"),
    "no word of ours": lambda name: f"student.inner.{name}",
}


@pytest.mark.parametrize("stored", PREFIXES.values(), ids=PREFIXES)
def test_a_prefix_is_stripped_and_said(stored: Callable[[str], str], small: Path) -> None:
    tensors = on_disk(small)
    write(small, {stored(name): tensor for name, tensor in tensors.items()})
    checkpoint = opened(small)
    assert_same(parameters(checkpoint.load()), tensors)
    assert len(checkpoint.notes) == 1
    assert "stripped from the names" in checkpoint.notes[0]


def test_prefixes_of_experts(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    tensors = on_disk(make_checkpoint(tmp_path, **EXPERTS | {"num_hidden_layers": 2}))
    write(tmp_path, {f"module.{name}": tensor for name, tensor in fuse_experts(tensors).items()})
    assert_same(parameters(opened(tmp_path).load()), tensors)


def test_half_of_the_names_have_a_prefix(small: Path) -> None:
    tensors = on_disk(small)
    write(small, {f"student.{n}" if "layers.1." in n else n: tensor for n, tensor in tensors.items()})
    assert "the tensors' names have several prefixes" in said(small)


def test_weights_of_an_adapter_that_is_not_merged(small: Path) -> None:
    tensors = {name.replace("q_proj.w", "q_proj.base_layer.w"): t for name, t in on_disk(small).items()}
    lora = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": tensors["model.norm.weight"]}
    write(small, tensors | lora)
    message = said(small)
    assert "LoRA" in message
    assert "merge_and_unload" in message


# Parts that no layer needs.


def stray(name: str, dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> Tensors:
    import torch

    return {name: torch.ones(shape).to(getattr(torch, dtype))}


UNNEEDED = {
    "classifier": (stray("score.weight", shape=(2, 48)), "a head of another task"),
    "classifier in front": (stray("classifier.dense.weight"), "a head of another task"),
    "value head": (stray("v_head.summary.weight"), "a head of another task"),
    "reward head": (stray("model.reward_head.weight"), "a head of another task"),
    "MTP": (stray("mtp.layers.0.mlp.up_proj.weight"), "prediction of several tokens"),
    "MTP inside": (stray("model.mtp.layers.0.mlp.up_proj.weight"), "prediction of several tokens"),
    "DeepSeek's MTP": (
        stray("model.layers.2.eh_proj.weight") | stray("model.layers.2.mlp.up_proj.weight"),
        "prediction of several tokens",
    ),
    "LoRA": (stray(f"{LAYER}mlp.up_proj.lora_A.weight"), "NOT APPLIED"),
    "counter": (stray("model.num_batches", "int64", ()), "a buffer"),
    "positions": (stray("model.position_ids", "int64", (1, 512)), "a buffer"),
    "mask": (stray(f"{LAYER}self_attn.bias", "bool", (1, 1, 8, 8)), "a buffer"),
    "flags": (stray(f"{LAYER}mlp.used", "bool"), "a buffer"),
    "frequencies": (stray(f"{LAYER}self_attn.rotary_emb.inv_freq"), "a buffer"),
    "float64 frequencies": (stray("model.rotary_emb.inv_freq", "float64"), "a buffer"),
}


@pytest.mark.parametrize("case", UNNEEDED.values(), ids=UNNEEDED)
def test_a_part_that_no_layer_needs(case: tuple[Tensors, str], small: Path) -> None:
    more, what = case
    tensors = on_disk(small)
    write(small, tensors | more)
    checkpoint = opened(small)
    assert_same(parameters(checkpoint.load()), tensors)
    assert len(checkpoint.notes) == 1
    assert what in checkpoint.notes[0]
    assert next(iter(more)) in checkpoint.notes[0]


def test_many_parts_are_a_count_and_three_names(small: Path) -> None:
    more = {f"score.{i}.weight": tensor for i in range(50) for tensor in stray("x").values()}
    write(small, on_disk(small) | more)
    assert opened(small).notes == (
        "left out, as no layer needs it (a head of another task): 50 tensors (score.0.weight, "
        "score.1.weight, score.10.weight, …)",
    )


REFUSED = {
    "a bias": stray(f"{LAYER}self_attn.q_proj.bias", shape=(64,)),
    "a norm": stray(f"{LAYER}pre_feedforward_layernorm.weight", shape=(48,)),
    "a scale": stray(f"{LAYER}layer_scale", shape=()),
    "a bias of attention": stray(f"{LAYER}self_attn.bias", shape=(48,)),
    "a norm of the embedding": stray("model.embed_norm.weight", shape=(48,)),
    "a bias of the head": stray("lm_head.bias", shape=(256,)),
    "a soft prompt": stray("prompt_encoder.embedding.weight", shape=(8, 48)),
    "a mask that prunes": stray(f"{LAYER}mlp.up_proj.weight_mask", "bool", (80, 48)),
}


@pytest.mark.parametrize("more", REFUSED.values(), ids=REFUSED)
def test_a_part_that_may_count_is_refused(more: Tensors, small: Path) -> None:
    write(small, on_disk(small) | more)
    assert f"unexpected: {next(iter(more))}" in said(small)


def test_notes_of_long_names(small: Path) -> None:
    tensors = on_disk(small)
    long = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    more = [stray(f"{kind}{i}.{long}") for kind in ("", "score.", "mtp.") for i in range(2000)]
    more += [stray(f"{'x' * 900}.position_ids")]
    write(small, tensors | {name: t for part in more for name, t in part.items()})
    checkpoint = opened(small)
    assert_same(parameters(checkpoint.load()), tensors)
    assert all(note.isprintable() for note in checkpoint.notes)


def test_layers_beyond_the_configuration(small: Path) -> None:
    tensors = on_disk(small)
    change_config(small, num_hidden_layers=1, layer_types=None)
    message = said(small)
    assert "the files hold layers 0 to 1, num_hidden_layers is 1" in message
    assert f"unexpected: {len(tensors) // 2 - 1} tensors (model.layers.1.input_layernorm.weight, " in message


def test_a_tensor_that_counts_has_a_dtype_that_is_not_read(small: Path) -> None:
    import torch

    tensors = on_disk(small)
    for dtype, stored in {"float64": "F64", "float8_e5m2": "F8_E5M2", "uint8": "U8", "bool": "BOOL"}.items():
        write(small, tensors | {UP: tensors[UP].to(getattr(torch, dtype))})
        assert f"{UP} has dtype {stored}; jaxdelta reads BF16, F16, F32" in said(small)


# Heads.


def test_tied_embeddings_with_only_the_head(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    tensors = on_disk(make_checkpoint(tmp_path, num_hidden_layers=2, tie_word_embeddings=True))
    tensors[HEAD] = tensors.pop(EMBEDDING)
    write(tmp_path, tensors)
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    del theirs[HEAD]
    checkpoint = opened(tmp_path)
    assert_same(parameters(checkpoint.load()), theirs)
    assert HEAD in checkpoint.notes[0]
    assert checkpoint.first_bad_tensor() is None


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """An embedding model: no `model.` in front of names, not tied, no head."""
    directory = tmp_path_factory.mktemp("embedding") / "model"
    shutil.copytree(tiny_checkpoint, directory)
    tensors = on_disk(directory)
    del tensors[HEAD]
    write(directory, {bare(name): tensor for name, tensor in tensors.items()})
    return directory


def test_a_model_without_a_head(headless: Path) -> None:
    import torch
    from transformers import AutoModel

    model = load_model(str(headless))
    ids = np.arange(40)[None] * 5 % 256
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(headless)(torch.from_numpy(ids), output_hidden_states=True)
    ours = residual_stream(model, ids, final_norm=True)
    assert ours.normed is not None
    np.testing.assert_allclose(ours.states[2], theirs.hidden_states[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.normed, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    with pytest.raises(JaxDeltaError, match="has no head"):
        logits(model, ids)


def test_a_run_without_a_head(headless: Path, tmp_path: Path, analysed: Any) -> None:
    from jaxdelta.report.analysis import Analysis
    from jaxdelta.report.page import page
    from jaxdelta.report.tables import tables
    from jaxdelta.run.analyze import analyze
    from jaxdelta.run.control_comparison import compare_control

    options = {"top_k": 4, "phases": "A:0-1,B:2-3", "bootstrap": 0, "null_draws": 0}
    run = analyze(str(headless), TEXT, **options)
    facts = run.run
    assert (facts["calibration_loss"], facts["loss_reason"], facts["loss_tokens"]) == (
        None,
        "the model has no head",
        0,
    )
    assert any("no head" in note for note in facts["notes"])
    np.testing.assert_allclose(run.singular_values, analysed.singular_values, rtol=1e-5)
    control = analyze(str(headless), TEXT, control="permuted_weights", **options)
    compared = compare_control(run, control)
    assert "none (the model has no head)" in tables(compared)
    assert "loss none | none" in tables(compared)
    assert "there is no loss (the model has no head)" in page(compared)
    compared.save(tmp_path / "run.json")
    assert Analysis.load(tmp_path / "run.json").run["calibration_loss"] is None


def test_runs_without_a_head_are_compared_and_merged(headless: Path, tmp_path: Path, analysed: Any) -> None:
    from jaxdelta.report.compare import page, tables
    from jaxdelta.report.compare.compare import compare
    from jaxdelta.run.analyze import analyze
    from jaxdelta.run.merge import merge_runs

    kept = [tmp_path / "a", tmp_path / "b"]
    options = {"top_k": 4, "bootstrap": 0, "null_draws": 0}
    for text, directory in zip((TEXT[:2], TEXT[2:]), kept, strict=True):
        analyze(str(headless), text, keep_moments=str(directory), **options)
    merged = merge_runs(kept)
    assert (merged.run["calibration_loss"], merged.run["loss_tokens"]) == (None, 0)
    comparison = compare([merged, analysed], ["a", "b"])
    assert "loss (nats per token)" in tables.tables(comparison)
    assert "nats per token" in page.page(comparison)


def test_a_model_without_a_head_is_converted(headless: Path, tmp_path: Path) -> None:
    convert(str(headless), tmp_path / "copy")
    checkpoint = opened(tmp_path / "copy")
    assert not checkpoint.config.has_head
    assert_same(parameters(checkpoint.load()), parameters(load_model(str(headless))))


def test_a_classifier(small: Path) -> None:
    """Its score is left out, and it has no other head."""
    tensors = on_disk(small)
    del tensors[HEAD]
    write(small, tensors | stray("score.weight", shape=(2, 48)))
    checkpoint = opened(small)
    assert_same(parameters(checkpoint.load()), tensors)
    assert len(checkpoint.notes) == 2


# Likely causes.


def rename(pattern: str, new: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        write(directory, {name.replace(pattern, new): t for name, t in on_disk(directory).items()})

    return spoil


def transposed(directory: Path) -> None:
    tensors = on_disk(directory)
    write(directory, {name: t.T if name.endswith("_proj.weight") else t for name, t in tensors.items()})


def placeholders(directory: Path) -> None:
    write(directory, {name: tensor.flatten()[:0] for name, tensor in on_disk(directory).items()})


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: change_config(directory, **changes)


CAUSES = {
    "head_dim": (
        config(head_dim=None, num_attention_heads=3, num_key_value_heads=3),
        "num_attention_heads=4",
    ),
    "head size": (config(head_dim=12), "(the shapes are those of head_dim=16)"),
    "key and value heads": (config(num_key_value_heads=4), "the shapes are those of num_key_value_heads=2"),
    "vocabulary": (config(vocab_size=300), "the shapes are those of vocab_size=256"),
    "width": (config(intermediate_size=96), "the shapes are those of intermediate_size=80"),
    "DeepSeek": (rename("q_proj", "q_a_proj"), "DeepSeek's latent attention"),
    "GPT-2": (rename("model.layers", "transformer.h"), "GPT-2"),
    "llama.cpp": (rename("model.layers", "blk"), "llama.cpp"),
    "Llama": (rename("q_norm", "rotary_emb"), "of another family, such as Llama or Mistral"),
    "Gemma": (rename("post_attention", "pre_feedforward"), "Gemma"),
    "transposed": (transposed, "the matrices are transposed"),
    "ZeRO-3": (placeholders, "DeepSpeed ZeRO-3"),
    "nothing known": (rename("model.", "net.blocks"), "none of the names is one of a supported model"),
}


@pytest.mark.parametrize("case", CAUSES.values(), ids=CAUSES)
def test_the_likely_cause(case: tuple[Callable[[Path], None], str], small: Path) -> None:
    spoil, cause = case
    spoil(small)
    assert cause in said(small)


def test_transposed_experts(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    fused = fuse_experts(on_disk(make_checkpoint(tmp_path, **EXPERTS | {"num_hidden_layers": 2})))
    write(tmp_path, {name: t.transpose(1, 2) if ".experts." in name else t for name, t in fused.items()})
    assert "the experts' matrices are transposed" in said(tmp_path)


def test_long_and_odd_names(small: Path) -> None:
    more = {
        f"model.layers.0.{'x' * 5000}{i}\n\x1b[31m.weight": t for i in range(9) for t in stray("x").values()
    }
    write(small, on_disk(small) | more)
    assert said(small).isprintable()


QUANTISED = {
    "GPTQ or AWQ": [".qweight", ".qzeros", ".scales"],
    "bitsandbytes": [".weight", ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4"],
    "MLX": [".weight", ".scales", ".biases"],
    "modelopt": [".weight", ".weight_scale", ".weight_scale_2", ".input_scale"],
    "compressed-tensors": [".weight_packed", ".weight_scale", ".weight_shape"],
    "whole tensors or rows, in float8": [".weight", ".weight_scale"],
}


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_weights(form: str, small: Path) -> None:
    tensors = on_disk(small)
    whole = {name: t for name, t in tensors.items() if "_proj" not in name}
    parts = [
        stray(f"{LAYER}mlp.up_proj{end}", "uint8" if "weight" in end else "float32")
        for end in QUANTISED[form]
    ]
    write(small, whole | {name: t for part in parts for name, t in part.items()})
    message = said(small)
    assert f"is quantised by {form}" in message
    assert len(message) < 400
