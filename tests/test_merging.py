"""Runs over several texts, put together, are one run over all of them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxdelta import Analysis, analyze
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.run.merge import merge_runs
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.text.tokens import Tokens

RNG = np.random.default_rng(0)
LENGTH = 40
TEXTS = [RNG.integers(0, 256, (count, LENGTH)).astype(np.int32) for count in (4, 6)]
OPTIONS = {"top_k": 4, "bootstrap": 20, "null_draws": 20}


def text(ids: np.ndarray) -> Tokens:
    """Windows that are a document each."""
    return Tokens(ids, np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], LENGTH, axis=1))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> list[Path]:
    parent = tmp_path_factory.mktemp("kept")
    directories = [parent / "a", parent / "b"]
    for ids, directory in zip(TEXTS, directories, strict=True):
        analyze(str(tiny_checkpoint), text(ids), keep_moments=str(directory), **OPTIONS)
    return directories


def test_as_one_run(kept: list[Path], tiny_checkpoint: Path) -> None:
    merged = merge_runs(kept)
    whole = analyze(str(tiny_checkpoint), text(np.concatenate(TEXTS)), **OPTIONS)
    assert merged.n_calib_tokens == whole.n_calib_tokens == 10 * LENGTH
    assert merged.run["documents"] == whole.run["documents"] == 10
    last = [run.last_layer_normed for run in (merged, whole)]
    for row, other in zip([*merged.per_layer, last[0]], [*whole.per_layer, last[1]], strict=True):
        for one, same in (
            (row, other),
            (row["masked"], other["masked"]),
            (row["attention"], other["attention"]),
        ):
            for name in (
                *(one.name for one in registered("tokens")),
                "frob",
                "eff_rank",
                "top1_frac",
                "top10_frac",
                "n",
                "mean_share",
                "stable_rank",
            ):
                assert one[name] == pytest.approx(same[name], rel=1e-5)
            np.testing.assert_allclose(one["top_singvals"], same["top_singvals"], rtol=1e-5)
        assert row["centred"]["eff_rank"] == pytest.approx(other["centred"]["eff_rank"], rel=1e-5)
        assert row["ledger"] == pytest.approx(other["ledger"], rel=1e-5, abs=1e-12)
        assert row["intervals"]["gamma"][0] < row["top_singvals"][0] < row["intervals"]["gamma"][1]
    np.testing.assert_allclose(merged.directions, whole.directions, atol=1e-4)
    for entry, other in zip(merged.block_capture, whole.block_capture, strict=True):
        assert entry["capture"] == pytest.approx(other["capture"], abs=1e-5)


def test_owners_are_named_with_their_text(kept: list[Path]) -> None:
    """Positions count on through the texts; the words are those of the run."""
    merged, ids = merge_runs(kept), np.concatenate(TEXTS).ravel()
    owners = [owner for row in merged.per_layer for owner in row["sigma1_tokens"] or []]
    assert owners
    assert all(owner["token"] == f"<{ids[owner['position']]}>" for owner in owners)
    assert all(owner["document"] == owner["position"] // LENGTH for owner in owners)


def test_what_does_not_belong_together(
    kept: list[Path], tmp_path: Path, tiny_checkpoint: Path, make_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match="at least two"):
        merge_runs(kept[:1])
    with pytest.raises(JaxDeltaError, match="is of the same text as"):
        merge_runs([kept[0], kept[0]])
    with pytest.raises(JaxDeltaError, match=r"run\.json: cannot be read"):
        merge_runs([kept[0], tmp_path / "nothing"])
    other = tmp_path / "other"
    analyze(str(tiny_checkpoint), text(TEXTS[1]), keep_moments=str(other), **OPTIONS | {"top_k": 3})
    with pytest.raises(JaxDeltaError, match=r"other: is no run like .*: top_k is 3, not 4"):
        merge_runs([kept[0], other])
    with pytest.raises(JaxDeltaError, match="is there already"):
        analyze(str(tiny_checkpoint), text(TEXTS[1]), keep_moments=str(other), **OPTIONS)
    (other / "layer-001.safetensors").write_bytes(b"torn")
    analyze(str(tiny_checkpoint), text(TEXTS[0]), keep_moments=str(tmp_path / "c"), **OPTIONS | {"top_k": 3})
    with pytest.raises(JaxDeltaError, match=r"layer-001\.safetensors: is damaged"):
        merge_runs([tmp_path / "c", other])


def test_the_script(kept: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both.json"
    script = Path(__file__).parents[1] / "scripts" / "merge_runs.py"
    command = [sys.executable, str(script), f"--runs={kept[0]},{kept[1]}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Analysis.load(out).n_calib_tokens == 10 * LENGTH
    assert "Per-phase" in done.stdout and out.with_suffix(".html").exists()
