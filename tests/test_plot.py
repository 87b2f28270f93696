"""What a notebook shows of a run: figures on axes, and the run itself."""

import dataclasses
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.charts.layers import figures
from jaxdelta.report.notebook import Plot
from jaxdelta.run.analyze import analyze

matplotlib.use("Agg")

EVIL = "<script>alert(1)</script><img src=x> & \x00 \udcff"


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path) -> Analysis:
    return analyze(str(tiny_checkpoint), top_k=2, phases="early:0-1,late:2-3")


@pytest.fixture(autouse=True)
def closed() -> None:
    plt.close("all")


def charts() -> set[str]:
    return {name for name in vars(Plot) if not name.startswith("_")} - {"overview"}


def test_every_figure_of_the_report_is_there(run: Analysis) -> None:
    assert charts() == {figure.name for figure in figures(run)}
    for figure in figures(run):
        axes = getattr(run.plot, figure.name)()
        assert [one.get_title(loc="left") for one in axes] == [panel.title for panel in figure.panels]
        assert plt.gcf() is axes[0].figure  # so a notebook shows it
    assert len(run.plot.overview()) == 4


def test_a_panel_on_given_axes(run: Analysis) -> None:
    picture, axes = plt.subplots(2, 2)
    (drawn,) = run.plot.overlaps("|COS|", ax=axes[0, 0])
    assert drawn is axes[0, 0] and plt.gcf() is picture
    np.testing.assert_array_equal(drawn.images[0].get_array(), np.abs(run.top1_cos))
    step, state = run.plot.norms("relative step", "along the state", ax=axes[1])
    np.testing.assert_array_equal(step.lines[0].get_ydata(), [r["rel_step_mean"] for r in run.per_layer])
    np.testing.assert_array_equal(state.lines[0].get_ydata(), [r["cos_delta_h_mean"] for r in run.per_layer])
    titles = [panel.title for panel in figures(run)[0].panels][:4]
    _, axes = plt.subplots(2, 2)
    assert run.plot.norms(*titles, ax=axes) == list(axes.flat)


def test_what_cannot_be_drawn(run: Analysis) -> None:
    with pytest.raises(UsageError, match="norms: no panel 'ranks'; there are 'Norms', 'Relative step'"):
        run.plot.norms("ranks")
    with pytest.raises(UsageError, match=r"\d axes are needed, 1 given"):
        run.plot.norms(ax=plt.subplots()[1])
    rows = [{key: value for key, value in row.items() if key != "ledger"} for row in run.per_layer]
    with pytest.raises(JaxDeltaError, match="ledger: Not measured"):
        dataclasses.replace(run, per_layer=rows).plot.ledger()


def test_without_matplotlib_a_line_says_what_to_install(
    run: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "jaxdelta.report.charts.with_matplotlib", raising=False)
    monkeypatch.delattr("jaxdelta.report.charts.with_matplotlib", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(JaxDeltaError, match=r"matplotlib.*pip install 'jaxdelta\[figures\]'"):
        run.plot.norms()


def test_a_result_brings_nothing_along_before_it_is_shown() -> None:
    heavy = ["jax", "matplotlib", "pandas", "gguf", "plotly"]
    code = f"import sys, jaxdelta.report.result; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


class Parsed(HTMLParser):
    """The tags and the text of a summary; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        assert not {name for name, _ in attributes} & {"style", "src", "href", "onerror", "onload"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_the_run(run: Analysis) -> None:
    html = run._repr_html_()
    parsed = Parsed(html)
    assert not parsed.tags & {"script", "style", "link", "img"}
    assert f"{run.n_calib_tokens} in 25 documents" in parsed.text
    for row in run.verdict or []:
        assert row["phase"] in parsed.text
    for row in run.per_layer:
        assert f"{row['eff_rank']:.4g}" in parsed.text
    assert len(html) < 20_000


def test_no_name_breaks_out_of_the_summary(run: Analysis) -> None:
    rows = [row | {"phase": EVIL} for row in run.per_layer]
    evil = dataclasses.replace(run, model=EVIL, per_layer=rows, run=run.run | {"device": EVIL})
    html = evil._repr_html_()
    html.encode()
    assert "alert" in html and not Parsed(html).tags & {"script", "img"}


def test_a_run_of_the_first_version_is_shown(run: Analysis) -> None:
    old = dataclasses.replace(run, overlap=None, verdict=None, text=None, principal_cosines=None)
    assert "No verdict" in Parsed(old._repr_html_()).text
