"""Comparison of runs: bands by hand, directions, the page, the script and its errors."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT
from test_page import BROWSER, EVIL, PROBE, Parsed, browse, charts_of, drawn, with_sinks

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.analysis import Analysis
from jaxdelta.report.compare import page as compare_page
from jaxdelta.report.compare import tables
from jaxdelta.report.compare.compare import MOST_RUNS, compare, in_bands, labels_of, load
from jaxdelta.report.compare.metrics import Curve
from jaxdelta.run.analyze import analyze
from jaxdelta.statistics.across_layers.overlap import overlaps

__all__ = ["browse"]  # a fixture

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_runs.py"


@pytest.fixture
def run(analysed: Analysis) -> Analysis:
    return analysed


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Of another size, another text, without views, intervals and nulls."""
    model = make_checkpoint(tmp_path_factory.mktemp("other") / "deep", num_hidden_layers=6, hidden_size=32)
    return analyze(str(model), TEXT[:2], top_k=2, views="none", bootstrap=0, null_draws=0)


def turned(run: Analysis) -> Analysis:
    """The same run but for its directions, each of which has turned by 60° towards one that no layer has."""
    rest = np.linalg.qr(np.swapaxes(run.directions, 1, 2), "complete")[0][:, :, run.directions.shape[1] :]
    aside = np.swapaxes(rest, 1, 2)[:, : run.directions.shape[1]]
    new = math.cos(math.pi / 3) * run.directions + math.sin(math.pi / 3) * aside
    return dataclasses.replace(run, directions=new.astype(np.float32))


def shortened(run: Analysis) -> Analysis:
    """With relative steps a thousandth as long, far outside the run's intervals; in the raw view alone."""
    rows = json.loads(json.dumps(run.per_layer))  # views that are the same share their intervals
    for row in rows:
        row["rel_step_mean"] /= 1e3
        row["intervals"]["rel_step_mean"] = [end / 1e3 for end in row["intervals"]["rel_step_mean"]]
    return dataclasses.replace(run, per_layer=rows)


def test_bands_by_hand() -> None:
    # Three layers in two bands: the middle one belongs half to each.
    curve = Curve((0, 1, 2), (1.0, 4.0, 9.0), ((0.5, 2.0), (2.0, 8.0), None), 3)
    (low, low_ends), (high, high_ends) = in_bands(curve, 2, log=False)
    assert low == pytest.approx((1 + 4 / 2) / 1.5) and high == pytest.approx((4 / 2 + 9) / 1.5)
    assert low_ends == pytest.approx(((0.5 + 2 / 2) / 1.5, (2 + 8 / 2) / 1.5)) and high_ends is None
    (low, low_ends), (high, _) = in_bands(curve, 2, log=True)
    assert low == pytest.approx(4 ** (0.5 / 1.5)) and high == pytest.approx((2 * 9) ** (1 / 1.5))
    assert low_ends == pytest.approx(((0.5 * 2**0.5) ** (1 / 1.5), (2 * 8**0.5) ** (1 / 1.5)))


def test_bands_of_gaps_zeros_and_places_between_layers() -> None:
    assert in_bands(Curve((0, 1), (None, 2.0), (None, None), 2), 2, log=True) == (
        (None, None),
        (pytest.approx(2.0), None),
    )
    assert in_bands(Curve((0, 1), (0.0, 2.0), (None, None), 2), 1, log=True) == ((0.0, None),)
    # Between layers 0 and 1 of two: half in each band.
    between = Curve((0.5,), (0.3,), ((0.2, 0.4),), 2)
    for value, ends in in_bands(between, 2, log=False):
        assert value == pytest.approx(0.3) and ends == pytest.approx((0.2, 0.4))


@pytest.mark.parametrize("bands", [1, 3, 7])
def test_every_layer_counts_once(bands: int) -> None:
    values = np.random.default_rng(0).uniform(size=7)
    curve = Curve(tuple(range(7)), values.tolist(), (None,) * 7, 7)
    found = [value for value, _ in in_bands(curve, bands, log=False)]
    assert np.mean(found) == pytest.approx(values.mean())
    if bands == 7:
        assert found == pytest.approx(values.tolist())


def test_figures_of_both_runs(run: Analysis, plain: Analysis) -> None:
    found = compare([run, plain], ["a", "b"])
    assert found.bands == 4 and found.band_names == ["0–0.25", "0.25–0.5", "0.5–0.75", "0.75–1"]
    rank = next(one for one in found.compared if one.title == "Effective rank")
    first, second = rank.parts
    assert first and second
    assert [part.value for part in first] == pytest.approx([row["eff_rank"] for row in run.per_layer])
    assert [part.interval for part in first] == [
        pytest.approx(tuple(row["intervals"]["eff_rank"])) for row in run.per_layer
    ]
    six = [row["eff_rank"] for row in plain.per_layer]
    assert second[0].value == pytest.approx(six[0] ** (2 / 3) * six[1] ** (1 / 3))
    assert all(part.interval is None and not part.apart for part in second)
    attention = next(one for one in found.compared if one.title == "Attention's energy")
    assert all(attention.curves) and all(attention.parts)
    assert found.pairs == () and "6 layers of hidden size 32" in found.left_out
    said = " ".join(found.cautions)
    assert "different tokens" in said and "no intervals" in said and "Hidden sizes differ" in said


def test_a_run_without_a_ledger(run: Analysis) -> None:
    """As files of earlier versions may be."""
    bare = [{key: value for key, value in row.items() if key != "ledger"} for row in run.per_layer]
    found = compare([run, dataclasses.replace(run, per_layer=bare)], ["a", "b"])
    attention = next(one for one in found.compared if one.title == "Attention's energy")
    assert attention.curves[0] and attention.curves[1] is None and attention.parts[1] is None


def test_apart_only_where_intervals_do_not_overlap(run: Analysis) -> None:
    found = compare([run, shortened(run)], ["a", "b"])
    for compared in found.compared:
        assert not any(part.apart for part in compared.parts[0] or ())
        steps = compared.title == "Relative step"
        assert all(part.apart == steps for part in compared.parts[1] or ())


def test_directions_between_runs(run: Analysis) -> None:
    (same, other) = compare([run, run, turned(run)], ["a", "b", "c"]).pairs
    np.testing.assert_allclose(same.cosines, np.abs(run.top1_cos), atol=1e-6)
    np.testing.assert_allclose(np.diagonal(same.shared), 1, atol=1e-6)
    np.testing.assert_allclose(np.diagonal(other.cosines), 0.5, atol=1e-6)
    np.testing.assert_allclose(np.diagonal(other.shared), 0.25, atol=1e-6)
    np.testing.assert_allclose(other.angles, 60, atol=1e-3)
    crossed = overlaps(
        np.concatenate([run.directions, turned(run).directions]), np.ones((1, 2 * run.num_layers), bool)
    ).top1_cos[: run.num_layers, run.num_layers :]
    np.testing.assert_allclose(other.cosines, np.abs(crossed), atol=1e-12)
    assert same.k == 4 and same.shared_chance == 4 / 48
    assert same.cos_chance == pytest.approx(math.sqrt(2 / (math.pi * 48)), rel=0.01)
    assert (same.p < 1e-6).all() and (other.p > 1e-6).all()


def test_phases_and_verdicts_of_both_runs(run: Analysis, plain: Analysis) -> None:
    found = compare([run, plain], ["a", "b"]).phases
    assert [phase.layers for phase in found if phase.run == 0] == ["0–1", "2–3"]
    rows = {phase.row["phase"]: phase for phase in found if phase.run == 1}
    means = {row["phase"]: row["intra_cos_mean"] for row in plain.phase_overlap if row["layers"] > 1}
    for name, phase in rows.items():
        assert phase.row["intra"]["value"] == means.get(name)
    names = [phase.row["phase"] for phase in found]
    assert names == sorted(names, key=names.index)  # a phase's runs follow each other


def test_settings_tell_what_differs(run: Analysis, plain: Analysis) -> None:
    settings = {row.name: row for row in compare([run, plain], ["a", "b"]).settings}
    different = {name for name, row in settings.items() if row.other(1)}
    assert {
        "model",
        "layers",
        "hidden size",
        "text, SHA-256",
        "tokens",
        "--bootstrap",
        "--views",
    } <= different
    assert not different & {"jax", "weights", "last state", "loss (nats per token)"}
    assert not any(row.other(0) for row in settings.values())


def test_tables(run: Analysis, plain: Analysis) -> None:
    text = tables.tables(compare([with_sinks(run), shortened(run), plain], ["one", "two", "three"]))
    assert "Effective rank, masked: number of directions" in text
    assert len(re.findall(r"^  two .*\*.*\*", text, re.MULTILINE)) == 1  # the relative step
    assert "Directions of one and two" in text and "Directions of three (6 layers" in text
    assert f"L= 3     {1:.4f}" in text
    assert "≠" in text and "--bootstrap" in text
    assert max(map(len, text.splitlines())) < 250


def checked(runs: list[Analysis], labels: list[str]) -> Parsed:
    """The page, after all that must hold for every one."""
    html = compare_page.page(compare(runs, labels))
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.elements].count("script") == len(parsed.scripts) == 3
    assert not any({"src", "href", "onerror"} & attributes.keys() for _, attributes in parsed.elements)
    for name, chart in charts_of(parsed).items():
        assert len(parsed.marked("id", name)) == 1
        assert drawn(chart), name
        for axis in ("xaxis", "yaxis"):
            assert chart["layout"][axis]["title"]["text"]
    return parsed


def test_the_page(run: Analysis, plain: Analysis) -> None:
    parsed = checked([with_sinks(run), turned(run), plain], ["one", "two", "three"])
    charts = charts_of(parsed)
    names = {name.split("-")[0] for name in charts}
    assert names == {"norms", "ranks", "ledger", "across", "directions", "phases"}
    ranks = {trace["name"]: trace for trace in charts["ranks-0"]["data"]}
    assert list(ranks) == ["one", "two", "three", "one, masked"]  # where sinks change it
    assert ranks["three"]["x"] == pytest.approx([(layer + 0.5) / 6 for layer in range(6)], rel=1e-4)
    assert ranks["one, masked"]["y"][1] == 9 and ranks["one, masked"]["line"]["dash"] == "dash"
    assert "layer 3" in ranks["one"]["customdata"][3] and "[" in ranks["one"]["customdata"][3]
    assert charts["ranks-0"]["layout"]["yaxis"]["type"] == "log"
    assert charts["directions-0"]["data"][0]["y"] == pytest.approx([0.5] * 4, rel=1e-4)
    assert "they do not lie in the same space" in parsed.text
    for row in run.verdict or []:
        assert row["why"] is None or row["why"] in parsed.text


def first_layer(run: Analysis) -> Analysis:
    """As if there were no other."""
    phase = run.phase_overlap[0] | {"layers": 1, "intra_cos_mean": 1.0, "cross_cos_mean": 0.0}
    return dataclasses.replace(
        run,
        num_layers=1,
        per_layer=run.per_layer[:1],
        top1_cos_adjacent=[],
        phase_overlap=[phase],
        block_capture=[],
        overlap=None,
        verdict=None,
        directions=run.directions[:1],
        singular_values=run.singular_values[:1],
        top1_cos=run.top1_cos[:1, :1],
        **dict.fromkeys(Analysis.ARRAYS[3:]),
    )


def test_pages_of_little_and_of_most(run: Analysis, plain: Analysis) -> None:
    assert "are not compared with" in checked([plain, run], ["a", "b"]).text
    checked([first_layer(plain)] * 2, ["a", "b"])
    checked([run] * MOST_RUNS, list("abcde"))


def test_no_label_or_name_breaks_out(run: Analysis) -> None:
    facts = run.run | {"device": EVIL, "flags": run.run["flags"] | {"control": EVIL}}
    evil = dataclasses.replace(run, model=EVIL + "\udcff", run=facts)
    parsed = checked([run, evil], [EVIL, EVIL + "\x1b"])
    assert parsed.text.count(EVIL) > 20
    for chart in charts_of(parsed).values():
        for words in (chart["layout"].get("annotations", []), chart["data"]):
            assert not re.search(r"<(?!br>|extra>|/extra>)", json.dumps(words))
    text = tables.tables(compare([run, evil], ["a", "b\x1b[2J\n"]))
    assert "\x1b" not in text and "b\\x1b[2J↵" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page was parsed, but not opened")
def test_the_page_opens_in_chromium(run: Analysis, browse: Callable[..., tuple[str, str]]) -> None:
    html = compare_page.page_file(compare([with_sinks(run), turned(run)], ["one", "two"]))
    html = html.replace(b"</body>", PROBE.encode() + b"</body>")
    dom, said = browse(html, "--dump-dom", "--virtual-time-budget=20000", "--window-size=500,1000")
    assert said == ""
    found = next(json.loads(a["data-found"] or "") for tag, a in Parsed(dom).elements if tag == "body")
    assert (found["empty"], found["silent"], found["wide"], found["width"]) == ([], [], 0, 0)


def test_labels(run: Analysis, plain: Analysis) -> None:
    paths = [Path("x/a.json"), Path("x/b.json")]
    assert labels_of([run, plain], paths) == [Path(run.model).name, "deep"]
    assert labels_of([run, run], paths) == ["a", "b"]
    assert labels_of([run, run], [Path("x/a.json"), Path("y/a.json")]) == ["x/a.json", "y/a.json"]


@pytest.mark.parametrize(
    ("runs", "labels", "bands", "said"),
    [
        (1, ["a"], None, "two to 5 runs"),
        (6, list("abcdef"), None, "two to 5 runs"),
        (2, ["a"], None, "1 for 2 runs"),
        (2, ["a", "a"], None, "differ: a, a"),
        (2, ["a", ""], None, "must all be there"),
        (2, ["a", "b"], 0, "between 1 and 4, the layers of a"),
        (2, ["a", "b"], 5, "between 1 and 4, the layers of a"),
    ],
)
def test_what_cannot_be_compared(
    run: Analysis, runs: int, labels: list[str], bands: int | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        compare([run] * runs, labels, bands)


@pytest.mark.parametrize(
    "spoiled", [{"per_layer": []}, {"run": {}}, {"num_layers": 0}, {"overlap": {"raw": {"layers": [1]}}}]
)
def test_a_file_that_is_no_analysis(run: Analysis, tmp_path: Path, spoiled: dict[str, object]) -> None:
    run.save(tmp_path / "a.json")
    fields = json.loads((tmp_path / "a.json").read_text()) | spoiled
    (tmp_path / "a.json").write_text(json.dumps(fields))
    with pytest.raises(JaxDeltaError, match=r"a\.json: is not an analysis"):
        load(tmp_path / "a.json")


@pytest.fixture
def script(
    run: Analysis, plain: Analysis, tmp_path: Path
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """compare_runs.py in a directory with a.json and b.json."""
    run.save(tmp_path / "a.json")
    plain.save(tmp_path / "b.json")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    yield call


def test_the_script(script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = script("a.json", "b.json", "--out=both.html", "--labels=one,two", "--bands=2")
    assert done.returncode == 0 and done.stderr == ""
    assert "=== By relative depth" in done.stdout and "0–0.5" in done.stdout and "one" in done.stdout
    assert done.stdout.endswith("Saved: both.html\n")
    assert "one and two side by side" in Parsed((tmp_path / "both.html").read_text()).text


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["a.json"], 2, "name two runs or more"),
        (["a.json", "./a.json"], 2, "named twice"),
        (["a.json", "b.json", "--quiet"], 2, "quiet"),
        (["a.json", "b.json", "--out=both.pdf"], 2, "must end in .html"),
        (["a.json", "b.json", "--out=no/both.html"], 1, "no such directory"),
        (["a.json", "c.json", "--out=both.html"], 1, "c.json: cannot be read"),
    ],
)
def test_errors_are_one_line(
    script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    done = script(*arguments)
    assert done.returncode == status
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]
