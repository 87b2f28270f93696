"""A layer's row: every number against plain NumPy in float64 from its definition, intervals against an exact
jackknife over documents, and what is said where there is nothing to measure."""

import dataclasses
import json
import math
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from updates import DOCUMENTS, TALL, WIDE, K, from_rows, plan, tokens, update

from jaxdelta.report import tables
from jaxdelta.report.analysis import Analysis
from jaxdelta.spectra.from_rows import LEADING_AXES
from jaxdelta.spectra.group_moments import leave_one_out, split_half_cosines
from jaxdelta.spectra.scheduler import OneByOne
from jaxdelta.spectra.view_summary import COMPARED_VIEWS, LayerSummary
from jaxdelta.spectra.views import ALL, RAW, View
from jaxdelta.statistics.layer_row import layer_row, view_rows
from jaxdelta.statistics.per_layer.ranks import (
    effective_rank,
    numerical_rank,
    participation_ratio,
    roy_vetterli_rank,
    stable_rank,
)
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.sweep.sweep import Update
from jaxdelta.text.groups import HALVINGS, MAX_GROUPS, ResamplingGroups
from jaxdelta.text.tokens import Tokens

SINKS = {5: 30.0, 40: 100.0}
DRAWS = 100
SCALES = {one.name: one.interval for one in registered() if one.interval}
ARRAYS = {"directions": 3, "singular_values": 2, "top1_cos": 2}  # of an Analysis: their axes
# How far from an exact bootstrap's the half-widths of the spectrum's figures may be.
CLOSE = {"eff_rank": 0.15, "top1_frac": 0.02, "top3_frac": 0.05, "top10_frac": 0.2, "gamma": 0.02}


# The definitions


def plain_rows(
    wrote: Update, view: View, sinks: dict[int, float]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The update's rows in this view, the states that they were written into, and which tokens they are."""
    whole = {"update": wrote.attention + wrote.mlp, "attention": wrote.attention, "mlp": wrote.mlp}
    kept = [i for i in range(len(wrote.h)) if not (view.masked and i in sinks)]
    x = whole[view.part].astype(np.float64)[kept]
    return x - x.mean(axis=0) * view.centred, wrote.h.astype(np.float64)[kept], kept


def plain_means(x: np.ndarray, h: np.ndarray) -> dict[str, float]:
    norms, h_norms = np.linalg.norm(x, axis=1), np.linalg.norm(h, axis=1)
    cosines = np.sum(x * h, axis=1) / (norms * h_norms)
    return {
        "token_norm_mean": norms.mean(),
        "h_norm_mean": h_norms.mean(),
        "rel_step_mean": (norms / h_norms).mean(),
        "cos_delta_h_mean": cosines.mean(),
        "parallel_frac": np.abs(cosines).mean(),
    }


def perplexity(p: np.ndarray) -> float:
    return math.exp(-sum(q * math.log(q) for q in p if q > 1e-12))


def plain_spectrum(x: np.ndarray) -> dict[str, float]:
    """Of the Gram matrix of the short side: its eigenvalues are λ = σ²."""
    energies = np.maximum(np.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x)[::-1], 0)
    p = energies / energies.sum()
    tops = {f"top{m}_frac": p[:m].sum() for m in (1, 3, 10)}
    return {"eff_rank": perplexity(p), **tops, "gamma": math.sqrt(energies[0])}


def plain_row(x: np.ndarray, h: np.ndarray, hidden: int) -> dict[str, Any]:
    n, norms = len(x), np.linalg.norm(x, axis=1)
    steps = norms / np.linalg.norm(h, axis=1)
    values = np.linalg.svd(x, compute_uv=False)
    values = values[values > 1e-7 * values[0]]
    energies, mean = values**2, x.mean(axis=0)
    return {
        **plain_means(x, h),
        **{name: figure for name, figure in plain_spectrum(x).items() if name != "gamma"},
        "frob": math.sqrt(np.sum(x**2)),
        "token_norm_std": norms.std(),
        "rel_step_std": steps.std(),
        "top_singvals": values[:K],
        "roy_vetterli_rank": perplexity(values / values.sum()),
        "participation_ratio": energies.sum() ** 2 / np.sum(energies**2),
        "stable_rank": energies.sum() / energies[0],
        "sigma1_over_sigma2": values[0] / values[1],
        "mean_share": mean @ mean / np.mean(norms**2),
        "n": n,
        "n_over_d": n / hidden,
    }


def plain_split_half(x: np.ndarray, documents: np.ndarray, of: ResamplingGroups) -> float:
    """The mean of |<v_1, v_1'>| over the halvings, each half's v_1 from its own SVD."""
    cosines = []
    for halves in of.halves:
        firsts = [np.linalg.svd(x[half[documents] > 0], full_matrices=False)[2][0] for half in halves]
        cosines.append(abs(firsts[0] @ firsts[1]))
    return float(np.mean(cosines))


def leading_part(x: np.ndarray) -> np.ndarray:
    """The rows within the axes in which halves are compared."""
    _, _, vectors = np.linalg.svd(x, full_matrices=False)
    return x @ vectors[:LEADING_AXES].T @ vectors[:LEADING_AXES]


def plain_owners(x: np.ndarray, kept: list[int], of: Tokens) -> tuple[list[dict[str, Any]], float]:
    shares = np.linalg.svd(x, full_matrices=False)[0][:, 0] ** 2
    windows, length = of.ids.shape
    places = [(w, t) for w in range(windows) for t in range(1, length)]
    ranked = sorted(zip(shares, kept, strict=True), reverse=True)
    named = []
    for share, i in ranked[:5]:
        window, place = places[i]
        named.append(
            {
                "token": of.text(window, place),
                "position": window * length + place,
                "document": of.documents[window, place],
                "share": share,
            }
        )
    return named, ranked[0][0]  # at most a thousand tokens: the first one is a thousandth


@cache
def case(shape: tuple[int, int], with_sinks: bool, windows: int = 1) -> tuple[Update, ResamplingGroups]:
    of = ResamplingGroups.of(tokens(shape[0], windows=windows), DRAWS, seed=5)
    return update(shape, seed=2, sinks=SINKS if with_sinks else None), of


@cache
def row_of(shape: tuple[int, int], method: str, windows: int = 1) -> dict[str, Any]:
    wrote, of = case(shape, True, windows)
    return layer_row(3, "C", from_rows(wrote, of, method=method), of, K, shape[1])


def at(row: dict[str, Any], view: View) -> dict[str, Any]:
    for key in view.path:
        row = row[key]
    return row


VIEWS = pytest.mark.parametrize("view", ALL.values(), ids=list(ALL))


@VIEWS
@pytest.mark.parametrize(
    "shape, method, windows",
    [(WIDE, "gram", 1), (TALL, "gram", 1), (WIDE, "full", 1), (TALL, "full", 1), (WIDE, "gram", 3)],
    ids=["n < d", "n > d", "n < d, full", "n > d, full", "windows"],
)
def test_every_number(shape: tuple[int, int], method: str, windows: int, view: View) -> None:
    wrote, of = case(shape, True, windows)
    found = at(row_of(shape, method, windows), view)
    x, h, kept = plain_rows(wrote, view, SINKS)
    wanted = plain_row(x, h, shape[1])
    for name, figure in wanted.items():
        np.testing.assert_allclose(found[name], figure, rtol=1e-9, atol=1e-12, err_msg=name)
    documents = of.membership[:, kept].argmax(axis=0)
    halves = plain_split_half(x, documents, of)
    assert found["split_half_cos"] == pytest.approx(halves, rel=5e-4)
    within = plain_split_half(leading_part(x), documents, of)
    assert found["split_half_cos"] == pytest.approx(within, rel=1e-4)  # by Chebyshev steps, see group_moments
    named, top = plain_owners(x, kept, of.tokens)
    shares = [token.pop("share") for token in named]
    assert found["sigma1_tokens"] == [
        token | {"share": pytest.approx(share, rel=1e-7)} for token, share in zip(named, shares, strict=True)
    ]
    assert found["sigma1_top_share"] == pytest.approx(top, rel=1e-7)
    left_out = () if view in COMPARED_VIEWS else ("channels",)
    keys = {one.name for one in registered() if one.needs not in left_out and one.first_of is None}
    if view.masked:
        keys |= {"sinks_left"}
        assert found["sinks_left"] == 0
    assert found.keys() - {"L", "phase", "ledger", "centred", "masked", *measure_parts()} == {
        *keys,
        "intervals",
    }
    assert wanted.keys() <= keys


def measure_parts() -> set[str]:
    return {view.part for view in ALL.values()} - {"update"}


# Intervals


def on_scale(name: str) -> Any:
    return {"log": np.log, "unit": scipy.special.logit, "linear": np.asarray}[SCALES[name]]


def half_width(values: list[float], name: str) -> float:
    """Student's quantile times the jackknife's deviation, on the figure's scale."""
    without = on_scale(name)(np.array(values))
    n = len(without)
    fewer = 1 + scipy.stats.kurtosis(without, fisher=True, bias=False) + 1
    t = scipy.stats.t.ppf(0.975, np.clip(2 * (n - 1) / max(fewer, 1e-9), 1, n - 1))
    return float(t * np.sqrt((n - 1) / n * np.sum(np.square(without - without.mean()))))


def exact_half_widths(x: np.ndarray, h: np.ndarray, membership: np.ndarray) -> dict[str, float]:
    """Without each document, all its figures measured anew."""
    without: dict[str, list[float]] = {name: [] for name in SCALES}
    for document in membership:
        rows = np.flatnonzero(document == 0)
        figures = plain_means(x[rows], h[rows]) | plain_spectrum(x[rows])
        figures["gamma"] *= math.sqrt(len(x) / len(rows))
        for name in figures.keys() & SCALES.keys():
            without[name].append(figures[name])
    return {name: half_width(values, name) for name, values in without.items() if values}


@pytest.mark.parametrize(
    "view", [RAW, View(masked=True), View(centred=True), View("mlp")], ids=lambda view: view.name
)
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["n < d", "n > d"])
def test_intervals_are_those_of_an_exact_jackknife(shape: tuple[int, int], view: View) -> None:
    intervals = at(row_of(shape, "gram"), view)["intervals"]
    assert intervals.keys() == SCALES.keys()
    wrote, of = case(shape, True)
    x, h, kept = plain_rows(wrote, view, SINKS)
    point = plain_means(x, h) | plain_spectrum(x)
    for name, half in exact_half_widths(x, h, of.membership[:, kept]).items():
        low, high = on_scale(name)(np.array(intervals[name]))
        assert (low + high) / 2 == pytest.approx(on_scale(name)(point[name]), rel=1e-6, abs=1e-6), name
        assert (high - low) / 2 == pytest.approx(half, rel=CLOSE.get(name, 1e-8)), name


def test_without_a_sink_the_next_direction_takes_its_place() -> None:
    """One document holds the largest token."""
    of = ResamplingGroups.of(tokens(WIDE[0]), DRAWS, seed=5)
    wrote = update(WIDE, seed=4, sinks={30: 60.0})
    found = layer_row(0, "A", from_rows(wrote, of, views=(RAW,)), of, K, WIDE[1])["intervals"]
    x, h, _ = plain_rows(wrote, RAW, {})
    low, high = np.log(found["gamma"])
    assert (high - low) / 2 == pytest.approx(exact_half_widths(x, h, of.membership)["gamma"], rel=0.02)


# Ranks


def random_spectra(kind: str, count: int = 2000, r: int = 50) -> np.ndarray:
    rng = np.random.default_rng(0)
    uniform = rng.random((count, r))
    return {
        "power law": np.arange(1.0, r + 1) ** -(6 * uniform[:, :1]),
        "exponential": np.exp(-3 * uniform[:, :1] * np.arange(r)),
        "few large": uniform + (uniform < 0.05) * 10.0 ** (8 * rng.random((count, 1))),
        "ties": np.round(4 * uniform) / 4,
        "zeros": uniform * (rng.random((count, r)) < rng.random((count, 1))),
        "at the cut": np.where(np.arange(r) < 1, 1, 1e-6 * (0.5 + uniform)),
        "any size": np.exp(30 * rng.normal(size=(count, 1)) + 2 * rng.normal(size=(count, r))),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["power law", "exponential", "few large", "ties", "zeros", "at the cut", "any size"]
)
def test_the_order_of_the_ranks(kind: str) -> None:
    """stable ≤ participation ≤ exp H(σ²) ≤ Roy-Vetterli ≤ rank: Rényi's entropies, 14,000 spectra in all."""
    values = np.sort(random_spectra(kind), axis=1)[:, ::-1]
    ranks = [
        stable_rank(values),
        participation_ratio(values),
        effective_rank(values),
        roy_vetterli_rank(values),
        np.array([numerical_rank(spectrum) for spectrum in values]),
    ]
    for smaller, larger in pairwise(ranks):
        assert np.all(smaller <= larger * (1 + 1e-8))  # shares below 1e-12 are left out of an entropy


# Nothing to measure


def assert_json(
    layer: LayerSummary, of: ResamplingGroups, k: int = K, hidden: int = WIDE[1]
) -> dict[str, Any]:
    """The row, which holds no NaN, and names a reason wherever a figure of a view is missing."""
    row = layer_row(0, "A", layer, of, k, hidden)
    json.dumps(row, allow_nan=False)
    for view in layer.views:
        found = at(row, view)
        missing = any(figure is None for figure in found.values()) or "intervals" not in found
        assert not missing or found["note"], view.name
    return row


def plain(delta: np.ndarray) -> Update:
    """An update that attention and the MLP share in."""
    h = np.random.default_rng(1).normal(size=delta.shape)
    return Update(*(part.astype(np.float32) for part in (0.5 * delta, 0.5 * delta, h)))


OF = ResamplingGroups.of(tokens(WIDE[0]), DRAWS, seed=5)


def test_zero_update() -> None:
    row = assert_json(from_rows(plain(np.zeros(WIDE)), OF), OF)
    assert row["note"] == "zero update: it has no directions"
    for name in ("eff_rank", "roy_vetterli_rank", "participation_ratio", "stable_rank", "top1_frac", "frob"):
        assert row[name] == 0
    assert row["sigma1_over_sigma2"] is None and row["split_half_cos"] is None
    assert row["mean_share"] == 0 and row["ledger"]["closure"] == 0
    assert "intervals" not in row and row["sigma1_tokens"] == [] and row["sigma1_top_share"] is None


def test_equal_singular_values() -> None:
    row = assert_json(from_rows(plain(np.eye(*WIDE)), OF), OF)
    n = WIDE[0]
    for name in ("eff_rank", "roy_vetterli_rank", "participation_ratio", "stable_rank"):
        assert row[name] == pytest.approx(n, rel=1e-9)
    assert row["sigma1_over_sigma2"] == pytest.approx(1) and "note" not in row
    assert row["top10_frac"] == pytest.approx(10 / n)


def test_rank_one() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(1, 9, WIDE[0]), rng.integers(-9, 9, WIDE[1])
    row = assert_json(from_rows(plain(np.outer(left, right)), OF), OF)
    assert row["note"] == "one direction: no sigma2"
    for name in ("eff_rank", "roy_vetterli_rank", "participation_ratio", "stable_rank", "top1_frac"):
        assert row[name] == pytest.approx(1, abs=1e-9)
    assert row["split_half_cos"] == pytest.approx(1)
    same = assert_json(from_rows(plain(np.tile(right, (WIDE[0], 1))), OF), OF)
    assert same["mean_share"] == pytest.approx(1)
    assert same["centred"]["note"] == "zero update: it has no directions"


@pytest.mark.parametrize("documents", [1, 2, WIDE[0]])
def test_few_and_many_documents(documents: int) -> None:
    of = ResamplingGroups.of(tokens(WIDE[0], documents), DRAWS, seed=5)
    assert of.documents == min(documents, MAX_GROUPS)
    assert of.membership.sum() == WIDE[0] and np.all(of.membership.sum(axis=0) == 1)
    row = assert_json(from_rows(update(WIDE), of, views=(RAW,)), of)
    if documents == 1:
        assert row["note"] == "one document: no halves, no intervals"
        assert row["split_half_cos"] is None and "intervals" not in row
    else:
        assert "note" not in row and row["intervals"].keys() == SCALES.keys()
        assert all(low < high for low, high in row["intervals"].values())


def of_kept(wrote: Update, kept: list[int], of: ResamplingGroups) -> dict[str, Any]:
    """The statistics of these tokens alone, all others being masked."""
    mask = np.isin(np.arange(len(wrote.h)), kept)
    with jax.enable_x64(True):
        (found,) = OneByOne(of.groups).summaries([(wrote, mask.astype(np.float64))], RAW, plan())
    energies = dict.fromkeys(("attention", "mlp", "cross", "update"), 0.0)
    return assert_json(LayerSummary({RAW: found._replace(kept=mask)}, energies), of)


def test_all_tokens_masked_but_two() -> None:
    wrote = update(WIDE)
    row = of_kept(wrote, [3, 60], OF)
    assert row["note"] == "only 2 tokens" and row["n"] == 2
    x = (wrote.attention + wrote.mlp)[[3, 60]].astype(np.float64)
    values = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(row["top_singvals"][:2], values, rtol=1e-9)
    assert row["sigma1_over_sigma2"] == pytest.approx(values[0] / values[1], rel=1e-9)
    firsts = np.abs(x[0] @ x[1]) / np.linalg.norm(x, axis=1).prod()  # halves without either are not counted
    assert row["split_half_cos"] == pytest.approx(firsts)
    assert [token["token"] for token in row["sigma1_tokens"]] in (["t4", "t61"], ["t61", "t4"])


def test_all_tokens_masked_but_one() -> None:
    row = of_kept(update(WIDE), [3], OF)
    reasons = ["one direction: no sigma2", "only 1 token", "one document: no halves, no intervals"]
    assert row["note"] == "; ".join(reasons)
    assert row["split_half_cos"] is None and "intervals" not in row
    assert [token["token"] for token in row["sigma1_tokens"]] == ["t4"]
    assert row["sigma1_top_share"] == pytest.approx(1)


def test_a_document_whose_tokens_are_all_masked() -> None:
    document = np.flatnonzero(OF.membership[4])
    row = of_kept(update(WIDE), [i for i in range(WIDE[0]) if i not in document], OF)
    assert "note" not in row and row["n"] == WIDE[0] - len(document)
    assert all(low < high for low, high in row["intervals"].values())


def test_one_token() -> None:
    of = ResamplingGroups.of(tokens(1, 1), DRAWS, seed=5)
    row = assert_json(from_rows(update((1, WIDE[1])), of, k=1), of, k=1)
    assert row["n"] == 1 and "only 1 token" in row["note"]
    assert row["centred"]["note"].startswith("zero update")


def test_as_many_tokens_as_dimensions() -> None:
    shape = (WIDE[0], WIDE[0])
    row = assert_json(from_rows(update(shape), OF, views=(RAW,)), OF, hidden=WIDE[0])
    x, h, _ = plain_rows(update(shape), RAW, {})
    for name, figure in plain_row(x, h, WIDE[0]).items():
        np.testing.assert_allclose(row[name], figure, rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("shape", [(560, 580), (580, 560)])
def test_the_smallest_axes_shrink_together(shape: tuple[int, int]) -> None:
    """Beyond those along which the tokens' coordinates are found: how far a figure moves without a document
    hardly depends on it."""
    n, sample, wrote = shape[0], ResamplingGroups.of(tokens(shape[0]), 20, 0), update(shape)
    found = from_rows(wrote, sample, views=(RAW,)).views[RAW]
    moved = leave_one_out(found.singular_values, found.group_moments, found.group_rest)
    assert moved.shape == (DOCUMENTS, 560)
    x, documents = (wrote.attention + wrote.mlp).astype(np.float64), np.arange(n) * DOCUMENTS // n
    exact = np.array(
        [np.linalg.svd(x * (documents != g)[:, None], compute_uv=False) ** 2 for g in range(DOCUMENTS)]
    )
    np.testing.assert_allclose(moved.sum(axis=1), exact.sum(axis=1), rtol=1e-3)
    spreads = [effective_rank(np.sqrt(energies)).std() for energies in (moved, exact)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.05)
    np.testing.assert_allclose(moved[:, 0], exact[:, 0], rtol=1e-3)
    halves = plain_split_half(x, documents, sample)
    cosines = split_half_cosines(found.group_moments, sample.halves)
    assert cosines.mean() == pytest.approx(halves, rel=1e-3)


def test_without_documents_drawn_the_row_has_the_figures_alone() -> None:
    of = ResamplingGroups.of(tokens(WIDE[0]), 0, seed=0)
    layer = from_rows(update(WIDE), of, views=(RAW,), resampled=False)
    (row,) = view_rows([layer.views[RAW]], of, K, WIDE[1])
    assert not row.keys() & {"intervals", "split_half_cos", "sigma1_tokens", "note"}
    with_draws = assert_json(from_rows(update(WIDE), OF, views=(RAW,)), OF)
    assert row.pop("massive_channels") == with_draws["massive_channels"]
    for name, figure in row.items():  # With documents drawn LAPACK finds all vectors, and rounds otherwise.
        np.testing.assert_allclose(with_draws[name], figure, rtol=1e-10, err_msg=name)
    assert of.halves.shape == (HALVINGS, 2, DOCUMENTS) and not of.intervals


# On screen


def shown(*rows: dict[str, Any]) -> Analysis:
    """An Analysis with these rows and nothing else."""
    empty = {field.name: [] for field in dataclasses.fields(Analysis) if field.default is dataclasses.MISSING}
    numbers = {"num_layers": len(rows), "hidden": WIDE[1], "n_calib_tokens": WIDE[0] + 1, "model": "made"}
    arrays = {name: np.zeros((1,) * rank, np.float32) for name, rank in ARRAYS.items()}
    dictionaries = {"last_layer_normed": rows[-1], "last_layer_residual": rows[-1], "run": {}}
    return Analysis(**empty | numbers | arrays | dictionaries | {"per_layer": list(rows)})  # type: ignore[arg-type]


def test_tables_of_layers_that_write_nothing_and_of_single_views() -> None:
    views = (RAW, View(masked=True, centred=True))
    zero = assert_json(from_rows(plain(np.zeros(WIDE)), OF, views=views), OF)
    sinks = assert_json(from_rows(update(WIDE, sinks=SINKS), OF, views=views), OF)
    both = shown(zero, sinks)
    ledger, owners = list(tables.ledger_table(both)), list(tables.owner_table(both))
    assert [line.endswith("sinks masked 2") for line in ledger] == [False, False, True]
    assert len(owners) == 2 and "'t41'" in owners[1]
    assert list(tables.owner_table(shown(zero))) == []
    assert "masked.centred" in "\n".join(tables.view_table(both))
