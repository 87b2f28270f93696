"""LoRA adapters: equal to PEFT's merged model, or refused by name."""

import contextlib
import dataclasses
import importlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
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
from jaxdelta.report.methods import methods
from jaxdelta.report.page import page
from jaxdelta.run.analyze import analyze

QUERY, EMBEDDING, HEAD = "model.layers.1.self_attn.q_proj", "model.embed_tokens", "lm_head"
ADAPTER = "adapter_model.safetensors"


@contextlib.contextmanager
def peft() -> Iterator[Any]:
    """PEFT, whose warnings, and those of transformers about it, are not ours."""
    with warnings.catch_warnings(action="ignore"):
        yield importlib.import_module("peft")


def train(directory: Path, dtype: str = "float32", **config: Any) -> tuple[Path, Path]:
    """A base model with `model` among the overrides, and an adapter of it that PEFT saved, all at random."""
    model = torch_model(**{"num_hidden_layers": 2} | config.pop("model", {})).to(getattr(torch, dtype))
    model.save_pretrained(directory / "base")
    write_tokenizer(directory / "base")
    with peft() as theirs, torch.no_grad():
        lora = theirs.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
        adapted = theirs.get_peft_model(model, lora)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
        adapted.save_pretrained(directory / "adapter")
    return directory / "base", directory / "adapter"


def loaded_by_peft(base: Path, adapter: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", attn_implementation="eager")
    with peft() as theirs:
        return theirs.PeftModel.from_pretrained(model, adapter).eval()


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
        {"target_modules": "all-linear", "model": TIED},
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
def test_equals_the_model_that_peft_merges(config: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = train(tmp_path, **config)
    ours = open_checkpoint(str(base), adapter=str(adapter))
    with peft():
        merged = loaded_by_peft(base, adapter).merge_and_unload()
    assert_close(by_us(ours), by_name(merged))
    head, embedding = (by_name(merged)[f"{name}.weight"] for name in (HEAD, EMBEDDING))
    assert ours.config.tie_embeddings == (bool((head == embedding).all()) and "model" in config)
    plain = by_us(open_checkpoint(str(base)))
    changed = {name for name, value in plain.items() if not np.array_equal(value, by_us(ours)[name])}
    assert changed and str(adapter)[-50:] in ours.notes[0]


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], EMBEDDINGS])
def test_a_tied_embedding_changes_as_in_the_forward_pass_of_peft(targets: list[str], tmp_path: Path) -> None:
    ensured = {"ensure_weight_tying": True} if targets == EMBEDDINGS else {}
    wanted = targets[:1] if ensured else targets
    base, adapter = train(tmp_path, target_modules=["q_proj", *wanted], model=TIED, **ensured)
    theirs, ours = loaded_by_peft(base, adapter), open_checkpoint(str(base), adapter=str(adapter))
    with torch.no_grad():
        embedding = theirs.get_input_embeddings()(torch.arange(256))
        head = theirs.get_output_embeddings()(torch.eye(48)).T
    np.testing.assert_allclose(ours.embeddings(np.arange(256)), embedding, atol=1e-5)
    np.testing.assert_allclose(ours.head_slice(0, 256), head, atol=1e-5)
    assert "ties its head" in ours.notes[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factors", ["float32", "bfloat16", "float16"])
def test_half_precision_is_rounded_once_as_by_peft(dtype: str, factors: str, tmp_path: Path) -> None:
    base, adapter = train(tmp_path, dtype, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    store(adapter, {name: x.to(getattr(torch, factors)) for name, x in stored(adapter).items()})
    ours = open_checkpoint(str(base), adapter=str(adapter))
    with peft():
        merged = loaded_by_peft(base, adapter).merge_and_unload()
    for name, value in by_us(ours).items():
        wanted = by_name(merged)[name]
        assert str(ours.source.specs[name].dtype) == dtype
        np.testing.assert_allclose(value, wanted, rtol=2.0**-7, atol=1e-6, err_msg=name)
        assert (value == wanted).mean() > 0.99, name


def test_experts_named_one_by_one(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """As PEFT named them before transformers 5 fused experts; PEFT itself still loads such files."""
    base = make_checkpoint(tmp_path / "base", num_hidden_layers=2, **EXPERTS)
    rng, tensors, wanted = np.random.default_rng(0), {}, by_us(open_checkpoint(str(base)))
    for name in [name for name in wanted if ".experts." in name]:
        rows, columns = wanted[name].shape
        a, b = rng.normal(size=(3, columns)), rng.normal(size=(rows, 3))
        wanted[name] = wanted[name] + (5 / 3) * b @ a
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": torch.tensor(a).float()}
        tensors |= {f"{module}.lora_B.weight": torch.tensor(b).float()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    store(adapter, tensors)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5}
    config["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ours = by_us(open_checkpoint(str(base), adapter=str(adapter)))
    assert_close(ours, wanted, 1e-5)
    with peft():
        merged = loaded_by_peft(base, adapter).merge_and_unload()
    assert_close(ours, by_name(merged), 1e-5)


RENAMED: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "with another name": lambda name: name.replace(".weight", ".my_task.weight"),
    "compiled": lambda name: f"_orig_mod.{name}",
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
    "of the bare model": lambda name: name.replace("base_model.model.model.", "base_model.model."),
}


@pytest.mark.parametrize("renamed", RENAMED.values(), ids=RENAMED)
def test_names(renamed: Callable[[str], str], plain: tuple[Path, Path], own: tuple[Path, Path]) -> None:
    base, adapter = own
    store(adapter, {renamed(name): x for name, x in stored(adapter).items()})
    same = open_checkpoint(str(base), adapter=str(plain[1]))
    assert_close(by_us(open_checkpoint(str(base), adapter=str(adapter))), by_us(same), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_file_of_torch_save(dtype: str, own: tuple[Path, Path]) -> None:
    base, adapter = own
    same = by_us(open_checkpoint(str(base), adapter=str(adapter)))
    tensors = {name: x.to(getattr(torch, dtype)) for name, x in stored(adapter).items()}
    (adapter / ADAPTER).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    ours = by_us(open_checkpoint(str(base), adapter=str(adapter)))
    assert_close(ours, same, 0.05 if dtype == "bfloat16" else 1e-6)
    (adapter / "adapter_model.bin").write_bytes(b"no pickle")
    message = one_line(open_adapter, str(adapter))
    assert "holds other objects than tensors" in message and "weights_only" not in message


def test_every_way_of_reading(tmp_path: Path) -> None:
    base, adapter = train(tmp_path, target_modules=["q_proj", "down_proj", *EMBEDDINGS], r=4)
    checkpoint = open_checkpoint(str(base), adapter=str(adapter))
    whole = by_us(checkpoint)
    head, embedding = (whole[f"{name}.weight"] for name in (HEAD, EMBEDDING))
    ids = np.array([[3, 250], [3, 0]])
    np.testing.assert_allclose(checkpoint.embeddings(ids), embedding[ids], atol=1e-6)
    np.testing.assert_allclose(checkpoint.head_rows(ids), head[ids], atol=1e-6)
    np.testing.assert_allclose(checkpoint.head_slice(200, 256), head[200:], atol=1e-6)
    assert_close(parameters(load_model(base, adapter=adapter)), whole)
    axes = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    halves = jax.sharding.NamedSharding(axes, jax.sharding.PartitionSpec("model"))
    on_two = checkpoint.load(lambda name, shape: halves)
    assert_close(parameters(on_two), whole)


def test_rows_are_added_in_blocks(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = map(str, plain)
    whole = by_us(open_checkpoint(base, adapter=adapter))
    monkeypatch.setattr(adapters, "_ROWS", 7)
    assert_close(by_us(open_checkpoint(base, adapter=adapter)), whole)


def test_only_the_factors_of_a_layer_are_read_with_it(
    plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = adapters.open_file

    def recorded(file: Path) -> TensorSource:
        source = original(file)

        def note(name: str, *rows: Any) -> np.ndarray:
            read.append(name)
            return source.read(name, *rows)

        return TensorSource(source.specs, note)

    monkeypatch.setattr(adapters, "open_file", recorded)
    checkpoint = open_checkpoint(str(plain[0]), adapter=str(plain[1]))
    assert not read
    checkpoint.layer(1)
    assert len(read) == len(set(read)) == 14 and all(".layers.1." in name for name in read)


def test_float8_weights_are_dequantised_first(own: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "float8"
    torch_model(num_hidden_layers=2).save_pretrained(base)
    to_float8(base, block=(16, 16))
    change_config(
        base, quantization_config=json.loads((base / "config.json").read_text())["quantization_config"]
    )
    wanted = {name: x.float().numpy() for name, x in dequantised(on_disk(base), (16, 16)).items()}
    checkpoint = open_checkpoint(str(base), adapter=str(own[1]))
    for name, factors in pairs(own[1]).items():
        wanted[name] = wanted[name] + 3.0 * factors["B"] @ factors["A"]
    assert_close(by_us(checkpoint), wanted, 2e-6)
    query = checkpoint.layer(1)["self_attn"]["q_proj"]["weight"][...]
    np.testing.assert_allclose(query, wanted[f"{QUERY}.weight"], atol=2e-6)
    assert any("dequantised" in note for note in checkpoint.notes)


def pairs(adapter: Path) -> dict[str, dict[str, np.ndarray]]:
    """A weight's name -> its factors in float64."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in stored(adapter).items():
        module, factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        found.setdefault(f"{module}.weight", {})[factor] = tensor.double().numpy()
    return found


def test_orbax_before_and_after(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = map(str, plain)
    merged = by_us(open_checkpoint(base, adapter=adapter))
    convert(base, tmp_path / "base")
    assert_close(by_us(open_checkpoint(str(tmp_path / "base"), adapter=adapter)), merged, 0)
    notes = convert(base, tmp_path / "merged", adapter=adapter)
    assert_close(by_us(open_checkpoint(str(tmp_path / "merged"))), merged, 0)
    assert "applied: LoRA of rank 4 on 14 tensors, scale 3" in notes[0]


def test_a_tied_model_is_written_with_the_head_that_it_has(tmp_path: Path) -> None:
    base, adapter = train(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"], model=TIED)
    convert(str(base), tmp_path / "merged", adapter=str(adapter))
    written = open_checkpoint(str(tmp_path / "merged"))
    assert not written.config.tie_embeddings
    assert_close(by_us(written), by_us(open_checkpoint(str(base), adapter=str(adapter))), 0)


def test_a_run(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Streamed or resident, it is the run of the merged model."""
    base, adapter = map(str, plain)
    with peft():
        loaded_by_peft(*plain).merge_and_unload().save_pretrained(tmp_path / "merged")
    write_tokenizer(tmp_path / "merged")
    options: dict[str, Any] = {"bootstrap": 0, "null_draws": 0, "top_k": 2, "views": "none"}
    wanted = analyze(tmp_path / "merged", TEXT, **options)
    for memory in ("stream", "resident"):
        run = analyze(base, TEXT, adapter=adapter, memory=memory, **options)
        for row, other in zip(run.per_layer, wanted.per_layer, strict=True):
            for key in (key for key, value in other.items() if isinstance(value, float)):
                assert math.isclose(row[key], other[key], rel_tol=1e-4, abs_tol=1e-5), key
        assert math.isclose(run.run["calibration_loss"], wanted.run["calibration_loss"], rel_tol=1e-6)
        assert run.run["flags"]["adapter"] == adapter and "LoRA of rank 4" in run.run["notes"][0]
    assert f"{base} with the adapter {adapter}" in methods(run) and f">{adapter}<" in page(run)


def test_a_run_resumes_with_the_same_adapter_only(own: tuple[Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"bootstrap": 0, "null_draws": 0, "views": "none", "adapter": str(own[1])}
    options |= {"checkpoint_dir": str(tmp_path), "keep_checkpoint": True}
    analyze(str(own[0]), TEXT, **options)
    store(own[1], {name: x + 1 for name, x in stored(own[1]).items()})
    assert "is of another run: weights was" in one_line(analyze, str(own[0]), TEXT, **options)
    del options["adapter"]
    assert "is of another run: weights was" in one_line(analyze, str(own[0]), TEXT, **options)


def test_a_loaded_model_has_its_adapter_already(plain: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="load_model"):
        analyze(load_model(plain[0]), TEXT, adapter=str(plain[1]))


NOT_PLAIN = {
    "DoRA": {"use_dora": True},
    "quantised A": {"use_qalora": True},
    "activated": {"alora_invocation_tokens": [1, 2]},
    "rows": {"trainable_token_indices": {"embed_tokens": [1]}},
    "layers repeated": {"layer_replication": [[0, 2], [0, 2]]},
    "blocks": {"use_bdlora": {"nblocks": 2}},
    "arrow": {"arrow_config": {"top_k": 3}},
    "a key of a later PEFT": {"sigmoid_gates": 0.5},
}


@pytest.mark.parametrize("changes", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_other_kinds_are_refused_by_their_key(changes: dict[str, Any], own: tuple[Path, Path]) -> None:
    change(own[1], **changes)
    message = one_line(open_adapter, str(own[1]))
    assert f"{next(iter(changes))}=" in message and "merge_and_unload" in message
    change(own[1], **dict.fromkeys(changes))
    open_adapter(str(own[1]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({"peft_type": kind}, f'"{kind}"') for kind in ("IA3", "LOHA", "VERA", "PREFIX_TUNING", "ADALORA")),
        *(({"init_lora_weights": kind}, kind) for kind in ("pissa_niter_4", "olora", "corda", "loftq")),
        ({"peft_type": None, "lora_parameters": {"rank": 8}}, "mlx_lm.fuse"),
        ({"peft_type": None}, "has no peft_type"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": "8"}, "r must be a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number"),
        (
            {"rank_pattern": {"q_proj": None, "v_proj": 1.5}},
            'rank_pattern "q_proj" must be a positive integer',
        ),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object"),
        ({"rank_pattern": {"q" * 9000: 0}}, "must be a positive integer"),
        ({"\n" * 9000: 1}, "not plain LoRA"),
        ({"rank_pattern": {"q_proj(": 4}}, "is no regular expression"),
        ({"target_modules": "(" * 200}, "is no regular expression"),
        ({"target_modules": {"q_proj": 1}}, "target_modules must be a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a list of layers"),
        ({"bias": "some"}, "bias must be none, all or lora_only"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"base_model_name_or_path": 3}, "must be a string"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_configurations(changes: dict[str, Any], said: str, own: tuple[Path, Path]) -> None:
    change(own[1], **changes)
    message = one_line(open_adapter, str(own[1]))
    assert said in message and len(message) < 800


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_initialisations_that_leave_the_model_alone(start: Any, own: tuple[Path, Path]) -> None:
    change(own[1], init_lora_weights=start, eva_config={"rho": 2.0}, loftq_config={"loftq_bits": 4})
    open_adapter(str(own[1]))


VALUES = [None, True, False, 0, -1, 2**70, 0.5, "", "x", "(", [], [None], [[1]], {}, {"a": None}, {"": {}}]


def test_values_of_every_type(own: tuple[Path, Path]) -> None:
    file = own[1] / "adapter_config.json"
    config = json.loads(file.read_text())
    adapter, model = open_adapter(str(own[1])), open_checkpoint(str(own[0]))
    for key in config:
        for value in VALUES:
            file.write_text(json.dumps(config | {key: value}))
            try:
                lora = read_adapter_config(file)
                assert (
                    lora.rank(QUERY) > 0 and lora.scale(QUERY) > 0 and lora.is_target(QUERY) in (True, False)
                )
                dataclasses.replace(adapter, lora=lora).applied(model.source, tied=False)
            except JaxDeltaError as error:
                assert len(str(error)) < 800 and "\n" not in str(error)
    for text in ("", "[]", "nul", "{" * 100_000, "\x00"):
        file.write_text(text)
        assert one_line(read_adapter_config, file)


def test_tensors_that_do_not_fit(own: tuple[Path, Path]) -> None:
    base, adapter = own
    whole = stored(adapter)
    a, b = (f"base_model.model.{QUERY}.lora_{factor}.weight" for factor in "AB")
    others = {name.replace("layers", "blocks"): x for name, x in whole.items()}
    numbered = {name.replace("layers.1", "layers.7"): x for name, x in whole.items()}
    cases = {
        "1 lack their other factor (" + a[17:]: {name: x for name, x in whole.items() if name != b},
        "1 have another shape (" + b[17:] + " is (64, 3), not (64, 4))": whole | {b: whole[b][:, :3]},
        "2 have another shape": whole | {a: whole[a].T, b: whole[b].T},
        f"{len(whole)} fit no tensor of the model (model.blocks.0.": others,
        "14 fit no tensor of the model (model.layers.7.": numbered,
        "1 fit no tensor of the model (extra.weight)": whole | {"extra.weight": whole[a]},
        "1 are there twice": whole | {a.replace(".weight", ".other.weight"): whole[a]},
        "holds no tensors": {},
        "is (260, 48), not (256, 48)); if training resized the vocabulary": whole
        | {"base_model.model.lm_head.weight": torch.zeros(260, 48)},
    }
    for said, tensors in cases.items():
        store(adapter, tensors)
        message = one_line(open_checkpoint, str(base), adapter=str(adapter))
        assert said in message and len(message) < 800


def test_other_models(plain: tuple[Path, Path], tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    """A larger model, and one with experts: every tensor of the adapter is counted, three are named."""
    for name, sizes in {"wide": {"hidden_size": 64}, "experts": EXPERTS}.items():
        other = make_checkpoint(tmp_path / name, num_hidden_layers=2, **sizes)
        message = one_line(open_checkpoint, str(other), adapter=str(plain[1]))
        assert "does not fit the model: of its 28 tensors" in message and len(message) < 800


def test_tensors_that_the_configuration_does_not_target(own: tuple[Path, Path]) -> None:
    """PEFT loads a part of such a file without an error."""
    for changes in (
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["k_proj"]},
        {"target_modules": ".*q_proj"},
    ):
        whole = json.loads((own[1] / "adapter_config.json").read_text())
        change(own[1], **changes)
        assert "does not target" in one_line(open_checkpoint, str(own[0]), adapter=str(own[1]))
        change(own[1], **whole)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    change(own[1], target_modules=names, layers_to_transform=[1])
    message = one_line(open_checkpoint, str(own[0]), adapter=str(own[1]))
    assert "14 are of modules that adapter_config.json does not target (model.layers.0." in message


def test_targets_without_tensors_are_said(own: tuple[Path, Path]) -> None:
    """PEFT warns of them: a model of more layers than the one that the adapter was trained on has such."""
    whole = stored(own[1])
    change(own[1], target_modules=["q_proj", "v_proj"])
    store(own[1], {name: x for name, x in whole.items() if "layers.0.self_attn.q_proj" in name})
    applied, unchanged = open_checkpoint(str(own[0]), adapter=str(own[1])).notes
    assert "on 1 tensors" in applied
    assert unchanged.startswith("3 targets") and "model.layers.0.self_attn.v_proj.weight" in unchanged


def test_modules_to_save(own: tuple[Path, Path]) -> None:
    """A classifier's head is left out, as no layer needs it; a module of the model must be there."""
    base, adapter = own
    change(adapter, modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    store(adapter, stored(adapter) | {"base_model.model.score.weight": torch.zeros(2, 48)})
    assert (
        "left out, as no layer needs it: score.weight"
        in open_checkpoint(str(base), adapter=str(adapter)).notes[1]
    )
    change(adapter, modules_to_save=["lm_head", "score"])
    message = one_line(open_checkpoint, str(base), adapter=str(adapter))
    assert "1 are missing, though modules_to_save names them (lm_head.weight)" in message


def test_an_adapter_is_no_model(own: tuple[Path, Path]) -> None:
    base, adapter = own
    change(adapter, base_model_name_or_path="owner/base-8B")
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())  # as some trainers do
    message = one_line(open_checkpoint, str(adapter))
    assert f"--model=owner/base-8B --adapter={adapter}" in message
    (adapter / "adapter_config.json").write_text("{}")
    assert f"--model=BASE_MODEL --adapter={adapter}" in one_line(load_model, adapter, loader="torch")


@pytest.mark.parametrize("loader", ["auto", "torch"])
def test_an_adapter_beside_weights_is_not_applied_and_said(
    loader: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    for directory in plain:
        for file in directory.glob("*.*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert (tmp_path / WEIGHTS).exists()
    with peft():
        checkpoint = open_checkpoint(str(tmp_path), loader=loader)
    assert_close(by_us(checkpoint), by_us(open_checkpoint(str(plain[0]))), 0)
    assert f"--adapter={tmp_path} applies it" in checkpoint.notes[0]
    own = open_checkpoint(str(tmp_path), adapter=str(tmp_path))
    assert_close(by_us(own), by_us(open_checkpoint(str(plain[0]), adapter=str(plain[1]))), 0)


def test_another_base_and_tokenizer_are_said(own: tuple[Path, Path]) -> None:
    base, adapter = own
    change(adapter, base_model_name_or_path="owner/Base")  # the directory's name in other letters
    assert len(open_checkpoint(str(base), adapter=str(adapter)).notes) == 1
    change(adapter, revision="v2")
    assert "revision v2" in open_checkpoint(str(base), adapter=str(adapter)).notes[1]
    change(adapter, base_model_name_or_path="owner/other")
    (adapter / "tokenizer.json").write_text("{}")
    _, other, tokenizer = open_checkpoint(str(base), adapter=str(adapter)).notes
    assert "trained on owner/other" in other and "another tokenizer.json" in tokenizer


def test_directories_without_an_adapter(own: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = own
    assert "has no adapter_config.json; there is one in adapter" in one_line(open_adapter, str(tmp_path))
    assert "is it an adapter of PEFT?" in one_line(open_adapter, str(base))
    assert "is a file; give the directory" in one_line(open_adapter, str(adapter / ADAPTER))
    assert "no such directory" in one_line(open_adapter, str(tmp_path / "none"))
    (adapter / ADAPTER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in one_line(open_adapter, str(adapter))
    (adapter / ADAPTER).write_bytes(b"\xff" * 100)
    assert "is not a whole safetensors file" in one_line(open_adapter, str(adapter))
    (adapter / ADAPTER).unlink()
    assert "has no adapter_model.safetensors and no adapter_model.bin" in one_line(open_adapter, str(adapter))
    with pytest.raises(UsageError, match="adapter is empty"):
        open_adapter("")


def test_adapters_on_the_hub(own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(repo: str, name: str, **options: Any) -> str:
        if not (own[1] / name).exists():
            raise EntryNotFoundError(name)
        return str(own[1] / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert open_adapter("owner/adapter").directory == own[1]
    assert "--adapter=owner/adapter" in one_line(open_checkpoint, "owner/adapter")
    tensors = stored(own[1])
    (own[1] / ADAPTER).unlink()
    torch.save(tensors, own[1] / "adapter_model.bin")
    assert len(open_adapter("owner/adapter").tensors.specs) == 28
