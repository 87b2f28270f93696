"""Figures of a text that is too long to keep are those of the text kept whole."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from updates import K, tokens, update

from jaxdelta import Analysis, analyze
from jaxdelta.run.memory_plan import MemoryDemand
from jaxdelta.spectra.moments.accumulate import Pool, Windows
from jaxdelta.spectra.scheduler import measure
from jaxdelta.spectra.view_summary import Design, LayerFigures
from jaxdelta.spectra.views import ALL, MASKED, RAW
from jaxdelta.statistics import layer_row
from jaxdelta.statistics.per_layer.ranks import effective_rank
from jaxdelta.sweep.states import LOCATIONS
from jaxdelta.sweep.sweep import Blocks, BlockUpdate, Update
from jaxdelta.text import groups
from jaxdelta.text.groups import Groups, Sample
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import tokenize

WINDOWS, LENGTH, HIDDEN, GROUPS = 6, 60, 40, 3
SHAPE = (WINDOWS * LENGTH, HIDDEN)
SINKS = {7: 30.0, 130: 100.0, 131: 60.0}
VIEWS = tuple(ALL.values())


def windows(blocks: int, counted: np.ndarray | None = None) -> Windows:
    """The text in so many blocks; all tokens count, or those given."""
    of = Sample.of(tokens(SHAPE[0], np.arange(SHAPE[0]) * GROUPS // SHAPE[0]), 0, 0)
    counted = np.ones((WINDOWS, LENGTH), bool) if counted is None else counted
    groups = np.arange(WINDOWS, dtype=np.int32) * GROUPS // WINDOWS
    return Windows(np.split(counted, blocks), np.split(groups, blocks), of.halves)


def filled(wrote: Update, text: Windows) -> Pool:
    """The pool of an update that comes in the text's blocks."""
    membership = np.ones((GROUPS, 1))  # a pool asks only whether there are groups
    design = Design(K, views=VIEWS, groups=Groups(membership, text.halves))
    pool = Pool(text, wrote.h.shape[1], design)
    parts = [np.split(part, len(text.counted)) for part in wrote]
    for block in range(len(text.counted)):
        pool.add(block, Update(*(jnp.asarray(part[block]) for part in parts)))
    return pool


def pooled(wrote: Update, text: Windows) -> LayerFigures:
    """The figures of such an update."""
    pool = filled(wrote, text)
    return pool.gathered().figures(pool._design, text.halves)


def whole(wrote: Update) -> LayerFigures:
    """Those of the update kept whole."""
    owners = np.arange(SHAPE[0]) * GROUPS // SHAPE[0]
    of = Sample.of(tokens(SHAPE[0], owners), 20, 0)
    layer = [BlockUpdate(jax.tree.map(jnp.asarray, wrote))]
    return measure([layer], SHAPE, Design(K, views=VIEWS, groups=of.groups))[0]


def assert_same(found: LayerFigures, wanted: LayerFigures) -> None:
    assert found.ledger == pytest.approx(wanted.ledger, rel=1e-12)
    for view, one in found.views.items():
        other = wanted.views[view]
        np.testing.assert_array_equal(one.kept, other.kept)
        np.testing.assert_allclose(one.singular_values, other.singular_values, rtol=1e-6)
        np.testing.assert_allclose(one.basis, other.basis, atol=1e-5)
        assert one.found.mean_energy == pytest.approx(other.found.mean_energy, rel=1e-6, abs=1e-6)
        if not view.centred:
            for product, same in zip(one.products, other.products, strict=True):
                np.testing.assert_allclose(product, same, rtol=1e-9, atol=1e-9)
        if one.found.owned is not None:  # else the frame, of a part of the text, does not hold v_1
            np.testing.assert_allclose(one.found.owned, other.found.owned, atol=2e-3)
        np.testing.assert_allclose(
            one.found.resampled.split_half, other.found.resampled.split_half, atol=1e-3
        )
        if one.crossed is not None:
            np.testing.assert_allclose(one.crossed.coupling, other.crossed.coupling, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_as_of_the_text_kept_whole(blocks: int, sinks: dict[int, float] | None) -> None:
    wrote = update(SHAPE, 3, sinks)
    found = pooled(wrote, windows(blocks))
    assert (found.views[MASKED] is found.views[RAW]) == (sinks is None)
    assert_same(found, whole(wrote))


def test_a_group_left_out_and_tokens_that_do_not_count() -> None:
    """All σ² without each group, and everything else, of the tokens that count alone."""
    wrote, counted = update(SHAPE, 4), np.random.default_rng(0).random((WINDOWS, LENGTH)) < 0.8
    found = pooled(wrote, windows(3, counted))
    for view, one in found.views.items():
        x = (wrote.delta if view.part == "update" else getattr(wrote, view.part)).astype(np.float64)
        x = x * counted.reshape(-1, 1)
        if view.centred:
            x -= x.sum(axis=0) / counted.sum() * counted.reshape(-1, 1)
        np.testing.assert_allclose(one.singular_values, np.linalg.svd(x, compute_uv=False), rtol=1e-6)
        for group, energies in enumerate(one.found.resampled.without):
            others = np.arange(SHAPE[0]) * GROUPS // SHAPE[0] != group
            values = np.linalg.svd(x[others], compute_uv=False)
            np.testing.assert_allclose(energies, values**2, rtol=1e-5, atol=1e-6 * values[0] ** 2)


def test_sums_of_every_group_at_a_width_of_many_blocks() -> None:
    """Σxxᵀ and Σx, also where the last block is narrower; one direction is far above the rest."""
    wrote = update((SHAPE[0], 600), 5, SINKS)
    wrote.attention[:] += 30 * wrote.mlp[:1]
    found, owners = filled(wrote, windows(2)).gathered(), np.arange(SHAPE[0]) * GROUPS // SHAPE[0]
    kept = np.isin(np.arange(SHAPE[0]), found.aside.places, invert=True)
    for part, name in enumerate(found.parts):
        x = (wrote.delta if name == "update" else getattr(wrote, name)).astype(np.float64)
        for group in range(GROUPS):
            rows = x[(owners == group) & kept]
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
    for order in (np.arange(blocks), rng.permutation(blocks)):
        text = Windows(
            [np.ones((1, length), bool)] * blocks, [np.zeros(1, np.int32)] * blocks, np.zeros((0, 2, 1))
        )
        pool = Pool(text, hidden, Design(8))
        for block, place in enumerate(order):
            pool.add(block, Update(jnp.asarray(x[place]), *[jnp.zeros((length, hidden), jnp.float32)] * 2))
        found = pool.gathered().figures(Design(8), text.halves).views[RAW]
        np.testing.assert_allclose(found.singular_values[:64], wanted[1][:64], rtol=1e-6)
        assert effective_rank(found.singular_values) == pytest.approx(effective_rank(wanted[1]), rel=1e-6)
        assert abs(found.directions[0] @ wanted[2][0]) >= 1 - 1e-9


@pytest.fixture(scope="module")
def packed() -> Tokens:
    """Documents in windows of 64."""
    words = [f"document {i} says {'something ' * (i % 7 + 1)}" for i in range(14)]
    return tokenize(
        words, lambda texts: [(list(text.encode()), list(range(len(text)))) for text in texts],
        max_tokens=700, vocab_size=256, layout="packed", seq_len=64,
    )  # fmt: skip


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
    """Wherever the states wait, its figures are those of the same text kept whole; no file is left."""
    monkeypatch.setattr(groups, "LONG", 100)
    monkeypatch.setattr(MemoryDemand, "_divisions", lambda work: iter([Blocks(3, 64, place)]))
    found = analyze(str(tiny_checkpoint), packed, top_k=4, scratch=str(tmp_path))
    assert found.run["memory"]["place"] == place
    assert not list(tmp_path.iterdir())
    for row, other in zip(found.per_layer, kept_whole.per_layer, strict=True):
        for name in (*layer_row.TOKENWISE, "eff_rank", "top1_frac", "n", "mean_share", "sigma1_over_sigma2"):
            for one, same in ((row, other), (row["mlp"], other["mlp"])):
                assert one[name] == pytest.approx(same[name], rel=1e-5)
        assert row["centred"]["frob"] == pytest.approx(other["centred"]["frob"], rel=1e-5)
        assert row["centred"]["token_norm_mean"] is None
        assert "no token's own figures" in row["centred"]["note"]
        assert row["intervals"]["eff_rank"][0] < row["eff_rank"] < row["intervals"]["eff_rank"][1]
    np.testing.assert_allclose(found.top1_cos, kept_whole.top1_cos, atol=1e-5)
    for entry, other in zip(found.block_capture, kept_whole.block_capture, strict=True):
        assert entry["capture"] == pytest.approx(other["capture"], abs=1e-5)
