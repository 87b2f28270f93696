"""The PyTorch reference against NumPy in float64, and the comparison of reports against planted faults."""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
PROMPTS = json.loads((ROOT / "jaxdelta" / "data" / "calibration_prompts.json").read_text())


def load_script(name: str, folder: Path = SCRIPTS) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *flags: str, folder: Path = SCRIPTS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(folder / f"{name}.py"), *flags]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=offline, timeout=120, check=False)


def assert_one_line(result: subprocess.CompletedProcess[str], status: int, word: str) -> None:
    assert (result.returncode, result.stderr.count("\n")) == (status, 1), result.stderr
    assert word in result.stderr


comparison = load_script("compare_reference")
torch_reference = load_script("reference_torch")


# ------------------------------------------------------------------------------------------ compare_reference

N, D, K = 6, 12, 3
PHASES = ["A", "B", "B", "B", "C", "C"]
SCALARS = (*comparison.LENGTHS, *comparison.SHARES, "cos_delta_h_mean")


def make_row(layer: int, rng: np.random.Generator) -> dict[str, Any]:
    figures = {key: float(rng.uniform(0.1, 0.9)) for key in SCALARS}
    return {"L": layer, "phase": PHASES[layer], **figures, "top_singvals": [4.0, 2.0, 1.0 + layer / 10]}


def make_report() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A report with the right keys, which need not fit together, and the arrays beside it."""
    rng = np.random.default_rng(0)
    vectors = np.linalg.svd(rng.normal(size=(N, K, D)), full_matrices=False)[2].astype(np.float32)
    cosines = vectors[:, 0] @ vectors[:, 0].T
    report = {
        "model": "m",
        "num_layers": N,
        "hidden": D,
        "n_calib_tokens": 20,
        "per_layer": [make_row(layer, rng) for layer in range(N)],
        "top1_cos_adjacent": np.diagonal(cosines, 1).tolist(),
        "phase_overlap": [
            {"phase": p, "layers": PHASES.count(p), "intra_cos_mean": 0.3, "cross_cos_mean": 0.2}
            for p in "ABC"
        ],
        "block_capture": [{"phase": p, "L": L, "capture": 0.5} for L, p in enumerate(PHASES) if p != "A"],
        "last_layer_normed": make_row(N - 1, rng),
        "run": {"last_state": "residual"},
    }
    return report, {"directions": vectors, "top1_cos": cosines}


def make_original() -> dict[str, Any]:
    """What the original reference would write of the same run."""
    report = make_report()[0]
    report["per_layer"][-1] = report["last_layer_normed"]
    report["top1_cos_adjacent"][-1] = 0.99
    for key in ("phase_overlap", "block_capture", "last_layer_normed", "run"):
        del report[key]
    return report


def verdicts(rows: list[Any]) -> dict[str, str]:
    return {row.key: row.verdict for row in rows}


def failing(rows: list[Any]) -> list[str]:
    return [row.key for row in rows if row.verdict == "FAIL"]


def test_a_report_equals_itself() -> None:
    report, arrays = make_report()
    rows = comparison.compare(report, copy.deepcopy(report), arrays, arrays)
    assert set(verdicts(rows).values()) == {"ok"}
    assert {row.key for row in rows} >= {
        *SCALARS,
        "phase",
        "top_singvals",
        "directions",
        "top1_cos",
        "capture",
    }


@pytest.mark.parametrize("key", SCALARS)
@pytest.mark.parametrize("deviation", [3e-4, math.nan])
def test_a_deviating_scalar_is_found(key: str, deviation: float) -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    other["per_layer"][2][key] += deviation
    (row,) = [row for row in comparison.compare(report, other) if row.verdict == "FAIL"]
    assert (row.key, row.where, row.candidate) == (
        key,
        "L=2",
        pytest.approx(other["per_layer"][2][key], nan_ok=True),
    )


@pytest.mark.parametrize(
    ("r", "c", "verdict"), [(None, None, "ok"), (None, 0.1, "FAIL"), (0.1, None, "FAIL")]
)
def test_figures_that_are_undefined(r: float | None, c: float | None, verdict: str) -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    report["per_layer"][2]["eff_rank"], other["per_layer"][2]["eff_rank"] = r, c
    assert verdicts(comparison.compare(report, other))["eff_rank"] == verdict


@pytest.mark.parametrize("key", SCALARS)
def test_a_deviation_within_tolerance_passes(key: str) -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    other["per_layer"][2][key] *= 1 + 5e-5
    assert not failing(comparison.compare(report, other))
    assert failing(comparison.compare(report, other, rtol=1e-6, atol_cos=1e-6)) == [key]


PLANTED = {
    "phase": lambda report: report["per_layer"][4].update(phase="D"),
    "top_singvals": lambda report: report["per_layer"][4]["top_singvals"].__setitem__(1, 2.001),
    "top1_cos_adjacent": lambda report: report["top1_cos_adjacent"].__setitem__(4, 0.9),
    "intra_cos_mean": lambda report: report["phase_overlap"][1].update(intra_cos_mean=0.3002),
    "cross_cos_mean": lambda report: report["phase_overlap"][2].update(cross_cos_mean=0.1998),
    "capture": lambda report: report["block_capture"][2].update(capture=None),
}


@pytest.mark.parametrize("key", PLANTED)
def test_a_deviating_figure_across_layers_is_found(key: str) -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    PLANTED[key](other)
    assert key in failing(comparison.compare(report, other))
    assert key in failing(comparison.compare(other, report))
    assert key == "phase" or len(failing(comparison.compare(report, other))) == 1


def test_a_missing_line_is_a_deviation() -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    del other["block_capture"][0]
    assert failing(comparison.compare(report, other)) == ["capture"]


def test_turned_directions_are_found_and_signs_are_not() -> None:
    report, arrays = make_report()
    flipped = {"directions": -arrays["directions"], "top1_cos": arrays["top1_cos"] * np.array([-1, 1] * 3)}
    signs = copy.deepcopy(report)
    signs["top1_cos_adjacent"] = [-cosine for cosine in report["top1_cos_adjacent"]]
    assert not failing(comparison.compare(report, signs, arrays, flipped))

    turned = copy.deepcopy(arrays)
    turned["directions"][3, 0] += 0.01 * turned["directions"][3, 1]
    turned["top1_cos"][1, 4] += 2e-4
    turned["top1_cos"][4, 1] += 2e-4
    rows = comparison.compare(report, report, arrays, turned)
    assert {row.key: row.where for row in rows if row.verdict == "FAIL"} == {
        "directions": "L=3",
        "top1_cos": "L=1,4",
    }


def test_directions_without_a_gap_are_skipped_and_counted() -> None:
    report, arrays = make_report()
    report["per_layer"][3]["top_singvals"][1] = 3.99
    other, turned = copy.deepcopy(report), copy.deepcopy(arrays)
    other["top1_cos_adjacent"][3] = 0.9
    other["phase_overlap"][1]["intra_cos_mean"] = other["phase_overlap"][0]["cross_cos_mean"] = 0.9
    turned["directions"][3, 0] = turned["directions"][3, 1]
    rows = {row.key: row for row in comparison.compare(report, other, arrays, turned)}
    assert not failing(list(rows.values()))
    assert rows["directions"].skipped == {"σ_1 / σ_2 <= 1.01": ("L=3",)}
    assert rows["top1_cos_adjacent"].skipped == {"σ_1 / σ_2 <= 1.01": ("L=2→3", "L=3→4")}
    assert rows["intra_cos_mean"].skipped == {"σ_1 / σ_2 <= 1.01": ("phase B",)}
    assert rows["cross_cos_mean"].verdict == "skipped"
    assert (rows["capture"].compared, rows["top1_cos"].compared) == (2, 10)
    assert "directions" in failing(comparison.compare(report, other, arrays, turned, gap=1.0))


@pytest.mark.parametrize("original_is_reference", [True, False])
def test_conventions_of_the_last_state(original_is_reference: bool) -> None:
    report, original = make_report()[0], make_original()
    pair = (original, report) if original_is_reference else (report, original)
    rows = {row.key: row for row in comparison.compare(*pair)}
    assert not failing(list(rows.values()))
    assert rows["frob"].compared == N
    assert list(rows["top1_cos_adjacent"].skipped.values()) == [("L=4→5",)]
    assert rows["capture"].verdict == rows["directions"].verdict == "skipped"

    report["last_layer_normed"]["frob"] *= 1.001
    assert failing(comparison.compare(*pair)) == ["frob"]
    del report["last_layer_normed"]
    with pytest.raises(comparison.MismatchError, match="last_layer_normed"):
        comparison.compare(*pair)


def test_mixed_conventions_skip_whatever_the_last_layer_is_part_of() -> None:
    report, arrays = make_report()
    normed = copy.deepcopy(report)
    normed["run"]["last_state"], normed["per_layer"][-1] = "normed", report["last_layer_normed"]
    rows = {row.key: row for row in comparison.compare(report, normed, arrays, arrays)}
    assert not failing(list(rows.values()))
    skipped = {key: list(row.skipped.values()) for key, row in rows.items() if row.skipped}
    assert set(skipped) == {
        *("directions", "top1_cos", "top1_cos_adjacent", "intra_cos_mean", "cross_cos_mean", "capture")
    }
    assert skipped["intra_cos_mean"] == [("phase C",)]
    assert skipped["capture"] == [("L=4", "L=5")]
    assert rows["cross_cos_mean"].compared == 0


def test_fewer_singular_values_are_compared_as_far_as_they_go() -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    for row in other["per_layer"]:
        row["top_singvals"] = row["top_singvals"][:2]
    rows = {row.key: row for row in comparison.compare(report, other)}
    assert (rows["top_singvals"].compared, rows["capture"].verdict) == (2 * N, "skipped")


@pytest.mark.parametrize("key", ["num_layers", "n_calib_tokens", "hidden"])
def test_different_runs_are_told_apart(key: str) -> None:
    report, _ = make_report()
    with pytest.raises(comparison.MismatchError, match=key):
        comparison.compare(report, report | {key: 7})


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda report: report["per_layer"][3].pop("eff_rank"), "eff_rank"),
        (lambda report: report["per_layer"].pop(), "5 rows"),
        (lambda report: report["per_layer"].__setitem__(2, None), "candidate"),
        (lambda report: report["per_layer"][1].update(frob="many"), "many"),
        (lambda report: report["phase_overlap"][0].pop("phase"), "phase"),
    ],
)
def test_damaged_reports_are_named(damage: Any, word: str) -> None:
    report, _ = make_report()
    other = copy.deepcopy(report)
    damage(other)
    with pytest.raises(comparison.MismatchError, match=word):
        comparison.compare(report, other)


def test_comparison_on_the_command_line(tmp_path: Path) -> None:
    report, arrays = make_report()
    paths = [tmp_path / "a.f32.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps(report))
    flags = [f"--reference={paths[0]}", f"--candidate={paths[1]}"]
    np.savez(
        tmp_path / "a.f32.npz", top_dirs=arrays["directions"], top1_cos=arrays["top1_cos"], hs=np.zeros(3)
    )
    save_file(arrays, tmp_path / "b.safetensors")
    result = run_script("compare_reference", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert "skipped" not in result.stdout
    assert result.stdout.endswith("equal within tolerance\n")

    report["per_layer"][3]["frob"] *= 2
    paths[1].write_text(json.dumps(report))
    result = run_script("compare_reference", *flags)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.endswith("DIFFERENT: frob\n")

    save_file({"directions": arrays["directions"][1:]}, tmp_path / "b.safetensors")
    assert_one_line(run_script("compare_reference", *flags), 1, "arrays next to")
    paths[1].write_text("{")
    assert_one_line(run_script("compare_reference", *flags), 1, "b.json")
    paths[1].unlink()
    assert_one_line(run_script("compare_reference", *flags), 1, "b.json: No such file")


@pytest.mark.parametrize("flag", ["--rtol=-1", "--gap=0.5", "extra", ""])
def test_wrong_flags_of_the_comparison(flag: str) -> None:
    files = ["--reference=a.json", "--candidate=b.json"] if flag else ["--reference=a.json"]
    assert_one_line(run_script("compare_reference", *files, *filter(None, [flag])), 2, "compare_reference: ")


def test_the_comparison_loads_no_framework() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({str(SCRIPTS / 'compare_reference.py')!r}); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"jax", "torch", "transformers", "jaxdelta"} & set(loaded)


# -------------------------------------------------------------------------------------------- reference_torch

LAYERS, HIDDEN = 5, 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """Five layers, so that the default phases differ, and fewer columns than tokens."""
    directory = tmp_path_factory.mktemp("reference")
    return make_checkpoint(directory, num_hidden_layers=LAYERS, hidden_size=HIDDEN, head_dim=10)


def float64_states(
    checkpoint: Path, text: str, max_tokens: int
) -> tuple[list[np.ndarray], np.ndarray, float]:
    """States before the final norm, the last one after it, and the loss, by the model in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(text).input_ids[:max_tokens]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    found: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        normed = model.model.norm(found[-1])[0].numpy()
    top = logits.max(axis=1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return [state[0].numpy() for state in found], normed, -log_p[np.arange(len(ids) - 1), ids[1:]].mean()


def expected_row(after: np.ndarray, before: np.ndarray, k: int) -> tuple[dict[str, Any], np.ndarray]:
    """A layer's figures from the eigenvalues of δᵀδ, token by token, and its k directions (k, d)."""
    delta, state = (after - before)[1:], before[1:]
    energy, vectors = np.linalg.eigh(delta.T @ delta)
    energy, vectors = energy[::-1], vectors[:, ::-1].T
    p = energy / energy.sum()
    norms = [math.sqrt(x @ x) for x in delta]
    steps = [math.sqrt(x @ x) / math.sqrt(h @ h) for x, h in zip(delta, state, strict=True)]
    cosines = [x @ h / math.sqrt((x @ x) * (h @ h)) for x, h in zip(delta, state, strict=True)]
    row = {
        "frob": math.sqrt((delta**2).sum()),
        "token_norm_mean": np.mean(norms),
        "token_norm_std": np.std(norms),
        "h_norm_mean": np.mean([math.sqrt(h @ h) for h in state]),
        "rel_step_mean": np.mean(steps),
        "rel_step_std": np.std(steps),
        "parallel_frac": np.mean(np.abs(cosines)),
        "cos_delta_h_mean": np.mean(cosines),
        "top_singvals": np.sqrt(energy[:k]),
        "eff_rank": math.exp(-(p * np.log(p)).sum()),
        "top1_frac": p[0],
        "top3_frac": p[:3].sum(),
        "top10_frac": p[:10].sum(),
    }
    return row, vectors[:k]


def check_report(
    report: dict[str, Any], arrays: dict[str, np.ndarray], states: list[np.ndarray], k: int
) -> None:
    """Every number of a report against the states (n, d) that it should be about."""
    near = {"rtol": 2e-5, "atol": 2e-6}
    directions = []
    for L, row in enumerate(report["per_layer"]):
        figures, vectors = expected_row(states[L + 1], states[L], k)
        assert list(row)[:2] == ["L", "phase"]
        assert row.keys() - {"L", "phase"} == figures.keys()
        for key, value in figures.items():
            np.testing.assert_allclose(row[key], value, err_msg=f"{key} of layer {L}", **near)
        directions.append(vectors)
    directions = np.stack(directions)
    match = np.abs(np.einsum("lkd,lkd->lk", directions, arrays["directions"]))
    np.testing.assert_allclose(match, 1, **near)
    np.testing.assert_allclose(
        arrays["singular_values"][:, :k], [r["top_singvals"] for r in report["per_layer"]]
    )
    assert arrays["singular_values"].shape == (LAYERS, HIDDEN)

    cosines = np.abs(directions[:, 0] @ directions[:, 0].T)
    np.testing.assert_allclose(np.abs(arrays["top1_cos"]), cosines, **near)
    np.testing.assert_allclose(np.abs(report["top1_cos_adjacent"]), np.diagonal(cosines, 1), **near)
    phases = [row["phase"] for row in report["per_layer"]]
    assert [line["phase"] for line in report["phase_overlap"]] == sorted(set(phases))
    captures = {line["L"]: line["capture"] for line in report["block_capture"]}
    for line in report["phase_overlap"]:
        inside = [L for L, phase in enumerate(phases) if phase == line["phase"]]
        others = [L for L in range(LAYERS) if L not in inside]
        pairs = [cosines[i, j] for i in inside for j in inside if i < j]
        intra, cross = (
            np.mean(pairs or [1.0]),
            np.mean([cosines[i, j] for i in inside for j in others] or [0.0]),
        )
        np.testing.assert_allclose([line["intra_cos_mean"], line["cross_cos_mean"]], [intra, cross], **near)
        assert line["layers"] == len(inside)
        projectors = sum(directions[L].T @ directions[L] for L in inside)
        basis = np.linalg.eigh(projectors)[1][:, -8:]
        expected = {L: ((directions[L, 0] @ basis) ** 2).sum() for L in inside if len(inside) > 1}
        found = {L: captures.pop(L) for L in expected}
        np.testing.assert_allclose(list(found.values()), list(expected.values()), **near)
    assert not captures


def test_reference_in_the_original_convention(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = run_script("reference_torch", f"--model={checkpoint}", f"--out={out}", "--device=cpu")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.safetensors"]
    report, arrays = json.loads(out.read_text()), load_file(out.with_suffix(".safetensors"))
    states, normed, loss = float64_states(checkpoint, "\n\n".join(PROMPTS), 2048)
    check_report(report, arrays, [*states[:-1], normed], k=8)

    assert [row["phase"] for row in report["per_layer"]] == ["A", "C", "C", "D", "E"]
    assert (report["schema_version"], report["model"], report["num_layers"]) == (1, str(checkpoint), LAYERS)
    assert (report["hidden"], report["n_calib_tokens"]) == (HIDDEN, len("\n\n".join(PROMPTS).encode()))
    assert report["last_layer_normed"] == report["per_layer"][-1]
    run = report["run"]
    assert run["calibration_loss"] == pytest.approx(loss, rel=1e-5)
    assert (run["dtype"], run["last_state"], run["flags"]["top_k"]) == ("float32", "normed", 8)
    assert run["seconds"].keys() == {"load", "forward", "analysis", "total"}
    lines = result.stdout.splitlines()
    assert lines[3].startswith(f" hidden_states count: {LAYERS + 1}")
    assert lines[4].startswith(" L= 0 phase=   A ||h||=")
    assert lines[-1] == f"Saved: {out}"


def test_reference_in_the_residual_convention(checkpoint: Path) -> None:
    text = "The residual stream, read layer by layer. " * 5
    model = torch_reference.load_model(str(checkpoint), "main", "float32", "cpu")
    tokenizer = torch_reference.pretrained("AutoTokenizer", str(checkpoint), "main")
    tokens = torch_reference.tokenize(tokenizer, text, 150)
    found, found_normed, found_loss = torch_reference.forward(model, tokens)
    report, arrays = torch_reference.analyze(found, found_normed, list("ABBBB"), k=3)

    states, normed, loss = float64_states(checkpoint, text, 150)
    check_report(report, arrays, states, k=3)
    assert report["n_calib_tokens"] == 150
    assert found_loss == pytest.approx(loss, rel=1e-5)
    figures, _ = expected_row(normed, states[-2], 3)
    for key, value in figures.items():
        np.testing.assert_allclose(report["last_layer_normed"][key], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_all_weights_must_fit(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """transformers makes up what a file lacks and leaves out what it does not know."""
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    weights, name = load_file(checkpoint / "model.safetensors"), "model.layers.3.mlp.up_proj.weight"
    weight = weights.pop(name)
    weights |= {"unexpected": {name: weight, f"{name}s": weight}, "mismatched": {name: weight[1:]}}.get(
        kind, {}
    )
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(torch_reference.UserError, match=rf"1 {kind} weights, .*{name}"):
        torch_reference.load_model(str(tmp_path), "main", "float32", "cpu")


def test_a_model_without_the_modules_that_are_read(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(torch_reference.UserError, match="'gpt2' model has no"):
        torch_reference.load_model(str(tmp_path), "main", "float32", "cpu")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.json" / "in the way").mkdir(parents=True)
    with pytest.raises(torch_reference.UserError, match="cannot write"):
        torch_reference.write_together({tmp_path / "b.json": b"", tmp_path / "a.safetensors": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize(
    "flag",
    ["--top_k=0", "--max_tokens=1", "--dtype=int8", "--phases=A:0,B:2", "--out=x.txt", "--nope", "extra"],
)
def test_wrong_flags_of_the_reference(flag: str) -> None:
    assert_one_line(run_script("reference_torch", "--model=m", "--out=r.json", flag), 2, "reference_torch: ")


def test_flags_that_are_missing() -> None:
    assert_one_line(run_script("reference_torch", "--model=m"), 2, "--out")
    assert_one_line(run_script("reference_torch", "--out=r.json"), 2, "--model")


def test_files_that_are_missing(tmp_path: Path) -> None:
    out = f"--out={tmp_path / 'r.json'}"
    assert_one_line(run_script("reference_torch", "--model=m", f"--out={tmp_path}/none/r.json"), 1, "none")
    assert_one_line(run_script("reference_torch", "--model=m", out, "--calibration=none.txt"), 1, "none.txt")
    assert_one_line(run_script("reference_torch", "--model=m", out, "--calibration=none.md"), 2, "none.md")
    assert not list(tmp_path.iterdir())


def test_phases() -> None:
    names = torch_reference.phase_names(None, 64)
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    assert counts == {"A": 7, "B": 3, "C": 22, "D": 15, "E": 12, "tail": 5}
    names = torch_reference.phase_names(None, 28)
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    assert counts == {"A": 4, "B": 1, "C": 9, "D": 7, "E": 5, "tail": 2}
    assert torch_reference.phase_names("x:0, y:1-2,x:3", 4) == ["x", "y", "y", "x"]
    with pytest.raises(torch_reference.flags.Error, match="4 layers"):
        torch_reference.phase_names("x:0-3", 5)
    for text in ("", "A", "A:", "A:x", "A:2-1", "A:0-3,B:3-4", "A:0,B:2", "A:1-4", "A:0-99999"):
        with pytest.raises(torch_reference.flags.ValidationError):
            torch_reference.parse_phases(text)


def test_calibration_files(tmp_path: Path) -> None:
    text, prompts = tmp_path / "a.txt", tmp_path / "a.json"
    text.write_bytes(b"as it\r\nis \n")
    prompts.write_text('["one", "two"]')
    assert torch_reference.read_calibration(text) == "as it\r\nis \n"
    assert torch_reference.read_calibration(prompts) == "one\n\ntwo"
    for content in (b'{"a": 1}', b"[1]", b"[", b"\xff"):
        prompts.write_bytes(content)
        with pytest.raises(torch_reference.UserError, match=r"a\.json"):
            torch_reference.read_calibration(prompts)
    with pytest.raises(torch_reference.UserError, match=r"b\.txt"):
        torch_reference.read_calibration(tmp_path / "b.txt")


def test_a_layer_that_writes_nothing() -> None:
    state = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    figures, sigma, directions = torch_reference.describe(state, state, 2)
    assert (figures["frob"], figures["eff_rank"], figures["top10_frac"]) == (0, 0, 0)
    assert np.isfinite([value for key, value in figures.items() if key != "top_singvals"]).all()
    assert (sigma.shape, directions.shape) == ((4,), (2, 4))


def test_input_that_cannot_be_used(checkpoint: Path, tmp_path: Path) -> None:
    """Mistakes that transformers would let through, or answer with a page."""
    with pytest.raises(torch_reference.UserError, match="no directory"):
        torch_reference.pretrained("AutoConfig", str(tmp_path / "none"), "main")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    empty = torch_reference.pretrained("AutoTokenizer", str(tmp_path), "main")
    with pytest.raises(torch_reference.UserError, match="tokenizer"):
        torch_reference.tokenize(empty, "text", 10)
    tokenizer = torch_reference.pretrained("AutoTokenizer", str(checkpoint), "main")
    with pytest.raises(torch_reference.UserError, match="1 tokens"):
        torch_reference.tokenize(tokenizer, "a", 10)
    assert len(torch_reference.tokenize(tokenizer, "abcdef", 4)) == 4
