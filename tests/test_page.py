"""The page of a run: all of it is there, nothing leaves it, no name or token breaks out of its text."""

import copy
import dataclasses
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PHASES, TEXT

from jaxdelta.report import tables
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.charts.chart import Heatmap, Panel
from jaxdelta.report.charts.layers import figures
from jaxdelta.report.page import page, page_file
from jaxdelta.run.analyze import analyze
from jaxdelta.spectra.views import view_of
from jaxdelta.text.excerpt import context, excerpt

EVIL = '</script><script>alert("1")</script><img src=x onerror=alert(2)> & <!-- $title <a href="http://a.b">'
VOID = {"meta", "img", "br", "link", "hr", "input"}
NAMES = ["norms", "ranks", "spectra", "overlaps", "ledger", "owners", "phases", "captures"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parsed(HTMLParser):
    """A page's elements, text outside scripts, and scripts; fails on a tag that does not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not (self.open and self.open[-1] == "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def marked(self, key: str, value: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if attributes.get(key) == value]


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def charts_of(parsed: Parsed) -> dict[str, Any]:
    return json.loads(parsed.scripts[0], parse_constant=no_constant)


def checked(analysis: Analysis) -> Parsed:
    """The page, after all that must hold for every one."""
    html = page(analysis)
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.elements].count("script") == len(parsed.scripts) == 3
    assert "plotly.js v" in parsed.scripts[1]
    assert not any(tag in ("link", "img", "iframe", "object", "base") for tag, _ in parsed.elements)
    assert not any(
        {"src", "href", "onerror", "onload"} & attributes.keys() for _, attributes in parsed.elements
    )
    assert "default-src 'none'" in str(parsed.marked("http-equiv", "Content-Security-Policy"))
    assert not re.search(r"@import|url\(", html[: html.index("</style>")])
    charts = charts_of(parsed)
    for name, chart in charts.items():
        assert len(parsed.marked("id", name)) == 1
        assert drawn(chart), name
        for axis in ("xaxis", "yaxis"):
            assert chart["layout"][axis]["title"]["text"]
    return parsed


def drawn(chart: dict[str, Any]) -> bool:
    """Whether something is to be seen: a finite number in a trace."""
    numbers = [z for trace in chart["data"] for row in trace.get("z", [trace.get("y", [])]) for z in row]
    return any(number is not None and math.isfinite(number) for number in numbers)


@pytest.fixture
def run(analysed: Analysis) -> Analysis:
    return analysed


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Analysis:
    return analyze(
        str(tiny_checkpoint), TEXT, top_k=4, phases=PHASES, views="none", bootstrap=0, null_draws=0
    )


def with_sinks(run: Analysis) -> Analysis:
    """As if layer 1 had a sink, without which its rank is 9."""
    rows = copy.deepcopy(run.per_layer)
    rows[1]["masked"] |= {"n": rows[1]["n"] - 1, "eff_rank": 9.0}
    return dataclasses.replace(run, per_layer=rows)


def test_the_page_of_a_full_run(run: Analysis) -> None:
    parsed = checked(run)
    assert {name.split("-")[0] for name in charts_of(parsed)} == set(NAMES)
    for fact in (
        run.model,
        f"{run.run['calibration_loss']:.4f} nats",
        "3 documents",
        "The cat sat on the mat",
    ):
        assert fact in parsed.text
    assert "Only 3 documents" in parsed.text and "Few tokens" in parsed.text
    assert "Not measured" not in parsed.text
    assert run.run["text_fingerprint"] in parsed.text  # in the methods
    for row in run.verdict or []:
        assert row["why"] is None or row["why"] in parsed.text
    titles = [figure.title for figure in figures(run)]
    assert all(title in parsed.text for title in titles)


def test_the_charts_show_the_run(run: Analysis) -> None:
    charts = charts_of(checked(run))
    states, updates = charts["norms-0"]["data"]
    for trace, key in ((states, "h_norm_mean"), (updates, "token_norm_mean")):
        np.testing.assert_allclose(trace["y"], [row[key] for row in run.per_layer], rtol=1e-4)
        low = [y - minus for y, minus in zip(trace["y"], trace["error_y"]["arrayminus"], strict=True)]
        np.testing.assert_allclose(low, [row["intervals"][key][0] for row in run.per_layer], rtol=1e-3)
    assert charts["norms-0"]["layout"]["yaxis"]["type"] == "log"
    np.testing.assert_allclose(charts["overlaps-0"]["data"][0]["z"], np.abs(run.top1_cos), rtol=1e-4)
    boundaries = {shape["x0"] for shape in charts["overlaps-0"]["layout"]["shapes"]}
    assert 1.5 in boundaries
    names = [text["text"] for text in charts["norms-0"]["layout"]["annotations"]]
    assert names == ["A", "B"]
    bars = np.array([trace["y"] for trace in charts["ledger-0"]["data"]])
    np.testing.assert_allclose(bars.sum(axis=0), 1, rtol=1e-4)
    assert len(charts["spectra-0"]["data"]) == run.num_layers + 1  # and the scale of colours


def test_masked_stands_beside_raw_where_there_are_sinks(run: Analysis) -> None:
    def series(analysis: Analysis) -> dict[str, list[float]]:
        return {trace["name"]: trace["y"] for trace in charts_of(checked(analysis))["ranks-0"]["data"]}

    assert list(series(run)) == ["raw", "centred"]
    assert "no token is a sink" in checked(run).text
    masked = series(with_sinks(run))
    assert list(masked) == ["raw", "masked", "centred"] and masked["masked"][1] == 9


def test_how_model_and_text_were_read_is_said(run: Analysis) -> None:
    facts = run.run | {"notes": ["module. stripped from <b>names</b>"], "text": {"counted": 7}}
    facts |= {"flags": run.run["flags"] | {"measure": "assistant"}}
    parsed = checked(dataclasses.replace(run, run=facts))
    assert "Module. stripped from <b>names</b>." in parsed.text
    assert "7 count (--measure=assistant)" in parsed.text


def with_sinks_left(run: Analysis, path: Path) -> Analysis:
    """The run read back from a file whose masked views of layer 1 still contain two sinks."""
    run.save(path)
    fields = json.loads(path.read_text())
    for view in ("masked", "mlp.masked"):
        view_of(fields["per_layer"][1], view)["sinks_left"] = 2
    path.write_text(json.dumps(fields))
    return Analysis.load(path)


def test_sinks_that_could_not_be_masked_are_counted(run: Analysis, tmp_path: Path) -> None:
    left = with_sinks_left(run, tmp_path / "a.json")
    assert "sinks left in" not in checked(run).text
    text = checked(left).text
    assert "no token is a sink" not in text
    assert "no sink was masked, so the masked view is the raw one (sinks left in: 2 in layer 1)" in text
    assert "Some sinks could not be masked (sinks left in: 2 in layer 1)." in text  # in the methods
    text = checked(with_sinks(left)).text
    assert "which can make a rank look low (sinks left in: 2 in layer 1)" in text


def test_tables_count_sinks_that_could_not_be_masked(run: Analysis, tmp_path: Path) -> None:
    left = with_sinks_left(run, tmp_path / "a.json")
    head, _, *layers = tables.view_table(left)
    assert "sinks that could not be masked" in head
    assert [line.endswith("  2 left in") for line in layers] == [row["L"] == 1 for row in run.per_layer]
    _, *ledger = tables.ledger_table(left)
    assert [line.endswith("sinks masked 0, 2 left in") for line in ledger] == [L == 1 for L in range(4)]
    assert not any("no sinks to mask" in line for line in tables.chance_table(left))
    assert any("no sinks to mask" in line for line in tables.chance_table(run))
    assert "left in" not in tables.tables(run)


def test_a_run_without_views_intervals_and_nulls_says_so(plain: Analysis) -> None:
    parsed = checked(plain)
    assert {name.split("-")[0] for name in charts_of(parsed)} == set(NAMES) - {"owners"}
    for missing in ("the view without sinks", "attention and MLP apart", "intervals", "chance"):
        assert missing in parsed.text
    assert parsed.text.count("Not measured: ") == 1  # in place of the figure
    assert "No verdict" in parsed.text


def test_a_file_of_the_first_version(run: Analysis, tmp_path: Path) -> None:
    dropped = (
        "roy_",
        "participation",
        "stable_",
        "sigma1",
        "mean_",
        "n",
        "split",
        "intervals",
        "ledger",
        "note",
    )
    views = ("masked", "centred", "attention", "mlp")
    rows = [
        {k: v for k, v in row.items() if not k.startswith(dropped) and k not in views}
        for row in run.per_layer
    ]
    facts = {k: v for k, v in run.run.items() if k not in ("documents", "few_documents")}
    old = dataclasses.replace(
        run, schema_version=1, per_layer=rows, run=facts, **dict.fromkeys(Analysis.ARRAYS[3:])
    )
    old.save(tmp_path / "a.json")
    fields = json.loads((tmp_path / "a.json").read_text())
    for key in ("overlap", "verdict", "control", "text"):
        del fields[key]
    (tmp_path / "a.json").write_text(json.dumps(fields))
    parsed = checked(Analysis.load(tmp_path / "a.json"))
    assert {"norms-0", "ranks-0", "overlaps-0", "phases-0", "captures-0"} <= charts_of(parsed).keys()


def test_no_name_or_token_breaks_out(run: Analysis) -> None:
    rows = copy.deepcopy(run.per_layer)
    for row in rows:
        row["phase"] = f"{row['phase']}{EVIL}"
        for view in (row, row["masked"]):
            view["sigma1_tokens"] = [
                owner | {"token": EVIL + "\x00\ud800\n"} for owner in view["sigma1_tokens"]
            ]
    around = dict.fromkeys((run.text or {})["around"], EVIL)
    text = (run.text or {}) | {"begins": EVIL, "around": around}
    facts = run.run | {"device": EVIL, "versions": {EVIL: EVIL}}
    evil = dataclasses.replace(run, model=EVIL + "\udcff", per_layer=rows, text=text, run=facts)
    parsed = checked(evil)
    assert parsed.text.count(EVIL) > 20
    shown = page_file(evil).decode().replace(parsed.scripts[1], "")  # Plotly's own code has some
    assert "alert" in shown and "<img" not in shown and "<a " not in shown
    for chart in charts_of(parsed).values():  # Plotly reads some HTML, links among it
        for words in (chart["layout"].get("annotations", []), chart["data"]):
            assert not re.search(r"<(?!br>|extra>|/extra>)", json.dumps(words))


@pytest.mark.parametrize("phases", ["A:0,B:1-3", "whole:0-3"])
def test_phases_that_leave_nothing_to_compare(tiny_checkpoint: Path, phases: str) -> None:
    found = analyze(str(tiny_checkpoint), TEXT, top_k=2, phases=phases, bootstrap=20, null_draws=20)
    assert "Phases" in checked(found).text


def test_a_model_of_one_layer(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "one", num_hidden_layers=1)
    parsed = checked(analyze(str(model), TEXT, top_k=2, bootstrap=20, null_draws=20))
    assert "there is nothing to share" in parsed.text


def test_a_layer_that_writes_nothing_is_named(run: Analysis) -> None:
    rows = copy.deepcopy(run.per_layer)
    rows[2] |= {"token_norm_mean": 0.0, "eff_rank": 0.0}
    parsed = checked(dataclasses.replace(run, per_layer=rows))
    assert "Not on the log axis of “Norms”, being 0: update ‖δ‖ at 2." in parsed.text


def large(run: Analysis, layers: int = 64, hidden: int = 5120, rank: int = 2047, k: int = 8) -> Analysis:
    """A run of this size, made of the small one's rows and random arrays."""
    random = np.random.default_rng(0)

    def repeated(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        return [rows[i % len(rows)] | {"L": i} for i in range(count)]

    overlap = copy.deepcopy(run.overlap or {})
    for relations in overlap.values():
        for name, fewer in (("adjacent", 1), ("layers", 0), ("v1_stability", 0)):
            relations[name] = repeated(relations[name], layers - fewer)
    cosines = random.uniform(-1, 1, (layers, layers)).astype(np.float32)
    falling = np.geomspace(3000, 0.01, rank) * random.uniform(0.5, 1, (layers, rank))
    return dataclasses.replace(
        run,
        num_layers=layers,
        hidden=hidden,
        n_calib_tokens=rank,
        per_layer=repeated(run.per_layer, layers),
        overlap=overlap,
        directions=random.normal(size=(layers, k, hidden)).astype(np.float32),
        singular_values=falling.astype(np.float32),
        top1_cos=cosines,
        top1_cos_adjacent=np.diagonal(cosines, 1).tolist(),
        principal_cosines=random.uniform(0, 1, (layers, layers, k)).astype(np.float32),
        projection_distance=None,
        grassmann_distance=None,
    )


def test_64_layers_fit_into_6_megabytes(run: Analysis) -> None:
    found = large(run)
    checked(found)
    assert len(page_file(found)) < 6e6


def test_every_figure_has_words_and_units(run: Analysis) -> None:
    for figure in figures(with_sinks(run)):
        assert figure.title and figure.caption.endswith(".") and figure.panels
        for panel in figure.panels:
            if isinstance(panel, Heatmap):
                assert panel.label and panel.chance is not None
                continue
            assert isinstance(panel, Panel) and panel.series and panel.x.label and panel.y.label
            for series in panel.series:
                values = [value for value in series.y if value is not None]
                low, high = panel.y.range or (-math.inf, math.inf)
                assert all(low <= value <= high + 1e-9 for value in values), (panel.title, series.name)


def test_owners_stand_in_their_text(run: Analysis) -> None:
    whole = "\n\n".join(TEXT)
    for row in run.per_layer:
        for owner in row["sigma1_tokens"]:
            before, after = context(run.text, owner["position"])
            assert before + owner["token"] + after in whole
            assert len(before) <= 8 and len(after) <= 8  # tokens are bytes here
    assert context(None, 3) == ("", "")
    assert run.text is not None and run.text["begins"] == whole[:24]


def test_an_excerpt_stays_within_its_window() -> None:
    from jaxdelta.text.tokens import Tokens

    ids = np.arange(40, dtype=np.int32).reshape(2, 20)
    tokens = Tokens(ids, np.zeros_like(ids))
    found = excerpt(
        tokens, [{"sigma1_tokens": [{"position": 22}], "mlp": {"sigma1_tokens": [{"position": 19}]}}]
    )
    assert list(found["around"]) == [str(i) for i in [*range(11, 20), *range(20, 31)]]
    assert found["around"]["22"] == "<22>"
    assert context(found, 22) == ("<19><18>" and context(found, 22)[0], context(found, 22)[1])


PROBE = """
<script>
Promise.all(drawn).then(() => {
const empty = Object.keys(charts).filter(name => {
  const plot = document.getElementById(name).querySelector(".overplot");
  return !plot || !(plot.getBBox().width > 50 && plot.querySelector("path,image"));
});
const silent = Object.keys(charts).filter(name => charts[name].data[0].z).filter(name => {
  Plotly.Fx.hover(name, { xval: 2, yval: 1 }, "xy");
  return !document.getElementById(name).querySelector(".hoverlayer text")?.textContent;
});
const wide = [...document.querySelectorAll(".chart svg")].filter(
  e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
document.body.dataset.found = JSON.stringify({
  empty, silent, wide: wide.length, count: document.querySelectorAll(".chart .main-svg").length,
  width: document.documentElement.scrollWidth - document.documentElement.clientWidth });
});
</script>
"""


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    def open_page(html: bytes, *flags: str) -> tuple[str, str]:
        assert BROWSER
        (tmp_path / "page.html").write_bytes(html)
        # Chromium's sandbox does not run as root, as CI does; the page is our own.
        fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [BROWSER, *fixed, profile, *flags, (tmp_path / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    yield open_page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page was parsed, but not opened")
@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_opens_in_chromium(
    run: Analysis, browse: Callable[..., tuple[str, str]], width: int
) -> None:
    html = page_file(with_sinks(run)).replace(b"</body>", PROBE.encode() + b"</body>")
    dom, said = browse(html, "--dump-dom", "--virtual-time-budget=20000", f"--window-size={width},1000")
    assert said == ""  # no error, and no request that the page's policy would have stopped
    attributes = Parsed(dom).elements
    found = next(json.loads(a["data-found"] or "") for tag, a in attributes if tag == "body")
    assert found["count"] >= len(charts_of(checked(run)))
    assert (found["empty"], found["silent"], found["wide"], found["width"]) == ([], [], 0, 0)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page was parsed, but not printed")
def test_the_page_prints(run: Analysis, browse: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    browse(page_file(run), f"--print-to-pdf={tmp_path / 'page.pdf'}")
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") > 5
