"""Directions written for steering tools are read back as llama.cpp and repeng read them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.analysis import Analysis
from jaxdelta.run.analyze import analyze

N, K, D = 4, 3, 48


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path) -> Analysis:
    return analyze(str(tiny_checkpoint), max_tokens=60, top_k=K, bootstrap=0, null_draws=0)


def as_llama_cpp(path: Path) -> np.ndarray:
    """What llama.cpp adds to the output of each of its layers, by the rules of its loader and its adapter."""
    data = np.zeros(0, np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        word, _, number = tensor.name.partition(".")
        layer = int(number)
        assert word == "direction" and layer > 0
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(tensor.shape) == 1
        data.resize(max(data.size, D * layer), refcheck=False)
        data[D * (layer - 1) : D * layer] += tensor.data  # the buffer begins with layer 1
    added = np.zeros((N, D), np.float32)
    for layer in range(1, N):
        start = D * (layer - 1)
        if start + D <= len(data):
            added[layer] = data[start : start + D]
    return added


def as_repeng(path: Path) -> tuple[str, dict[int, np.ndarray]]:
    """The model's type and the directions by layer."""
    reader = gguf.GGUFReader(path)
    hint = reader.get_field("controlvector.model_hint")
    assert hint is not None
    directions = {int(tensor.name.split(".")[1]): tensor.data for tensor in reader.tensors}
    return bytes(hint.parts[-1]).decode(), directions


def test_llama_cpp_adds_a_layers_direction_after_that_layer(run: Analysis, tmp_path: Path) -> None:
    path = run.save_directions(tmp_path / "all.gguf")
    np.testing.assert_array_equal(as_llama_cpp(path)[1:], run.directions[1:, 0])
    np.testing.assert_array_equal(as_llama_cpp(path)[0], 0)
    some = as_llama_cpp(run.save_directions(tmp_path / "some.gguf", layers=[2], rank=3))
    np.testing.assert_array_equal(some, np.where(np.arange(N)[:, None] == 2, run.directions[:, 2], 0))


def test_repeng_finds_model_and_layers(run: Analysis, tmp_path: Path) -> None:
    path = run.save_directions(tmp_path / "a.gguf")
    hint, directions = as_repeng(path)
    assert hint == run.run["model_type"] == "qwen3"
    assert sorted(directions) == [1, 2, 3]
    for layer, direction in directions.items():
        np.testing.assert_array_equal(direction, run.directions[layer, 0])
    fields = gguf.GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.layer_count"].contents() == 3


def test_safetensors_holds_the_same_and_may_hold_layer_0(run: Analysis, tmp_path: Path) -> None:
    path = run.save_directions(tmp_path / "a.safetensors", layers=range(N))
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == {f"direction.{layer}" for layer in range(N)}
    for layer in range(N):
        np.testing.assert_array_equal(found[f"direction.{layer}"], run.directions[layer, 0])
    assert metadata["general.architecture"] == "controlvector"
    assert (metadata["controlvector.layer_count"], metadata["controlvector.model_hint"]) == ("4", "qwen3")


def test_lengths(run: Analysis, tmp_path: Path) -> None:
    rows = run.per_layer[1:]
    wanted = {
        "unit": [1.0] * 3,
        "rms": [row["top_singvals"][1] / row["n"] ** 0.5 for row in rows],
        "norm": [row["token_norm_mean"] for row in rows],
    }
    for scale, lengths in wanted.items():
        path = run.save_directions(tmp_path / f"{scale}.gguf", rank=2, scale=scale)
        added = as_llama_cpp(path)[1:]
        np.testing.assert_allclose(np.linalg.norm(added, axis=1), lengths, rtol=1e-5)
        assert (np.einsum("ld,ld->l", added, run.directions[1:, 1]) > 0).all()


def test_a_sign_strengthens_what_the_layer_writes(run: Analysis, tiny_checkpoint: Path) -> None:
    """The summed update points along it."""
    import jaxdelta
    from jaxdelta.text.documents import read_documents
    from jaxdelta.text.tokenizer import load_encoder
    from jaxdelta.text.windows import tokenize

    tokens = tokenize(read_documents(None), load_encoder(tiny_checkpoint), max_tokens=60, vocab_size=256)
    stream = jaxdelta.residual_stream(jaxdelta.load_model(str(tiny_checkpoint)), tokens.ids)
    written = np.asarray(stream.attention + stream.mlp)[:, 0, 1:].sum(axis=1)
    assert (np.einsum("ld,lkd->lk", written, run.directions) > 0).all()


def test_the_same_run_gives_the_same_bytes(run: Analysis, tmp_path: Path) -> None:
    first, second = (run.save_directions(tmp_path / f"{name}.gguf") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.bin", {}, "must end in .gguf or .safetensors"),
        ("a.gguf", {"rank": 0}, "rank must be 1 to 3"),
        ("a.gguf", {"rank": 4}, "rank must be 1 to 3"),
        ("a.gguf", {"layers": [0, 1]}, "llama.cpp refuses a file with layer 0"),
        ("a.gguf", {"layers": [4]}, "layers: 4 is none of the 4"),
        ("a.gguf", {"layers": [-1]}, "layers: -1 is none of the 4"),
        ("a.gguf", {"layers": []}, "none is left"),
        ("a.gguf", {"scale": "large"}, "scale must be one of unit, rms, norm"),
        ("run.safetensors", {}, "is the name of an analysis' own arrays"),
    ],
)
def test_what_cannot_be_written(
    run: Analysis, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        run.save_directions(tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_where_it_cannot_be_written(run: Analysis, tmp_path: Path) -> None:
    with pytest.raises(JaxDeltaError, match="cannot be written"):
        run.save_directions(tmp_path / "missing" / "a.gguf")


def test_a_direction_after_the_final_norm_is_in_no_stream(run: Analysis, tmp_path: Path) -> None:
    normed = dataclasses.replace(run, run=run.run | {"last_state": "normed"})
    assert sorted(as_repeng(normed.save_directions(tmp_path / "a.gguf"))[1]) == [1, 2]
    with pytest.raises(UsageError, match="last_state=normed"):
        normed.save_directions(tmp_path / "b.gguf", layers=[3])


def test_a_run_of_the_first_version(run: Analysis, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "n"} for row in run.per_layer]
    old = dataclasses.replace(run, per_layer=rows, run={})
    assert as_repeng(old.save_directions(tmp_path / "a.gguf"))[0] == "qwen3"
    with pytest.raises(UsageError, match="scale=rms needs"):
        old.save_directions(tmp_path / "b.gguf", scale="rms")


def test_without_gguf_a_line_says_what_to_install(
    run: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(JaxDeltaError, match=r"pip install 'jaxdelta\[steering\]'"):
        run.save_directions(tmp_path / "a.gguf")
    assert run.save_directions(tmp_path / "a.safetensors").exists()
