"""Views: their names, the tokens they keep, and that a view's figures are those of the rows it is about."""

import numpy as np
import pytest
from updates import WIDE, K, from_rows, tokens, update

from jaxdelta.errors import UsageError
from jaxdelta.spectra.view_summary import ViewSummary
from jaxdelta.spectra.views import (
    ALL,
    DEFAULT_SINK_FACTOR,
    DEFAULT_VIEWS,
    MASKED,
    PARTS,
    RAW,
    View,
    parse_views,
    without_sinks,
)
from jaxdelta.statistics.layer_row import layer_row
from jaxdelta.statistics.per_layer.ranks import numerical_rank
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import ResamplingGroups

SINKS = {5: 30.0, 40: 100.0}
SAMPLE = ResamplingGroups.of(tokens(WIDE[0]), 0, 0)


# Names


def test_every_view_has_its_name_and_its_path() -> None:
    assert len(ALL) == len(set(ALL.values())) == len(PARTS) * 4
    assert all(view.name == name for name, view in ALL.items())
    assert (RAW.path, RAW.name) == ((), "raw")
    assert MASKED.path == ("masked",)
    assert View("mlp", True, True).path == ("mlp", "masked", "centred")
    assert View("attention").name == "attention"
    assert View("attention", centred=True).name == "attention.centred"


def test_parse_views() -> None:
    assert parse_views("none") == (RAW,)
    assert parse_views("all") == tuple(ALL.values())
    assert parse_views(",".join(ALL)) == tuple(ALL.values())
    for name, view in ALL.items():
        assert parse_views(name) == tuple(dict.fromkeys((RAW, view)))
    assert parse_views("mlp, masked,mlp,raw ,masked") == (RAW, View("mlp"), MASKED)
    assert parse_views(DEFAULT_VIEWS)[0] == RAW


@pytest.mark.parametrize(
    "text", ["centered", "masked,mlp.raw", "", "none,masked", "centred.masked", "masked,"]
)
def test_unknown_views_are_named(text: str) -> None:
    unknown = next(name for name in text.split(",") if name not in ALL)
    with pytest.raises(UsageError, match=f"views: no view '{unknown}'; there are none, all, raw"):
        parse_views(text)


# Sinks


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("where", ["entering", "leaving", "both"])
def test_planted_sinks_are_found_and_nothing_else(where: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    norms = {name: np.exp(0.4 * rng.normal(size=500)) for name in ("entering", "leaving")}
    planted = rng.choice(500, size=12, replace=False)
    for name in norms if where == "both" else (where,):
        norms[name][planted] = np.median(norms[name]) * np.repeat([30.0, 100.0], 6)
    kept = without_sinks(**norms, factor=DEFAULT_SINK_FACTOR)
    np.testing.assert_array_equal(np.flatnonzero(~kept), np.sort(planted))


def test_a_sink_is_longer_than_the_factor_says() -> None:
    norms = np.array([1.0, 1.0, 1.0, 3.0, 3.0001])
    np.testing.assert_array_equal(without_sinks(norms, np.ones(5), 3.0), [True] * 4 + [False])
    np.testing.assert_array_equal(without_sinks(np.ones(5), norms, 3.0), [True] * 4 + [False])


def test_a_token_is_always_left() -> None:
    assert without_sinks(np.zeros(4), np.zeros(4), 10.0).all()
    before, after = np.array([1.0, 1, 1, 99, 99]), np.array([99.0, 99, 1, 1, 1])
    np.testing.assert_array_equal(without_sinks(before, after, 10.0), [False, False, True, False, False])
    assert without_sinks(np.array([1.0]), np.array([5.0]), 10.0).all()


# Figures


def assert_same_spectrum(found: ViewSummary, rows: np.ndarray) -> None:
    """`found` is the SVD of these rows of float64."""
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    rank = min(len(values), numerical_rank(values))
    np.testing.assert_allclose(found.singular_values[:rank], values[:rank], rtol=1e-9)
    assert numerical_rank(found.singular_values) == rank
    np.testing.assert_allclose(np.abs(np.sum(found.basis[:K] * vectors[:K], axis=1)), 1, rtol=1e-9)
    products = found.kept_products[0]
    np.testing.assert_allclose(products, np.square(rows).sum(axis=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sinks", [SINKS, {}], ids=["sinks", "none"])
def test_every_view_is_of_its_rows(sinks: dict[int, float]) -> None:
    wrote = update(WIDE, sinks=sinks)
    others = np.setdiff1d(np.arange(WIDE[0]), list(sinks))
    parts = {"update": wrote.attention + wrote.mlp, "attention": wrote.attention, "mlp": wrote.mlp}
    figures = from_rows(wrote, SAMPLE).views
    assert list(figures) == list(ALL.values())
    for view, found in figures.items():
        rows = parts[view.part].astype(np.float64)[others if view.masked else slice(None)]
        assert_same_spectrum(found, rows - rows.mean(axis=0) if view.centred else rows)
        assert found.kept.sum() == len(rows)
    if not sinks:
        assert figures[MASKED] is figures[RAW]


def test_masked_figures_are_those_of_the_update_without_these_rows() -> None:
    whole = update(WIDE, sinks=SINKS)
    ordinary = np.setdiff1d(np.arange(WIDE[0]), list(SINKS))
    documents = tokens(WIDE[0]).documents[0, 1:]
    of, fewer = (
        ResamplingGroups.of(tokens(len(own), own), 50, 3) for own in (documents, documents[ordinary])
    )
    row = layer_row(0, "A", from_rows(whole, of), of, K, WIDE[1])
    alone = layer_row(
        0, "A", from_rows(Update(*(part[ordinary] for part in whole)), fewer), fewer, K, WIDE[1]
    )
    for part in (lambda row: row, lambda row: row["attention"], lambda row: row["mlp"]):
        for masked, plain in (
            (part(row)["masked"], part(alone)),
            (part(row)["masked"]["centred"], part(alone)["centred"]),
        ):
            others = {"sigma1_tokens", "centred", "intervals", "sinks_left", "massive_channels"}
            for name in masked.keys() - others:
                assert masked[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-9), name
            for name, channels in masked.get("massive_channels", {}).items():
                for one, other in zip(channels, plain["massive_channels"][name], strict=True):
                    assert one == other | {"share": pytest.approx(other["share"], rel=1e-6)}
            assert masked["intervals"] == {
                n: pytest.approx(i, rel=1e-6) for n, i in plain["intervals"].items()
            }
            owners = [[token["share"] for token in each["sigma1_tokens"]] for each in (masked, plain)]
            assert owners[0] == pytest.approx(owners[1], rel=1e-6)


def test_the_energy_ledger_closes() -> None:
    wrote = update(WIDE, sinks=SINKS)
    attention, mlp = (np.float64(part) for part in (wrote.attention, wrote.mlp))
    ledger = layer_row(0, "A", from_rows(wrote, SAMPLE), SAMPLE, K, WIDE[1])["ledger"]
    wanted = {
        "attention": np.sum(attention**2),
        "mlp": np.sum(mlp**2),
        "cross": 2 * np.sum(attention * mlp),
        "update": np.sum(np.square(attention + mlp)),
    }
    assert {name: ledger[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert 0 <= ledger["closure"] < 1e-6
