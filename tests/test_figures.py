"""The pictures of a run show what the run found, and are there all or none."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from jaxdelta.errors import JaxDeltaError
from jaxdelta.report import write
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.charts.layers import figures
from jaxdelta.run.analyze import analyze
from jaxdelta.utils.files import write_together

matplotlib.use("Agg")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ["norms", "ranks", "spectra", "overlaps", "ledger", "owners", "phases", "captures"]
PARTS = ["attention", "mlp", "cross"]


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path) -> Analysis:
    return analyze(str(tiny_checkpoint), top_k=2, phases="early:0-1,late:2-3")


def test_overview_draws_the_figures_of_the_run(run: Analysis) -> None:
    from jaxdelta.report.charts.with_matplotlib import overview

    figure = overview(run)
    norms, ranks, cosines = figure.axes[0], figure.axes[1], figure.axes[3]
    states, updates = (line.get_ydata() for line in norms.lines)
    np.testing.assert_array_equal(states, [row["h_norm_mean"] for row in run.per_layer])
    np.testing.assert_array_equal(updates, [row["token_norm_mean"] for row in run.per_layer])
    np.testing.assert_array_equal(ranks.lines[0].get_ydata(), [row["eff_rank"] for row in run.per_layer])
    np.testing.assert_array_equal(cosines.images[0].get_array(), np.abs(run.top1_cos))
    assert [text.get_text() for text in norms.texts] == ["early", "late"]
    assert all(axes.get_ylabel() for axes in figure.axes[:4])
    figure.clear()


def test_script_writes_the_picture_or_says_why_not(run: Analysis, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")

    def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPTS / "plot_run.py"), *arguments], capture_output=True, text=True
        )

    done = plot(f"--run={tmp_path}/run.json", f"--out={tmp_path}/run.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    wrong = plot(f"--run={tmp_path}/run.json", f"--out={tmp_path}/run.doc")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    missing = plot(f"--run={tmp_path}/none.json", f"--out={tmp_path}/none.png")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert not (tmp_path / "none.png").exists()


def test_every_figure_as_picture_with_its_caption(run: Analysis, tmp_path: Path) -> None:
    files = write.shown(run, None, tmp_path)
    assert {path.name for path in files} == {f"{n}{e}" for n in NAMES for e in (".png", ".pdf")} | {
        "captions.md"
    }
    for path, data in files.items():
        assert data.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".md": b"# "}[path.suffix])
    captions = files[tmp_path / "captions.md"].decode()
    for figure in figures(run):
        assert f"## {figure.title}\n" in captions and figure.text in captions


def test_pictures_and_page_show_the_same_numbers(run: Analysis) -> None:
    from jaxdelta.report.charts.with_matplotlib import draw

    for figure in figures(run):
        picture = draw(figure)
        axes = [one for one in picture.axes if one.get_title(loc="left")]
        assert [one.get_title(loc="left") for one in axes] == [panel.title for panel in figure.panels]
        assert all(one.get_xlabel() and one.get_ylabel() for one in axes)
    bars = np.array([[bar.get_height() for bar in bars] for bars in draw(figures(run)[4]).axes[0].containers])
    shares = [[row["ledger"][part] / row["ledger"]["update"] for row in run.per_layer] for part in PARTS]
    np.testing.assert_allclose(bars, shares)


def test_names_are_not_taken_for_formulas(run: Analysis, tmp_path: Path) -> None:
    rows = [row | {"phase": "$\\bad{"} for row in run.per_layer]
    assert write.shown(dataclasses.replace(run, model="$\\worse_", per_layer=rows), None, tmp_path)


def test_report_makes_page_and_pictures_of_a_saved_run(run: Analysis, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    command = [sys.executable, str(SCRIPTS / "report.py"), f"--run={tmp_path}/run.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Saved: {tmp_path}/run.html\n"
    assert (tmp_path / "run.html").read_bytes() == write.shown(run, tmp_path / "a.html", None)[
        tmp_path / "a.html"
    ]


def test_a_failed_write_leaves_nothing(
    run: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tmp_path / "figures"
    files = {tmp_path / "run.html": b"page", figures / "a.png": b"picture"}

    def fail(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(JaxDeltaError, match="No space left"), write.directory_for(figures):
        run.save(tmp_path / "run.json", files)
    assert not list(tmp_path.iterdir())
    figures.mkdir()  # what was there stays
    with pytest.raises(JaxDeltaError, match="No space left"), write.directory_for(figures):
        write_together(files)
    assert list(tmp_path.iterdir()) == [figures]


def test_figures_that_cannot_be_written_are_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxDeltaError, match="is not a directory"):
        write.check_figures(tmp_path / "file")
    with pytest.raises(JaxDeltaError, match="missing: no such directory"):
        write.check_figures(tmp_path / "missing" / "figures")
    write.check_figures(tmp_path / "new")
    assert not (tmp_path / "new").exists()
