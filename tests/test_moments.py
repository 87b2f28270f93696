"""Summaries from moments are those from rows, for layers of any size, in any number of blocks."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from updates import K, accumulated, from_moments, from_rows, tokens, update

from jaxdelta import Analysis, analyze
from jaxdelta.run.memory_plan import MemoryDemand
from jaxdelta.spectra import from_rows as rows_maker
from jaxdelta.spectra.moments.accumulate import MomentAccumulator, TextBlocks
from jaxdelta.spectra.moments.kernels import one_device_kernels
from jaxdelta.spectra.view_summary import MeasurementPlan
from jaxdelta.spectra.views import ALL, MASKED, RAW
from jaxdelta.statistics.layer_row import layer_row
from jaxdelta.statistics.per_layer.ranks import effective_rank
from jaxdelta.statistics.per_layer.registry import registered
from jaxdelta.sweep.states import LOCATIONS
from jaxdelta.sweep.sweep import Blocks, Update
from jaxdelta.text.groups import ResamplingGroups
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import tokenize

TOKENWISE = {one.name for one in registered("tokens")}

WINDOWS, LENGTH, HIDDEN, GROUPS = 6, 60, 40, 3
SHAPE = (WINDOWS * LENGTH, HIDDEN)
OWNERS = np.arange(SHAPE[0]) * GROUPS // SHAPE[0]  # a group is two windows
SAMPLE = ResamplingGroups.of(tokens(SHAPE[0], OWNERS, WINDOWS), 20, 0)


def packed_text(documents: int, most: int, window: int) -> Tokens:
    """Documents side by side in windows, the last of which are filled up."""
    words = [f"document {i} says {'something ' * (i % 7 + 1)}" for i in range(documents)]
    return tokenize(
        words, lambda texts: [(list(text.encode()), list(range(len(text)))) for text in texts],
        max_tokens=most, vocab_size=256, layout="packed", seq_len=window,
    )  # fmt: skip


# From rows and from moments


TEXTS = {
    "n far below d": (tokens(24, 5, 3), 96),
    "n < d": (tokens(72, 7, 6), 96),
    "n = d": (tokens(96, 7, 6), 96),
    "n > d": (tokens(600, 14, 10), 40),
    "n far above d": (tokens(4000, 14, 20), 40),
    "packed": (packed_text(14, 700, 64), 48),
}


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_statistic_from_moments_is_that_from_rows(name: str, sinks: bool) -> None:
    """Every view and interval; windows have tokens of several groups."""
    text, hidden = TEXTS[name]
    sample = ResamplingGroups.of(text, 20, 0)
    n = len(sample.group_of_token)
    assert sample.most_in_a_window > 1 and (name != "packed" or text.padding > 0)
    wrote = update((n, hidden), 2, {n // 3: 40.0, n // 2: 100.0} if sinks else None)
    layers = from_rows(wrote, sample), from_moments(wrote, sample)
    row, found = (layer_row(0, "A", layer, sample, K, hidden) for layer in layers)
    assert found["masked"]["n"] == n - 2 * sinks
    # More axes than rows' moments of groups have: their halves are within what these leave out.
    halves = 1e-6 if min(n, hidden) <= rows_maker.LEADING_AXES else 1e-3
    assert_agree(found, row, halves)


def assert_same_channels(found: Any, wanted: Any) -> None:
    for part, channels in wanted.items():
        for one, other in zip(found[part], channels, strict=True):
            assert one == other | {"share": pytest.approx(other["share"], rel=1e-6)}


def assert_agree(found: Any, wanted: Any, halves: float, centred: bool = False) -> None:
    """Of the rows of a layer, as far as moments know them: owners to the 1 % that a frame may miss of v_1."""
    unknown = {"sigma1_tokens", "sigma1_top_share"} if wanted.get("sigma1_tokens") is not None else set()
    known = {name for name, figure in wanted.items() if figure is not None} - {"note", "closure"} - unknown
    assert found.keys() - {"note"} == wanted.keys() - {"note"}
    for name in known:
        one, other = found[name], wanted[name]
        if isinstance(other, dict) and name not in ("intervals", "massive_channels"):
            assert_agree(one, other, halves, name == "centred")
        elif centred and name in TOKENWISE:
            assert one is None, name
        elif name == "intervals":
            missing = TOKENWISE if centred else set()
            assert one.keys() == other.keys() - missing
            for interval, bounds in one.items():
                assert bounds == pytest.approx(other[interval], rel=1e-6, abs=1e-9), interval
        else:
            rel = halves if name == "split_half_cos" else 1e-6
            if name == "massive_channels":
                assert_same_channels(one, other)
                continue
            close = other if isinstance(other, str) else pytest.approx(other, rel=rel, abs=1e-9)
            assert one == close, name
    if unknown and found["sigma1_tokens"] is not None:
        shares = [[token["share"] for token in row["sigma1_tokens"]] for row in (found, wanted)]
        assert shares[0] == pytest.approx(shares[1], rel=0.01, abs=2e-3)
        assert found["sigma1_top_share"] == pytest.approx(wanted["sigma1_top_share"], rel=0.01, abs=2e-3)


@pytest.mark.parametrize("sinks", [None, {7: 30.0, 130: 100.0, 131: 60.0}], ids=["plain", "sinks"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_summaries_that_layers_are_compared_by(blocks: int, sinks: dict[int, float] | None) -> None:
    wrote = update(SHAPE, 3, sinks)
    found, wanted = from_moments(wrote, SAMPLE, blocks), from_rows(wrote, SAMPLE)
    assert found.energies == pytest.approx(wanted.energies, rel=1e-12)
    assert (found.views[MASKED] is found.views[RAW]) == (sinks is None)
    for view, one in found.views.items():
        other = wanted.views[view]
        np.testing.assert_array_equal(one.kept, other.kept)
        np.testing.assert_allclose(one.singular_values, other.singular_values, rtol=1e-6)
        np.testing.assert_allclose(one.basis, other.basis, atol=1e-5)
        np.testing.assert_allclose(one.group_rest, 0, atol=1e-9 * one.singular_values[0] ** 2)  # q = d
        if not view.centred:
            for product, same in zip(one.kept_products, other.kept_products, strict=True):
                np.testing.assert_allclose(product, same, rtol=1e-9, atol=1e-9)
        if one.sigma1_shares is not None:  # else the frame, of a part of the text, does not hold v_1
            np.testing.assert_allclose(one.sigma1_shares, other.sigma1_shares, atol=2e-3)
        assert (one.coupling is None) == (other.coupling is None) == (view not in (RAW, MASKED))
        if one.coupling is not None:
            np.testing.assert_allclose(one.coupling, other.coupling, rtol=1e-3, atol=1e-3)
            squares = [np.float64(of.factor.T) @ np.float64(of.factor) for of in (one, other)]
            np.testing.assert_allclose(*squares, rtol=0, atol=1e-6 * one.singular_values[0] ** 2)


def test_a_group_left_out_and_tokens_that_do_not_count() -> None:
    """All σ² without each group, and the spectrum, of the tokens that count alone."""
    drawn = np.random.default_rng(0).random((WINDOWS, LENGTH + 1)) < 0.8
    drawn[:, 0] = True
    starts = np.maximum.accumulate(np.where(drawn, 0, np.arange(LENGTH + 1)), axis=1)
    positions = (np.arange(LENGTH + 1) - starts).astype(np.int32)  # 0 where not drawn: segments begin there
    documents = np.repeat(np.arange(GROUPS, dtype=np.int32), 2)[:, None].repeat(LENGTH + 1, axis=1)
    text = Tokens(np.zeros_like(documents), documents, positions=positions)
    sample = ResamplingGroups.of(text, 0, 0)
    n = len(sample.group_of_token)
    wrote = update((n, HIDDEN), 4)
    for view, one in from_moments(wrote, sample, blocks=3).views.items():
        x = (wrote.delta if view.part == "update" else getattr(wrote, view.part)).astype(np.float64)
        x = x - x.mean(axis=0) * view.centred
        np.testing.assert_allclose(one.singular_values, np.linalg.svd(x, compute_uv=False), rtol=1e-6)
        assert len(one.group_moments[0]) == HIDDEN
        for group, moments in enumerate(one.group_moments):
            energies = np.linalg.eigvalsh(np.diag(np.square(one.singular_values)) - moments)[::-1]
            values = np.linalg.svd(x[sample.group_of_token != group], compute_uv=False)
            np.testing.assert_allclose(energies, values**2, rtol=1e-5, atol=1e-6 * values[0] ** 2)


def test_sums_of_every_group_at_a_width_of_many_blocks() -> None:
    """Σxxᵀ and Σx, also where the last block is narrower; one direction is far above the rest."""
    wrote = update((SHAPE[0], 600), 5, {7: 300.0, 130: 1000.0, 131: 600.0})
    wrote.attention[:] += 30 * wrote.mlp[:1]
    found = accumulated(wrote, SAMPLE, blocks=2)
    kept = np.isin(np.arange(SHAPE[0]), found.aside.places, invert=True)
    assert not kept[[7, 130, 131]].any()
    for part, name in enumerate(found.parts):
        x = (wrote.delta if name == "update" else getattr(wrote, name)).astype(np.float64)
        for group in range(GROUPS):
            rows = x[(group == OWNERS) & kept]
            square = rows.T @ rows
            np.testing.assert_allclose(found.squares[part, group], square, atol=1e-6 * np.trace(square))
            np.testing.assert_allclose(found.sums[part, group], rows.sum(axis=0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dominated", [False, True], ids=["spread", "99 % along one direction"])
def test_of_fifty_thousand_tokens(dominated: bool) -> None:
    """Every singular value as of a float64 SVD of all rows at once, in whatever order the blocks come."""
    rng, (blocks, length, hidden) = np.random.default_rng(1), (25, 2000, 128)
    x = rng.normal(size=(blocks, length, hidden)) * np.arange(1, hidden + 1) ** -1.0
    if dominated:
        along = rng.normal(size=(blocks, length, 1)) * np.sqrt(99 * np.square(x).sum(axis=2).mean())
        x += along * np.linalg.qr(rng.normal(size=(hidden, 1)))[0].T
    x = x.astype(np.float32)
    wanted = np.linalg.svd(x.reshape(-1, hidden).astype(np.float64), full_matrices=False)
    plan, text = (
        MeasurementPlan(8),
        TextBlocks.of([np.ones((1, length), bool)] * blocks, np.zeros(50_000, int)),
    )
    for order in (np.arange(blocks), rng.permutation(blocks)):
        sums = MomentAccumulator(text, plan, one_device_kernels())
        for block, place in enumerate(order):
            sums.add(block, Update(jnp.asarray(x[place]), *[jnp.zeros((length, hidden), jnp.float32)] * 2))
        found = sums.moments().summary(plan).views[RAW]
        np.testing.assert_allclose(found.singular_values[:64], wanted[1][:64], rtol=1e-6)
        assert effective_rank(found.singular_values) == pytest.approx(effective_rank(wanted[1]), rel=1e-6)
        assert abs(found.basis[0] @ wanted[2][0]) >= 1 - 1e-9


# Sinks of a text whose beginning is not like the rest


def with_a_long_beginning(sinks: dict[int, float]) -> Update:
    """States 10 long, 40 in the first of six blocks; a sink's is its number of times 10, its update too."""
    wrote = update(SHAPE, 6)
    h = 10 * wrote.h / np.linalg.norm(wrote.h, axis=1, keepdims=True)
    scale = np.where(np.arange(SHAPE[0]) < LENGTH, 4.0, 1.0)
    for row, factor in sinks.items():
        scale[row] = factor
    return Update(*((part * scale[:, None]).astype(np.float32) for part in (wrote.attention, wrote.mlp, h)))


def test_a_sink_is_masked_however_long_the_first_states_are() -> None:
    wrote = with_a_long_beginning({200: 15.0})
    layers = from_rows(wrote, SAMPLE), from_moments(wrote, SAMPLE, WINDOWS)
    for layer in layers:
        np.testing.assert_array_equal(np.flatnonzero(~layer.views[MASKED].kept), [200])
        assert layer.views[MASKED].sinks_left == 0
        row = layer_row(0, "A", layer, SAMPLE, K, HIDDEN)
        assert row["masked"]["sinks_left"] == 0 and "left in" not in row["masked"].get("note", "")
    values = [layer.views[MASKED].singular_values[0] for layer in layers]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


@pytest.mark.parametrize("others", [{}, {200: 15.0, 300: 30.0}], ids=["alone", "beside others"])
def test_a_sink_that_is_not_set_aside_in_time_is_counted(others: dict[int, float]) -> None:
    """Shorter than the bound in the first block, longer than that of the whole text."""
    wrote = with_a_long_beginning({20: 12.0} | others)
    assert from_rows(wrote, SAMPLE).views[MASKED].kept.sum() == SHAPE[0] - 1 - len(others)
    layer = from_moments(wrote, SAMPLE, WINDOWS)
    assert layer.views[MASKED] is not layer.views[RAW]
    row = layer_row(0, "A", layer, SAMPLE, K, HIDDEN)
    assert "left in" not in row.get("note", "") and row["n"] == SHAPE[0]
    for name, view in ALL.items():
        found = layer.views[view]
        assert found.sinks_left == int(view.masked), name
        wanted = sorted(others) if view.masked else []
        np.testing.assert_array_equal(np.flatnonzero(~found.kept), wanted)
    assert row["masked"]["sinks_left"] == 1 and row["masked"]["n"] == SHAPE[0] - len(others)
    assert "1 sink left in: not set aside in time" in row["masked"]["note"]
    assert ("sinks_left" in row, "sinks_left" in row["attention"]) == (False, False)


# A run


@pytest.fixture(scope="module")
def packed() -> Tokens:
    return packed_text(14, 700, 64)


@pytest.fixture(scope="module")
def kept_whole(tiny_checkpoint: Path, packed: Tokens) -> Analysis:
    return analyze(str(tiny_checkpoint), packed, top_k=4)


@pytest.mark.parametrize("place", LOCATIONS)
def test_a_run(
    place: str,
    tiny_checkpoint: Path,
    packed: Tokens,
    kept_whole: Analysis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Wherever the states wait, its statistics are those of the same text from rows; no file is left."""
    monkeypatch.setattr(MemoryDemand, "_makers", lambda work: [work.measurement.groups])
    monkeypatch.setattr(MemoryDemand, "_divisions", lambda work, groups: iter([Blocks(3, 64, place)]))
    found = analyze(str(tiny_checkpoint), packed, top_k=4, scratch=str(tmp_path))
    assert found.run["memory"]["place"] == place
    assert not list(tmp_path.iterdir())
    for row, other in zip(found.per_layer, kept_whole.per_layer, strict=True):
        assert_agree(row, other, 1e-6)
        assert row["centred"]["token_norm_mean"] is None
        assert "no per-token statistics" in row["centred"]["note"]
    np.testing.assert_allclose(found.top1_cos, kept_whole.top1_cos, atol=1e-5)
    for entry, other in zip(found.block_capture, kept_whole.block_capture, strict=True):
        assert entry["capture"] == pytest.approx(other["capture"], abs=1e-5)
