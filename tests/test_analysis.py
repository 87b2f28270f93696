"""analyze() from end to end, against a plain NumPy float64 analysis of transformers' own hidden states."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import EXPERTS, summarise_from
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxdelta
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.tables import tables
from jaxdelta.run import analyze as analysis
from jaxdelta.run.analyze import analyze
from jaxdelta.run.options import Options
from jaxdelta.spectra import scheduler
from jaxdelta.spectra.spectrum import Spectrum, decompose
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import SEPARATOR

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TEXT = [
    "The cat sat on the mat, and looked at the moon.",
    "Über 漢字: 3x + 7 = 22.",
    "def f(n):\n    return n",
]
K = 4
PHASES = "A:0-1,B:2-3"
PER_LAYER = [
    "L",
    "phase",
    "frob",
    "token_norm_mean",
    "token_norm_std",
    "h_norm_mean",
    "rel_step_mean",
    "rel_step_std",
    "cos_delta_h_mean",
    "parallel_frac",
    "top_singvals",
    "eff_rank",
    "top1_frac",
    "top3_frac",
    "top10_frac",
]
TOP = [
    "model",
    "num_layers",
    "hidden",
    "n_calib_tokens",
    "per_layer",
    "top1_cos_adjacent",
    "schema_version",
    "text",
    "phase_overlap",
    "block_capture",
    "last_layer_normed",
    "last_layer_residual",
    "run",
    "overlap",
    "verdict",
    "control",
]


def run(directory: Path, calibration: Any = TEXT, **options: Any) -> Analysis:
    return analyze(str(directory), calibration, **{"top_k": K, "phases": PHASES} | options)


def transformers_states(directory: Path, ids: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """The states that enter each layer and the last before the final norm; and the last after it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        states = model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False).hidden_states
    *entering, after_norm = [state[0].numpy() for state in states]
    return [*entering, before_norm[0][0].numpy()], after_norm


def plain_row(layer: int, phase: str, h: np.ndarray, after: np.ndarray, k: int) -> dict[str, Any]:
    """The reference's figures of one layer, as defined."""
    h, delta = h[1:].astype(np.float64), after[1:].astype(np.float64) - h[1:].astype(np.float64)
    norms, h_norms = np.linalg.norm(delta, axis=1), np.linalg.norm(h, axis=1)
    steps = norms / np.maximum(h_norms, 1e-8)
    cosines = np.sum(delta * h, axis=1) / np.maximum(norms * h_norms, 1e-8)
    _, values, vectors = np.linalg.svd(delta, full_matrices=False)
    p = values**2 / np.sum(values**2)
    kept = p[p > 1e-12]
    return {
        "L": layer,
        "phase": phase,
        "frob": np.linalg.norm(delta),
        "token_norm_mean": norms.mean(),
        "token_norm_std": norms.std(),
        "h_norm_mean": h_norms.mean(),
        "rel_step_mean": steps.mean(),
        "rel_step_std": steps.std(),
        "cos_delta_h_mean": cosines.mean(),
        "parallel_frac": np.abs(cosines).mean(),
        "top_singvals": values[:k],
        "eff_rank": np.exp(-np.sum(kept * np.log(kept))),
        "top1_frac": p[:1].sum(),
        "top3_frac": p[:3].sum(),
        "top10_frac": p[:10].sum(),
        "values": values,
        "directions": vectors[:k],
    }


def plain_relations(rows: list[dict[str, Any]]) -> tuple[np.ndarray, list[dict], list[dict]]:
    """top1_cos, the phase table and the captures, as defined."""
    first = np.array([row["directions"][0] for row in rows])
    cosines, table, captures = first @ first.T, [], []
    for name in dict.fromkeys(row["phase"] for row in rows):
        own = [row["L"] for row in rows if row["phase"] == name]
        others = [row["L"] for row in rows if row["phase"] != name]
        pairs = [abs(cosines[i, j]) for i in own for j in own if i < j]
        mixed = [abs(cosines[i, j]) for i in own for j in others]
        intra, cross = np.mean(pairs) if pairs else 1.0, np.mean(mixed) if mixed else 0.0
        table.append({"phase": name, "layers": len(own), "intra_cos_mean": intra, "cross_cos_mean": cross})
        if len(own) > 1:
            stack = np.concatenate([rows[layer]["directions"] for layer in own])
            basis = np.linalg.svd(stack, full_matrices=False)[2][:8]
            captures += [
                {"phase": name, "L": layer, "capture": np.sum((basis @ first[layer]) ** 2)} for layer in own
            ]
    return cosines, table, captures


def assert_row(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert set(found) >= set(PER_LAYER)
    for key in PER_LAYER:
        if key in ("L", "phase"):
            assert found[key] == wanted[key]
        elif key in ("cos_delta_h_mean", "parallel_frac"):
            np.testing.assert_allclose(found[key], wanted[key], rtol=0, atol=tolerance, err_msg=key)
        else:
            np.testing.assert_allclose(found[key], wanted[key], rtol=tolerance, err_msg=key)


@pytest.fixture(scope="module")
def result(tiny_checkpoint: Path) -> Analysis:
    return run(tiny_checkpoint)


@pytest.fixture(scope="module")
def changed(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]
) -> Callable[[Callable[[dict[str, np.ndarray]], None]], Path]:
    """changed(change): a tiny checkpoint whose tensors `change` has changed in place."""

    def make(change: Callable[[dict[str, np.ndarray]], None]) -> Path:
        directory = make_checkpoint(tmp_path_factory.mktemp("changed"))
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


# Every figure


@pytest.mark.parametrize("last_state", ["residual", "normed"])
@pytest.mark.parametrize("max_tokens", [2048, 30], ids=["n > d", "n < d"])
@pytest.mark.parametrize("phases", [PHASES, None, "one:0-3"])
def test_every_figure(tiny_checkpoint: Path, last_state: str, max_tokens: int, phases: str | None) -> None:
    found = run(tiny_checkpoint, last_state=last_state, max_tokens=max_tokens, phases=phases)
    ids = _byte_ids(tiny_checkpoint, SEPARATOR.join(TEXT))[:max_tokens]
    states, normed = transformers_states(tiny_checkpoint, ids)
    names = {PHASES: "AABB", None: "ACDE"}.get(phases, ["one"] * 4)
    after = [*states[1:-1], normed if last_state == "normed" else states[-1]]
    rows = [plain_row(i, names[i], states[i], after[i], K) for i in range(4)]
    cosines, table, captures = plain_relations(rows)

    assert (found.num_layers, found.hidden, found.n_calib_tokens) == (4, 48, len(ids))
    for row, wanted in zip(found.per_layer, rows, strict=True):
        assert_row(row, wanted)
    assert_row(found.last_layer_residual, plain_row(3, names[3], states[3], states[4], K))
    assert_row(found.last_layer_normed, plain_row(3, names[3], states[3], normed, K))
    np.testing.assert_allclose(np.abs(found.top1_cos), np.abs(cosines), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        np.abs(found.top1_cos_adjacent), np.abs(np.diagonal(cosines, 1)), rtol=0, atol=1e-4
    )
    for rows_found, rows_wanted in ((found.phase_overlap, table), (found.block_capture, captures)):
        assert len(rows_found) == len(rows_wanted)
        for row, wanted in zip(rows_found, rows_wanted, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
    np.testing.assert_allclose(found.singular_values, [row["values"] for row in rows], rtol=1e-4)
    for i, row in enumerate(rows):
        assert np.all(np.abs(np.sum(found.directions[i] * row["directions"], axis=1)) > 1 - 1e-4)


@pytest.mark.parametrize("kinds", [{}, {"mlp_only_layers": [0, 2]}], ids=["sparse", "mixed"])
def test_every_figure_of_experts(
    kinds: dict[str, Any], tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    make_checkpoint(tmp_path, **EXPERTS | kinds)
    found = run(tmp_path)
    ids = _byte_ids(tmp_path, SEPARATOR.join(TEXT))
    states, normed = transformers_states(tmp_path, ids)
    rows = [plain_row(i, "AABB"[i], states[i], states[i + 1], K) for i in range(4)]
    for row, wanted in zip(found.per_layer, rows, strict=True):
        assert_row(row, wanted)
    assert_row(found.last_layer_normed, plain_row(3, "B", states[3], normed, K))
    np.testing.assert_allclose(found.singular_values, [row["values"] for row in rows], rtol=1e-4)
    assert found.run["calibration_loss"] == pytest.approx(transformers_loss(tmp_path, ids), rel=1e-5)
    assert found.run["closure_error"] < 1e-5
    tokens = Tokens(np.array([ids], np.int32), np.zeros((1, len(ids)), np.int32))
    resident = analyze(jaxdelta.load_model(str(tmp_path)), tokens, top_k=K, phases=PHASES)
    np.testing.assert_allclose(resident.singular_values, found.singular_values, rtol=1e-6)
    assert resident.run["calibration_loss"] == pytest.approx(found.run["calibration_loss"], rel=1e-6)


def test_layers_of_different_dtypes(
    tiny_checkpoint: Path, result: Analysis, changed: Callable[..., Path]
) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    found = run(changed(change))
    for row, wanted in zip(found.per_layer, result.per_layer, strict=True):
        assert row["frob"] == pytest.approx(wanted["frob"], rel=0.02)
    assert found.per_layer[0]["frob"] == pytest.approx(result.per_layer[0]["frob"], rel=1e-6)
    assert found.per_layer[2]["frob"] != pytest.approx(result.per_layer[2]["frob"], rel=1e-5)


def transformers_loss(directory: Path, ids: Sequence[int]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), labels=torch.tensor([list(ids)])).loss.item()


def test_loss_is_that_of_transformers(tiny_checkpoint: Path, result: Analysis) -> None:
    loss = transformers_loss(tiny_checkpoint, _byte_ids(tiny_checkpoint, SEPARATOR.join(TEXT)))
    assert result.run["calibration_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.run["closure_error"] < 1e-5


def test_methods_agree(tiny_checkpoint: Path, result: Analysis) -> None:
    full = run(tiny_checkpoint, svd="full")
    for row, other in zip(result.per_layer, full.per_layer, strict=True):
        for key in PER_LAYER[2:]:
            np.testing.assert_allclose(row[key], other[key], rtol=1e-8, err_msg=key)
    np.testing.assert_allclose(result.top1_cos, full.top1_cos, rtol=0, atol=1e-7)
    np.testing.assert_allclose(result.directions, full.directions, rtol=0, atol=1e-6)


def test_a_failed_spectrum_is_computed_again(
    tiny_checkpoint: Path, result: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> tuple[Spectrum, Any]:
        found, coordinates = decompose(*arguments)
        spoiled = Spectrum(found.singular_values * np.nan, found.directions * 0.5, found.residual + 1)
        return spoiled, coordinates * np.nan

    monkeypatch.setattr(scheduler, "decompose", fails)
    mended = run(tiny_checkpoint, top_k=7)  # so many in no other test: what is compiled here is wrong
    assert result.run["rows_on_host"] == []
    assert mended.run["rows_on_host"] == [0, 1, 2, 3, 4]
    assert mended.run["certificate"] < 1e-12
    for row, other in zip(result.per_layer, mended.per_layer, strict=True):
        for key in PER_LAYER[2:]:
            if key != "top_singvals":
                np.testing.assert_allclose(row[key], other[key], rtol=1e-8, err_msg=key)
        np.testing.assert_allclose(row["top_singvals"], other["top_singvals"][:K], rtol=1e-8)
    np.testing.assert_allclose(result.directions, mended.directions[:, :K], rtol=0, atol=1e-6)


def test_bfloat16_is_close(tiny_checkpoint: Path, result: Analysis) -> None:
    coarse = run(tiny_checkpoint, compute_dtype="bfloat16", residual_dtype="bfloat16")
    for row, other in zip(result.per_layer, coarse.per_layer, strict=True):
        assert row["frob"] == pytest.approx(other["frob"], rel=0.03)
        assert row["frob"] != other["frob"]
    assert (coarse.run["compute_dtype"], coarse.run["residual_dtype"]) == ("bfloat16", "bfloat16")


def test_two_runs_are_identical(tiny_checkpoint: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("a.json", "b.json"):
        found = run(tiny_checkpoint)
        for timing in [key for key in found.run if "second" in key]:
            del found.run[timing]
        json_file, arrays_file = found.save(tmp_path / name)
        contents.append((json_file.read_text().splitlines(), arrays_file.read_bytes()))
    (lines, arrays), (lines_again, arrays_again) = contents
    assert lines_again == lines
    assert arrays_again == arrays


# What it takes


def test_loaded_model_and_tokens(tiny_checkpoint: Path, result: Analysis) -> None:
    ids = np.array([_byte_ids(tiny_checkpoint, SEPARATOR.join(TEXT))], np.int32)
    tokens = Tokens(ids, np.zeros_like(ids))
    model = jaxdelta.load_model(str(tiny_checkpoint))
    for given in (model, str(tiny_checkpoint)):
        found = jaxdelta.analyze(given, tokens, top_k=K, phases=PHASES)
        assert found.n_calib_tokens == result.n_calib_tokens
        for row, other in zip(result.per_layer, found.per_layer, strict=True):
            for key in PER_LAYER[2:]:
                np.testing.assert_allclose(row[key], other[key], rtol=1e-5, atol=1e-7, err_msg=key)
    with pytest.raises(UsageError, match="tokenizer is missing"):
        analyze(model, TEXT)


def test_calibration_of_every_kind(tiny_checkpoint: Path, tmp_path: Path, result: Analysis) -> None:
    (tmp_path / "a.txt").write_text(SEPARATOR.join(TEXT))
    (tmp_path / "a.json").write_text(json.dumps(TEXT))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    for given in (str(tmp_path / "a.txt"), tmp_path / "a.json", tmp_path / "a.jsonl", tuple(TEXT)):
        found = run(tiny_checkpoint, given)  # a .txt is one document, so only the figures are the same
        for row, other in zip(found.per_layer, result.per_layer, strict=True):
            for key in PER_LAYER[2:]:  # sums are taken by document
                assert row[key] == pytest.approx(other[key], rel=1e-12)
    prompts = run(tiny_checkpoint, None, max_tokens=30)
    assert prompts.n_calib_tokens == 30


def test_what_is_said_of_the_text(tiny_checkpoint: Path, result: Analysis) -> None:
    assert result.run["text"] == {
        "layout": "stream",
        "windows": 1,
        "window_length": result.n_calib_tokens,
        "padding": 0,
        "counted": result.n_calib_tokens - 1,
    }
    again = run(tiny_checkpoint, iter(TEXT))
    assert again.run["text_fingerprint"] == result.run["text_fingerprint"]
    shuffled = [
        run(tiny_checkpoint, shuffle=True, seed=seed, max_tokens=60, bootstrap=0, null_draws=0).run
        for seed in (0, 0, 1)
    ]
    prints = [facts["text_fingerprint"] for facts in shuffled]
    assert prints[0] == prints[1] != prints[2]


def test_listener_hears_of_every_stage(tiny_checkpoint: Path) -> None:
    lines: list[str] = []
    found = run(tiny_checkpoint, listener=lines.append)
    (times,) = [line for line in lines if line.startswith("   ")]
    lines.remove(times)
    assert [line.split()[0] for line in lines] == list(found.run["seconds"])
    assert all("\n" not in line for line in lines)
    for what in found.run["layers_seconds"]:
        assert f"{what} {found.run['layers_seconds'][what]:.2f} s" in times
    assert f"{found.run['tokens_per_second']:,.0f} tokens/s: " in times
    assert times.endswith(("bound by computing", "bound by reading"))


def test_progress_where_somebody_looks(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(error: io.StringIO, progress: bool) -> str:
        monkeypatch.setattr(sys, "stderr", error)
        run(tiny_checkpoint, progress=progress, bootstrap=0, null_draws=0)
        return error.getvalue()

    bar = shown(Terminal(), True)
    for part in (" layer 1 of ", "tokens/s", "left"):
        assert part in bar
    assert not shown(Terminal(), False)
    assert not shown(io.StringIO(), True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_k": -3}, "top_k must be at least 1, not -3"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, not 1"),
        ({"last_state": "final"}, "last_state must be one of residual, normed, not 'final'"),
        ({"svd": "fast"}, "svd must be one of gram, full, not 'fast'"),
        ({"compute_dtype": "float16"}, "compute_dtype must be one of"),
        ({"residual_dtype": "float64"}, "residual_dtype must be one of"),
        ({"loader": "pickle"}, "loader must be one of"),
        ({"phases": "A:0-2"}, "phases: no phase for layer 3"),
        ({"top_k": 49}, "top_k=49 is larger than the rank 48 of"),
        ({"top_k": 30, "max_tokens": 20}, "top_k=30 is larger than the rank 19 of"),
    ],
)
def test_options(tiny_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        run(tiny_checkpoint, **options)
    assert message in str(raised.value)
    assert raised.value.status == 2


def test_every_option_has_its_flag() -> None:
    commands = Path(__file__).parents[1] / "jaxdelta" / "commands"
    text = "".join((commands / name).read_text() for name in ("analyze.py", "_flags.py"))
    for field in dataclasses.fields(Options):
        assert re.search(rf'"{field.name}"|\b{field.name}="', text), field.name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"topk": 3}, "no option 'topk'; did you mean top_k?"),
        ({"banana": 3}, "no option 'banana'"),
        ({"top_k": "many"}, "top_k must be int, not 'many'"),
        ({"top_k": 2.5}, "top_k must be int, not 2.5"),
        ({"top_k": True}, "top_k must be int, not True"),
        ({"shuffle": 1}, "shuffle must be bool, not 1"),
        ({"scratch": b"a"}, "scratch must be str | None, not b'a'"),
        ({"scratch": "a\0"}, "scratch must be str | None, not "),
        ({"top_k": np.ones(1, int)}, "top_k must be int, not "),
        ({"sink_factor": math.inf}, "sink_factor must be float, not inf"),
        ({"sink_factor": None}, "sink_factor must be float, not None"),
    ],
)
def test_what_is_no_option(tiny_checkpoint: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        run(tiny_checkpoint, **option)
    assert str(raised.value).startswith(message)


def test_python_raises_what_the_script_prints(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(jaxdelta.JaxDeltaError, match=f"{missing}: no such directory"):
        jaxdelta.analyze(missing)
    with pytest.raises(jaxdelta.JaxDeltaError, match=f"{missing}: no such directory"):
        jaxdelta.load_model(missing)
    with pytest.raises(
        jaxdelta.UsageError, match=r"top_k=129 is larger than the rank 128 of a layer's update"
    ):
        jaxdelta.analyze("demo", top_k=129)
    command = [sys.executable, str(SCRIPTS / "delta_svd.py"), "--model=demo", f"--out={tmp_path}/a.json"]
    done = subprocess.run([*command, "--top_k=129"], capture_output=True, text=True)
    assert done.stderr == "delta_svd.py: top_k=129 is larger than the rank 128 of a layer's update\n"
    assert (done.returncode, list(tmp_path.iterdir())) == (jaxdelta.UsageError.status, [])


# Updates that are zero, or nearly


def test_a_layer_that_writes_nothing(changed: Callable[..., Path], tmp_path: Path) -> None:
    def silence(tensors: dict[str, np.ndarray]) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.1.{name}.weight"][:] = 0

    directory = changed(silence)
    found = run(directory)
    row = found.per_layer[1]
    assert row["note"] == "zero update: it has no directions"
    assert row["top_singvals"] == [0] * K
    for key in PER_LAYER[2:]:
        if key not in ("top_singvals", "h_norm_mean"):
            assert row[key] == 0, key
    assert row["h_norm_mean"] > 0
    assert not found.directions[1].any()
    assert not found.top1_cos[1].any()
    assert all("note" not in other for other in (*found.per_layer[:1], *found.per_layer[2:]))
    assert found.run["certificate"] < 1e-12
    found.save(tmp_path / "a.json")  # finite throughout
    assert "nan" not in tables(found).lower()
    assert run(directory, svd="full").per_layer[1] == row


def test_all_layers_write_nothing(changed: Callable[..., Path], tmp_path: Path) -> None:
    def silence(tensors: dict[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            if "o_proj" in name or "down_proj" in name:
                tensor[:] = 0

    found = run(changed(silence))
    assert all(row["eff_rank"] == 0 for row in found.per_layer)
    assert found.last_layer_normed["eff_rank"] > 1
    found.save(tmp_path / "a.json")
    assert "nan" not in tables(found).lower()


def test_more_directions_than_a_layer_writes(
    changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directions that are missing are zero, and a note says so."""

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.2.{name}.weight"][2:] = 0  # writes into two dimensions only

    directory = changed(narrow)
    found, two = run(directory), run(directory, top_k=2)
    row = found.per_layer[2]
    assert row["note"] == "rank 2: the directions beyond it are zero"
    assert row["mlp"]["note"] == row["note"] and "note" not in two.per_layer[2]
    assert row["eff_rank"] <= 2 and row["top_singvals"][2:] == pytest.approx([0, 0], abs=1e-6)
    assert all("note" not in other for other in (*found.per_layer[:2], found.per_layer[3]))
    assert not found.directions[2, 2:].any() and not found.directions[2, :, 2:].any()
    np.testing.assert_allclose(found.directions[2, :2], two.directions[2], rtol=0, atol=1e-6)
    assert not found.principal_cosines[2, :, 2:].any()
    assert found.run["certificate"] < 1e-12 and found.run["rows_on_host"] == []
    found.save(tmp_path / "a.json")  # finite throughout
    assert "nan" not in tables(found).lower()
    assert run(directory, svd="full").per_layer[2]["note"] == row["note"]
    summarise_from(monkeypatch, "moments")
    moments = run(directory)
    assert moments.per_layer[2]["note"] == row["note"] and not moments.directions[2, 2:].any()


def test_weights_that_are_not_finite(changed: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.inf

    with pytest.raises(JaxDeltaError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        run(changed(spoil))


# Files


def test_json(result: Analysis, tmp_path: Path) -> None:
    written = result.save(tmp_path / "a.json")
    assert sorted(written) == sorted(tmp_path.iterdir())
    fields = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(fields) == set(TOP)
    assert fields["schema_version"] == 2
    assert len(fields["per_layer"]) == 4
    for row in (*fields["per_layer"], fields["last_layer_normed"], fields["last_layer_residual"]):
        assert set(row) >= set(PER_LAYER)
        assert len(row["top_singvals"]) == K
        assert all(math.isfinite(row[key]) for key in PER_LAYER[2:] if key != "top_singvals")
    assert len(fields["top1_cos_adjacent"]) == 3
    assert [set(row) for row in fields["phase_overlap"]] == [
        {"phase", "layers", "intra_cos_mean", "cross_cos_mean"}
    ] * 2
    assert [(row["phase"], row["L"]) for row in fields["block_capture"]] == [
        ("A", 0),
        ("A", 1),
        ("B", 2),
        ("B", 3),
    ]
    assert set(fields["run"]) >= {
        "versions",
        "device",
        "weights_dtype",
        "compute_dtype",
        "residual_dtype",
        "flags",
        "seconds",
        "closure_error",
        "calibration_loss",
        "loss_tokens",
    }
    assert fields["run"]["flags"] == dataclasses.asdict(Options(top_k=K, phases=PHASES))


def test_safetensors(result: Analysis, tmp_path: Path) -> None:
    result.save(tmp_path / "a.json")
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (view.get_dtype(), view.get_shape()) for name, view in found.items()}
        directions = file.get_tensor("directions")
    assert shapes == {
        "directions": ("F32", [4, K, 48]),
        "singular_values": ("F32", [4, 48]),
        "top1_cos": ("F32", [4, 4]),
        "principal_cosines": ("F32", [4, 4, K]),
        "projection_distance": ("F32", [4, 4]),
        "grassmann_distance": ("F32", [4, 4]),
    }
    np.testing.assert_allclose(directions @ directions.transpose(0, 2, 1), [np.eye(K)] * 4, rtol=0, atol=1e-6)


def test_round_trip(result: Analysis, tmp_path: Path) -> None:
    result.save(tmp_path / "a.json")
    loaded = Analysis.load(str(tmp_path / "a.json"))
    for field in dataclasses.fields(Analysis):
        if field.name in Analysis.ARRAYS:
            np.testing.assert_array_equal(getattr(loaded, field.name), getattr(result, field.name))
        else:
            assert getattr(loaded, field.name) == getattr(result, field.name)
    loaded.save(tmp_path / "b.json")
    for suffix in (".json", ".safetensors"):
        written = [(tmp_path / name).with_suffix(suffix).read_bytes() for name in ("a", "b")]
        assert written[0] == written[1]


def test_a_file_of_the_first_version(result: Analysis, tmp_path: Path) -> None:
    old = dataclasses.replace(
        result,
        schema_version=1,
        per_layer=[{key: row[key] for key in PER_LAYER} for row in result.per_layer],
        **dict.fromkeys(Analysis.ARRAYS[3:]),
    )
    old.save(tmp_path / "a.json")
    fields = json.loads((tmp_path / "a.json").read_text())
    for key in ("overlap", "verdict", "control"):
        del fields[key]
    (tmp_path / "a.json").write_text(json.dumps(fields))
    loaded = Analysis.load(tmp_path / "a.json")
    assert loaded.per_layer == old.per_layer
    assert loaded.overlap is loaded.verdict is loaded.control is loaded.principal_cosines is None
    assert "Per-phase" in tables(loaded) and "Verdict" not in tables(loaded)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: _edit(path, schema_version=3), "has schema_version 3, this jaxdelta reads up to 2"),
        (lambda path: _edit(path, schema_version="x"), "is not an analysis"),
        (lambda path: _edit(path, surprise=1), "is not an analysis"),
        (lambda path: path.write_text("{"), "is not an analysis"),
        (lambda path: path.write_text("[]"), "is not an analysis"),
        (lambda path: path.write_text("{}"), "is not an analysis"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not an analysis"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.with_suffix(".safetensors").unlink(), "cannot be read"),
        (lambda path: path.with_suffix(".safetensors").write_bytes(b"12345678901"), "is not an analysis"),
        (
            lambda path: save_file({"other": np.zeros(2)}, path.with_suffix(".safetensors")),
            "is not an analysis",
        ),
    ],
    ids=[
        *("newer", "no-version", "unknown-key", "truncated", "list", "empty-object", "not-text", "missing"),
        *("no-arrays", "damaged-arrays", "other-arrays"),
    ],
)
def test_files_that_cannot_be_loaded(
    result: Analysis, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    result.save(tmp_path / "a.json")
    spoil(tmp_path / "a.json")
    with pytest.raises(JaxDeltaError) as raised:
        Analysis.load(tmp_path / "a.json")
    assert message in str(raised.value)
    assert str(tmp_path / "a.json") in str(raised.value)


def test_saving_where_it_cannot_be(result: Analysis, tmp_path: Path) -> None:
    with pytest.raises(JaxDeltaError, match="cannot be written"):
        result.save(tmp_path / "missing" / "a.json")
    for name in ("a.safetensors", "a", "a.txt"):  # the first would be overwritten by its own companion
        with pytest.raises(UsageError, match=r"must end in \.json"):
            result.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_number_that_json_lacks_is_written(result: Analysis, tmp_path: Path) -> None:
    broken = dataclasses.replace(result, top1_cos_adjacent=[math.nan])
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_frame(result: Analysis) -> None:
    frame = result.to_frame()
    assert (list(frame.index), list(frame["phase"])) == ([0, 1, 2, 3], list("AABB"))
    assert list(frame["eff_rank"]) == [row["eff_rank"] for row in result.per_layer]
    assert list(frame["gamma"]) == [row["top_singvals"][0] for row in result.per_layer]
    assert list(frame["ledger_mlp"]) == [row["ledger"]["mlp"] for row in result.per_layer]
    bounds = frame[["eff_rank_low", "eff_rank_high"]].to_numpy().tolist()
    assert bounds == [row["intervals"]["eff_rank"] for row in result.per_layer]
    assert not any(isinstance(cell, list | dict) for cell in frame.to_numpy().flat)


def test_frame_of_a_view(result: Analysis) -> None:
    frame = result.to_frame("attention.masked")
    assert list(frame["frob"]) == [row["attention"]["masked"]["frob"] for row in result.per_layer]
    assert list(frame["phase"]) == list("AABB")
    with pytest.raises(UsageError, match=r"no view 'sinks'; there are raw, centred, masked"):
        result.to_frame("sinks")
    with pytest.raises(UsageError, match=r"mlp\.centred was not measured; ask for it by views=mlp\.centred"):
        result.to_frame("mlp.centred")


def test_without_pandas_a_line_says_what_to_install(
    result: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(JaxDeltaError, match=r"pandas.*pip install 'jaxdelta\[frames\]'"):
        result.to_frame()


def test_tables(result: Analysis) -> None:
    text = tables(result)
    for row in result.per_layer:
        assert f"L={row['L']:>2}" in text
        assert f"eff_rank={row['eff_rank']:6.2f}" in text
    assert text.count("→") == 3
    assert text.count("v1 captured by block top-8") == 4
    assert "nan" not in text.lower()


def test_public_names() -> None:
    assert jaxdelta.Analysis is Analysis
    assert jaxdelta.analyze is analysis.analyze
    assert jaxdelta.UsageError is UsageError and issubclass(UsageError, jaxdelta.JaxDeltaError)
    assert all(hasattr(jaxdelta, name) for name in jaxdelta.__all__)
    assert set(jaxdelta.__all__) <= set(dir(jaxdelta))
    with pytest.raises(AttributeError, match="nothing"):
        _ = jaxdelta.nothing


def _byte_ids(directory: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
