"""The picture of a run shows what the run found."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from jaxdelta.analysis import analyze
from jaxdelta.result import Analysis

matplotlib.use("Agg")

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "plot_run.py"


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path) -> Analysis:
    return analyze(str(tiny_checkpoint), top_k=2, phases="early:0-1,late:2-3")


def test_overview_draws_the_figures_of_the_run(run: Analysis) -> None:
    from jaxdelta.report.figures import overview

    figure = overview(run)
    norms, ranks, cosines = figure.axes[0], figure.axes[1], figure.axes[3]
    states, updates = (line.get_ydata() for line in norms.lines)
    np.testing.assert_array_equal(states, [row["h_norm_mean"] for row in run.per_layer])
    np.testing.assert_array_equal(updates, [row["token_norm_mean"] for row in run.per_layer])
    np.testing.assert_array_equal(ranks.lines[0].get_ydata(), [row["eff_rank"] for row in run.per_layer])
    np.testing.assert_array_equal(cosines.images[0].get_array(), np.abs(run.top1_cos))
    assert [text.get_text() for text in norms.texts] == ["early", "late"]
    assert all(axes.get_ylabel() for axes in figure.axes[:4])
    matplotlib.pyplot.close(figure)


def test_script_writes_the_picture_or_says_why_not(run: Analysis, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")

    def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)

    done = plot(f"--run={tmp_path}/run.json", f"--out={tmp_path}/run.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    wrong = plot(f"--run={tmp_path}/run.json", f"--out={tmp_path}/run.doc")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    missing = plot(f"--run={tmp_path}/none.json", f"--out={tmp_path}/none.png")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert not (tmp_path / "none.png").exists()
