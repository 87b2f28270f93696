"""Controls: what they change, what they keep, and that they are shown along with the real run."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import one_line
from conftest import EXPERTS, TEXT

from jaxdelta.checkpoint.checkpoint import Checkpoint, load_model, open_checkpoint
from jaxdelta.checkpoint.controls import CONTROLS, PermutedWeights, RandomInit, controlled
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.tables import tables
from jaxdelta.run.analyze import Analysis, analyze
from jaxdelta.run.control_comparison import check_control, compare_control, load_control
from jaxdelta.text.tokens import Tokens

SCRIPT = Path(__file__).parents[1] / "scripts" / "delta_svd.py"
OF_WEIGHTS, OF_TEXTS = CONTROLS[:2], CONTROLS[2:]
IDS = np.random.default_rng(3).integers(0, 200, (2, 40), np.int32)
TOKENS = Tokens(IDS, np.sort(IDS % 5).astype(np.int32))
OPTIONS = {"top_k": 2, "phases": "A:0-1,B:2-3"}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """The second layer has experts, the others are dense; embeddings are tied, projections have biases."""
    options = EXPERTS | {"mlp_only_layers": [0, 2, 3], "tie_word_embeddings": True, "attention_bias": True}
    return make_checkpoint(tmp_path_factory.mktemp("experts"), initializer_range=0.1, **options)


@pytest.fixture(scope="module", params=["dense", "experts"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path, experts: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint if request.param == "dense" else experts))


def leaves(weights: Weights, layer: int) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(weights.layer(layer))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def run(model: Any, **options: Any) -> Analysis:
    return analyze(model, TOKENS, **OPTIONS | options)


@pytest.fixture(scope="module")
def real(tiny_checkpoint: Path) -> Analysis:
    return run(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def permuted(tiny_checkpoint: Path) -> Analysis:
    return run(str(tiny_checkpoint), control="permuted_weights")


# The weights


@pytest.mark.parametrize("kind", [RandomInit, PermutedWeights])
def test_what_is_drawn_depends_on_seed_and_tensor_alone(checkpoint: Checkpoint, kind: Any) -> None:
    """Not on the order of reading, nor on where the weights come from."""
    wanted = [leaves(kind(checkpoint, 7), layer) for layer in (0, 1)]
    again = kind(InMemoryWeights(checkpoint.load()), 7)
    for layer in (1, 0):
        found = leaves(again, layer)
        assert found.keys() == wanted[layer].keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, wanted[layer][name], err_msg=name)
    other = leaves(kind(checkpoint, 8), 1)
    name = next(name for name in other if "q_proj" in name and "weight" in name)
    for unlike in (other[name], wanted[0][name]):
        assert not np.any(np.all(unlike == wanted[1][name], axis=1))


@pytest.mark.parametrize("kind", [RandomInit, PermutedWeights])
def test_shapes_and_dtypes_are_those_of_the_weights(checkpoint: Checkpoint, kind: Any) -> None:
    control = kind(checkpoint, 0)
    for layer in range(checkpoint.config.num_layers):
        wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), control.abstract_layer(layer))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), control.layer(layer)) == wanted
    assert control.final_norm().shape == (checkpoint.config.hidden_size,)
    assert control.config is checkpoint.config
    assert control.first_bad_tensor() is None


def test_permuted_tensors_keep_their_entries(checkpoint: Checkpoint) -> None:
    control = PermutedWeights(checkpoint, 0)
    for layer in (0, 1):
        before, after = leaves(checkpoint, layer), leaves(control, layer)
        for name, value in after.items():
            tensors = zip(value, before[name], strict=True) if value.ndim == 3 else [(value, before[name])]
            for found, wanted in tensors:
                np.testing.assert_array_equal(np.sort(found, None), np.sort(wanted, None), err_msg=name)
                # About one entry in all stays where it was.
                assert np.sum(found == wanted) < 12 or len(np.unique(wanted)) == 1
    norm, wanted = np.asarray(control.final_norm()), np.asarray(checkpoint.final_norm())
    np.testing.assert_array_equal(np.sort(norm), np.sort(wanted))
    assert np.any(norm != wanted)


def test_permuting_leaves_no_order() -> None:
    """Over many seeds each entry goes everywhere, and two neighbours go everywhere independently."""

    demo = open_checkpoint("demo")
    numbers, places = jax.numpy.arange(12.0).reshape(3, 4), []
    for seed in range(400):
        weights = PermutedWeights(demo, seed)
        places.append(np.argsort(np.asarray(weights._tensor(0, (), numbers)).ravel()))
    first, second = np.array(places)[:, :2].T
    assert np.all(np.abs(np.bincount(first, minlength=12) - 400 / 12) < 5 * (400 / 12) ** 0.5)
    apart = np.bincount((second - first) % 12, minlength=12)
    assert apart[0] == 0
    assert np.all(np.abs(apart[1:] - 400 / 11) < 5 * (400 / 11) ** 0.5)


def test_a_low_rank_matrix_loses_its_structure() -> None:
    """Permuted, it has the spectrum of as many independent numbers."""
    rng = np.random.default_rng(0)
    matrix = np.outer(rng.standard_normal(200), rng.standard_normal(120)).astype(np.float32)
    weights = PermutedWeights(open_checkpoint("demo"), 0)
    found = np.linalg.svd(np.asarray(weights._tensor(0, (), jax.numpy.asarray(matrix))), compute_uv=False)
    wanted = np.linalg.svd(rng.permutation(matrix.ravel()).reshape(matrix.shape), compute_uv=False)
    np.testing.assert_allclose(found, wanted, rtol=0.1, atol=0.3)


def test_initial_weights_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    deviation = 0.1 if checkpoint.config.experts else 0.02
    for name, value in leaves(RandomInit(checkpoint, 0), 1).items():
        if value.ndim == 1:
            assert np.all(value == (0 if "bias" in name else 1)), name
        else:
            assert abs(value.std() / deviation - 1) < 5 / (2 * value.size) ** 0.5, name
            assert abs(value.mean()) < 5 * deviation / value.size**0.5, name
    table = np.asarray(RandomInit(checkpoint, 0).embeddings(np.arange(256)))
    assert table.std() == pytest.approx(deviation, rel=0.05)
    assert np.all(np.asarray(RandomInit(checkpoint, 0).final_norm()) == 1)


@pytest.mark.parametrize("kind", [RandomInit, PermutedWeights])
def test_one_embedding_and_one_head(checkpoint: Checkpoint, kind: Any) -> None:
    """By rows or by slices, and tied where they are."""
    control = kind(checkpoint, 0)
    head = np.asarray(control.head_slice(0, 256))
    np.testing.assert_array_equal(control.head_slice(100, 130), head[100:130])
    np.testing.assert_array_equal(control.head_rows(IDS), head[IDS])
    table = np.asarray(control.embeddings(np.arange(256)))
    np.testing.assert_array_equal(control.embeddings(IDS), table[IDS])
    assert np.array_equal(table, head) == checkpoint.config.tie_embeddings
    assert len(np.unique(table, axis=0)) == 256
    if kind is PermutedWeights:
        real = np.asarray(checkpoint.embeddings(np.arange(256)))
        np.testing.assert_array_equal(np.sort(table), np.sort(real))
        # Rows are permuted each in its own way: no two columns belong together any more.
        ranks = np.argsort(np.argsort(table)) - np.argsort(np.argsort(real))
        assert len(np.unique(ranks, axis=0)) == 256


# The text


def test_shuffled_and_random_tokens(checkpoint: Checkpoint) -> None:
    weights, shuffled = controlled(checkpoint, TOKENS, "shuffled_tokens", 0)
    assert weights is checkpoint
    np.testing.assert_array_equal(np.sort(shuffled.ids, None), np.sort(IDS, None))
    assert np.mean(shuffled.ids == IDS) < 0.1
    _, drawn = controlled(checkpoint, TOKENS, "random_tokens", 0)
    assert drawn.ids.min() >= 0
    assert 200 <= drawn.ids.max() < 256
    for found in (shuffled, drawn):
        assert (found.ids.dtype, found.ids.shape) == (IDS.dtype, IDS.shape)
        np.testing.assert_array_equal(found.documents, TOKENS.documents)
    for control in OF_TEXTS:
        same, other = (controlled(checkpoint, TOKENS, control, seed)[1].ids for seed in (0, 1))
        np.testing.assert_array_equal(same, (shuffled if control == "shuffled_tokens" else drawn).ids)
        assert np.any(other != same)


def test_no_control(checkpoint: Checkpoint) -> None:
    assert controlled(checkpoint, TOKENS, None, 0) == (checkpoint, TOKENS)


# The run


@pytest.mark.parametrize("control", OF_WEIGHTS)
def test_streamed_and_resident_agree(checkpoint: Checkpoint, control: str) -> None:
    name = str(checkpoint.directory)
    streamed = run(name, control=control, seed=5)
    for model, memory in ((name, "resident"), (load_model(name), "auto")):
        found = run(model, control=control, seed=5, memory=memory)
        np.testing.assert_allclose(found.singular_values, streamed.singular_values, rtol=1e-6)
        assert found.run["calibration_loss"] == pytest.approx(streamed.run["calibration_loss"], rel=1e-6)
    other = run(name, control=control, seed=6)
    assert not np.allclose(other.singular_values, streamed.singular_values, rtol=1e-3)


def test_a_control_is_another_run(tiny_checkpoint: Path, real: Analysis) -> None:
    for control in CONTROLS:
        lines: list[str] = []
        found = run(str(tiny_checkpoint), control=control, listener=lines.append)
        assert found.run["flags"]["control"] == control
        assert f" control: {control} (seed 0)" in lines
        assert f"control: {control} (seed 0)" in tables(found).splitlines()[0]
        assert not np.allclose(found.singular_values, real.singular_values, rtol=1e-3)
        if control == "random_init":
            assert found.run["calibration_loss"] == pytest.approx(np.log(256), abs=0.1)
    assert "control" not in tables(real)


def test_options() -> None:
    with pytest.raises(UsageError, match=r"control must be one of None, random_init, .*, not 'none'"):
        analyze("nowhere", control="none")
    with pytest.raises(UsageError, match="seed must be at least 0, not -1"):
        analyze("nowhere", seed=-1)


# Compared with the real run


def test_compare_control(real: Analysis, permuted: Analysis, tmp_path: Path) -> None:
    both = compare_control(real, permuted, "p.json")
    assert both.control is not None
    assert (both.control["name"], both.control["seed"], both.control["file"]) == (
        "permuted_weights",
        0,
        "p.json",
    )
    for row, wanted in zip(both.control["per_layer"], permuted.per_layer, strict=True):
        assert row.keys() >= {"L", "eff_rank", "top1_frac", "rel_step_mean", "stable_rank"}
        assert row == {key: wanted[key] for key in row}
    assert both.control["phase_overlap"] == permuted.phase_overlap
    assert both.control["top1_cos_adjacent"] == permuted.top1_cos_adjacent
    both.save(tmp_path / "a.json")
    assert Analysis.load(tmp_path / "a.json").control == both.control
    text = tables(both)
    assert "Compared with the control: permuted_weights (seed 0)" in text
    for row, other in zip(real.per_layer, permuted.per_layer, strict=True):
        assert f"L={row['L']:>2} {row['eff_rank']:7.2f} | {other['eff_rank']:7.2f}" in text


def test_an_analysis_without_the_field_is_read(real: Analysis, tmp_path: Path) -> None:
    real.save(tmp_path / "a.json")
    fields = json.loads((tmp_path / "a.json").read_text())
    del fields["control"], fields["run"]["flags"]["control"]
    (tmp_path / "a.json").write_text(json.dumps(fields))
    assert Analysis.load(tmp_path / "a.json").control is None
    assert "is not a control's run" in one_line(load_control, tmp_path / "a.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": 5}, "num_layers is 5, not 4"),
        ({"hidden": 64}, "hidden is 64, not 48"),
        ({"n_calib_tokens": 7}, "n_calib_tokens is 7, not 80"),
    ],
)
def test_controls_of_other_runs(
    real: Analysis, permuted: Analysis, changes: dict[str, Any], named: str
) -> None:
    assert named in one_line(compare_control, real, dataclasses.replace(permuted, **changes))


def test_real_run_as_control(real: Analysis) -> None:
    with pytest.raises(JaxDeltaError, match="is not a control's run; make one with --control"):
        compare_control(real, real)


def test_files_that_are_no_control(real: Analysis, permuted: Analysis, tmp_path: Path) -> None:
    assert "missing.json: cannot be read" in one_line(load_control, tmp_path / "missing.json")
    (tmp_path / "a.txt").write_text("text")
    assert "a.txt: is not an analysis" in one_line(load_control, tmp_path / "a.txt")
    # A run compared with a control is still no control.
    compare_control(real, permuted).save(tmp_path / "both.json")
    assert "both.json: is not a control's run" in one_line(load_control, tmp_path / "both.json")


@pytest.mark.parametrize("spoil", [{"run": {}}, {"per_layer": [{}]}])
def test_damaged_control(permuted: Analysis, tmp_path: Path, spoil: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    permuted.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    assert f"{path}: " in one_line(load_control, path)


# The script


def script(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--jax_enable_compilation_cache=false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def test_script(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and looked at the moon.")
    common = [f"--model={tiny_checkpoint}", f"--calibration={tmp_path / 'text.txt'}", "--top_k=2"]
    control, out = tmp_path / "control.json", tmp_path / "out.json"
    status, stdout, stderr = script(*common, f"--out={control}", "--control=shuffled_tokens", "--seed=3")
    assert (status, stderr) == (0, "")
    assert stdout.count("control: shuffled_tokens (seed 3)") == 2

    def fails(wanted: int, named: str, *arguments: str) -> None:
        status, _, stderr = script(*common, f"--out={out}", *arguments)
        assert (status, stderr.count("\n")) == (wanted, 1)
        assert stderr.startswith("delta_svd.py: ")
        assert named in stderr
        assert not out.exists()
        assert not list(tmp_path.glob("*.tmp"))

    named = "n_calib_tokens is 47, not 20; top_k is 2, not 3"
    fails(1, named, f"--compare_control={control}", "--top_k=3", "--max_tokens=20")
    fails(1, "missing.json: cannot be read", f"--compare_control={tmp_path / 'missing.json'}")
    fails(2, "control", "--control=bogus")
    status, stdout, stderr = script(*common, f"--out={out}", f"--compare_control={control}")
    assert (status, stderr) == (0, "")
    assert "Compared with the control: shuffled_tokens (seed 3)" in stdout
    assert json.loads(out.read_text())["control"]["file"] == "control.json"


# What a control's run must share with the run


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path) -> Callable[..., str]:
    """pair(model, text, **options) -> the complaint about a control of `tiny_checkpoint` over TEXT, or ""."""
    common = {"top_k": 2, "bootstrap": 0, "null_draws": 0, "views": "raw"}
    controls = {
        name: analyze(str(tiny_checkpoint), TEXT, control=name, **common)
        for name in ("random_init", "shuffled_tokens")
    }

    def compare(model: Path = tiny_checkpoint, text: Any = TEXT, **options: Any) -> str:
        said = set()
        for control in controls.values():
            try:
                analyze(str(model), text, before=partial(check_control, control), **common | options)
                said.add("")
            except JaxDeltaError as error:
                said.add(str(error))
        (found,) = said
        assert len(found) < 800 and "\n" not in found
        return found

    return compare


def test_a_control_of_the_same_run(pair: Callable[..., str]) -> None:
    assert pair() == ""
    # Neither method nor memory, nor how the same text was chosen, changes a statistic.
    assert pair(svd="full", memory="resident", bootstrap=20, seed=7, text_key="content", max_tokens=500) == ""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compute_dtype": "bfloat16"}, "compute_dtype is float32, not bfloat16"),
        ({"residual_dtype": "bfloat16"}, "residual_dtype is float32, not bfloat16"),
        ({"views": "raw,masked"}, "views is raw, not masked,raw"),
        ({"sink_factor": 3.0}, "sink_factor is 10.0, not 3.0"),
        ({"last_state": "normed"}, "last_state is residual, not normed"),
        ({"seq_len": 16}, "seq_len is 2048, not 16"),
        ({"layout": "packed"}, "layout is stream, not packed"),
        ({"phases": "A:0,B:1-3"}, "phases is "),
        ({"top_k": 3, "residual_dtype": "bfloat16"}, "top_k is 2, not 3; residual_dtype is"),
    ],
)
def test_a_control_with_other_options(pair: Callable[..., str], options: dict[str, Any], named: str) -> None:
    assert named in pair(**options)


def test_a_control_of_another_text_or_of_other_weights(
    pair: Callable[..., str], tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    other = [text[::-1] for text in TEXT]  # as many tokens
    said = pair(text=other)
    assert "text_fingerprint is " in said and "n_calib_tokens" not in said
    said = pair(model=make_checkpoint(tmp_path / "other", seed=3))
    assert "weights_fingerprint is " in said and "text_fingerprint" not in said


def test_a_control_of_another_fine_tune_in_memory(tiny_checkpoint: Path) -> None:
    """One layer differs; embedding and head are the same."""
    from flax import nnx

    model, ids = load_model(tiny_checkpoint), np.arange(40, dtype=np.int32)[None] % 256
    tokens, options = Tokens(ids, np.zeros_like(ids)), {"top_k": 2, "bootstrap": 0, "null_draws": 0}
    control = analyze(model, tokens, control="permuted_weights", **options)
    compare_control(analyze(model, tokens, **options), control)
    graph, state = nnx.split(model)
    state["layers"]["mlp"]["up_proj"]["weight"].set_value(
        state["layers"]["mlp"]["up_proj"]["weight"][...].at[2].multiply(1.01)
    )
    tuned = analyze(nnx.merge(graph, state), tokens, **options)
    assert "weights_fingerprint is " in one_line(compare_control, tuned, control)


def test_older_files_are_compared_by_what_they_have(real: Analysis, permuted: Analysis) -> None:
    def older(run: Analysis) -> Analysis:
        new = ("weights_fingerprint", "original_text_fingerprint")
        return dataclasses.replace(run, run={key: run.run[key] for key in run.run if key not in new})

    assert compare_control(older(real), permuted).control
    assert compare_control(real, older(permuted)).control
    changed = older(permuted)
    changed.run["text_fingerprint"] = "0" * 64
    assert "text_fingerprint is 000" in one_line(compare_control, real, changed)
